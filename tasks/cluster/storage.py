"""What the filesystems do for all nodes at once: a checkpoint-sized file, several times, and many small ones a node."""

import errno
import os
import shutil
import statistics
import time
from pathlib import Path

from tasks.cluster.evidence import SHARED_IS_FULL
from tasks.cluster.faults import Faults
from tasks.cluster.meeting import Meeting
from tasks.contracts.cluster_settings import StorageProbeSettings

BLOCK_BYTES = 8 << 20
SMALL_BYTES = 4096


def measure_storage(
    meeting: Meeting, settings: StorageProbeSettings, shared: Path, scratch: Path, faults: Faults
) -> None:
    """Both filesystems, by the first process of every node; the others wait."""
    is_first = meeting.process == 0
    for name, root in (("shared", shared), ("scratch", scratch)):
        own = f".cluster-check-{meeting.host}-{meeting.node}"
        folder = root / f"{own}-{os.getpid()}"
        if is_first:
            _sweep(root, own)
        rates: list[tuple[float, float]] = []
        is_sound, is_made = is_first, False
        for number in range(1, settings.num_repeats + 1):
            meeting.begin(f"{name} storage: writing and reading, {number} of {settings.num_repeats}")
            # All nodes stay in step whatever one of them meets: a full disk of one is no hang of the others.
            try:
                if is_sound:
                    faults.before_write(str(folder))
                    folder.mkdir(parents=True, exist_ok=True)
                    is_made = True
                    rates.append(_large(settings, folder))
            except OSError as error:
                _refused(meeting, name, root, error)
                is_sound = False
            except _Corrupt as error:
                meeting.recorder.problem(f"{name}_correct", str(error))
                is_sound = False
        if rates:
            # Others use these filesystems as well, and one burst of theirs is no fault of a node.
            for what, values in zip(("write", "read"), zip(*rates, strict=True), strict=True):
                meeting.recorder.figure(f"{name}_{what}_gbytes_per_s", statistics.median(values))
        created: list[float] = []
        opened: list[float] = []
        of_files: list[float] = []
        # Whatever came of the large ones: small ones may fit where those did not, and the folder is theirs as well.
        is_sound = is_made
        for number in range(1, settings.num_repeats + 1):
            meeting.begin(f"{name} storage: small files, {number} of {settings.num_repeats}")
            try:
                if is_sound:
                    times = _small(settings, folder)
                    of_files.append(settings.num_small_files / (sum(times[0]) + sum(times[1])))
                    created += times[0]
                    opened += times[1]
            except OSError as error:
                _refused(meeting, name, root, error)
                is_sound = False
        shutil.rmtree(folder, ignore_errors=True)
        if of_files:
            meeting.recorder.distribution(f"{name}_small_file_create_ms", [1e3 * value for value in created])
            meeting.recorder.distribution(f"{name}_small_file_read_ms", [1e3 * value for value in opened])
            # A quick filesystem is done with them in a moment, of which one stall is the most.
            meeting.recorder.figure(f"{name}_small_files_per_s", statistics.median(of_files))
    meeting.begin("the shared folder is one")
    _is_one(meeting, shared)


def _sweep(root: Path, own: str) -> None:
    """Remove what killed processes of this node left, up to a checkpoint each; of another check that runs here nothing."""
    for left in root.glob(".cluster-check-*"):
        name, _, process = left.name.rpartition("-")
        if name == own and process.isdecimal() and not Path("/proc", process).exists():
            shutil.rmtree(left, ignore_errors=True)


def _refused(meeting: Meeting, name: str, path: Path, error: OSError) -> bool:
    """Tell of a write that was refused; whether that was for want of space on the shared filesystem.

    All nodes fill that one, or the user's quota of it: who meets the end first is no worse than the others.
    """
    is_full = name == "shared" and error.errno in (errno.ENOSPC, errno.EDQUOT)
    meeting.recorder.problem(SHARED_IS_FULL if is_full else f"{name}_writable", f"{path}: {error.strerror or error}")
    return is_full


class _Corrupt(RuntimeError):
    """A file does not hold what was written."""


def _large(settings: StorageProbeSettings, folder: Path) -> tuple[float, float]:
    """Rates in GB/s of one file, written through to the disk; read back past this node's cache where the system lets us."""
    path, total = folder / "large", settings.file_mbytes * 10**6
    block = os.urandom(min(BLOCK_BYTES, total))
    path.unlink(missing_ok=True)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        written = 0
        while written < total:
            # A write may be short: the next goes on where it ended.
            start = written % len(block)
            written += file.write(block[start : start + total - written])
        os.fsync(file.fileno())
    writing_s = time.perf_counter() - began
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, read = time.perf_counter(), 0
        # So is a read, at its place in the block.
        while data := file.read(len(block) - read % len(block)):
            start = read % len(block)
            if data != block[start : start + len(data)]:
                raise _Corrupt(f"{path} does not hold at byte {read} what was written")
            read += len(data)
        if read != total:
            raise _Corrupt(f"{path} ends after {read} of {total} bytes that were written")
        reading_s = time.perf_counter() - began
    return total / writing_s / 1e9, total / reading_s / 1e9


def _small(settings: StorageProbeSettings, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds for creating and writing through, and for opening again, each of the files of 4 KiB."""
    data, created, opened = os.urandom(SMALL_BYTES), [], []
    for number in range(settings.num_small_files):
        path = folder / f"small-{number}"
        path.unlink(missing_ok=True)
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        created.append(time.perf_counter() - began)
        began = time.perf_counter()
        path.read_bytes()
        opened.append(time.perf_counter() - began)
    return created, opened


def _is_one(meeting: Meeting, shared: Path) -> None:
    """What the first rank writes, all see: a folder that each node has for itself looks mounted, and is not shared."""
    # A name of its own: another check on this filesystem must not overwrite it.
    word = meeting.gather(os.urandom(8).hex())[0]
    path = shared / f".cluster-check-{word}"
    is_full = False
    if meeting.rank == 0:
        try:
            path.write_text(word)
        except OSError as error:
            is_full = _refused(meeting, "shared", path, error)
            if is_full:
                # An empty file needs no space. A filesystem that is read-only would refuse even this.
                path.unlink(missing_ok=True)
    if meeting.gather(is_full)[0]:
        # Nobody can see what was not written, and that tells nothing of the mount.
        return
    meeting.begin("reading what the first rank wrote")
    try:
        seen = path.read_text()
    except OSError as error:
        seen = f"nothing ({error.strerror})"
    if seen != word:
        meeting.recorder.problem(
            "shared_is_one", f"{path} does not hold here what rank 0 wrote: storage.shared is not shared"
        )
    meeting.begin("the end of storage")
    if meeting.rank == 0:
        path.unlink(missing_ok=True)
