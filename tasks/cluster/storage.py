"""What the filesystems do for all nodes at once: one checkpoint-sized file and many small ones a node."""

import os
import shutil
import time
from pathlib import Path

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
        meeting.begin(f"{name} storage: writing and reading")
        folder = root / f".cluster-check-{meeting.host}-{meeting.node}-{os.getpid()}"
        # All nodes stay in step whatever one of them meets: a full disk of one is no hang of the others.
        try:
            if is_first:
                faults.before_write(str(folder))
                folder.mkdir(parents=True)
                _large(meeting, settings, name, folder)
        except OSError as error:
            meeting.recorder.problem(f"{name}_writable", f"{root}: {error.strerror or error}")
        meeting.begin(f"{name} storage: small files")
        try:
            if is_first and folder.exists():
                _small(meeting, settings, name, folder)
        except OSError as error:
            meeting.recorder.problem(f"{name}_writable", f"{root}: {error.strerror or error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    meeting.begin("the shared folder is one")
    _is_one(meeting, shared)


def _large(meeting: Meeting, settings: StorageProbeSettings, name: str, folder: Path) -> None:
    """Bandwidth of one file, written through to the disk; read back past this node's cache where the system lets us."""
    path, total = folder / "large", settings.file_mbytes * 10**6
    block = os.urandom(min(BLOCK_BYTES, total))
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        written = 0
        while written < total:
            # A write may be short: the next goes on where it ended.
            start = written % len(block)
            written += file.write(block[start : start + total - written])
        os.fsync(file.fileno())
    meeting.recorder.figure(f"{name}_write_gbytes_per_s", total / (time.perf_counter() - began) / 1e9)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, read = time.perf_counter(), 0
        # So is a read, at its place in the block.
        while data := file.read(len(block) - read % len(block)):
            start = read % len(block)
            if data != block[start : start + len(data)]:
                meeting.recorder.problem(f"{name}_correct", f"{path} does not hold at byte {read} what was written")
                break
            read += len(data)
        else:
            if read != total:
                meeting.recorder.problem(
                    f"{name}_correct", f"{path} ends after {read} of {total} bytes that were written"
                )
        seconds = time.perf_counter() - began
    meeting.recorder.figure(f"{name}_read_gbytes_per_s", read / seconds / 1e9)


def _small(meeting: Meeting, settings: StorageProbeSettings, name: str, folder: Path) -> None:
    """Latency of creating, writing through and opening again a file of 4 KiB."""
    data, created, opened = os.urandom(SMALL_BYTES), [], []
    for number in range(settings.num_small_files):
        path = folder / f"small-{number}"
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        created.append(time.perf_counter() - began)
        began = time.perf_counter()
        path.read_bytes()
        opened.append(time.perf_counter() - began)
    meeting.recorder.distribution(f"{name}_small_file_create_ms", [1e3 * value for value in created])
    meeting.recorder.distribution(f"{name}_small_file_read_ms", [1e3 * value for value in opened])
    meeting.recorder.figure(f"{name}_small_files_per_s", len(created) / (sum(created) + sum(opened)))


def _is_one(meeting: Meeting, shared: Path) -> None:
    """What the first rank writes, all see: a folder that each node has for itself looks mounted, and is not shared."""
    # A name of its own: another check on this filesystem must not overwrite it.
    word = meeting.gather(os.urandom(8).hex())[0]
    path = shared / f".cluster-check-{word}"
    if meeting.rank == 0:
        try:
            path.write_text(word)
        except OSError as error:
            meeting.recorder.problem("shared_writable", f"{path}: {error.strerror or error}")
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
