"""Writing that is either whole or absent: a temporary file, fsync, rename."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tasks.contracts.daemon_threads import in_order

MOST_READERS = 8
"""Files that are digested at once."""


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` atomically and durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def append(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Append ``data`` whole or not at all: half a line, on a full disk, would spoil the one that follows it.

    Raises:
        OSError: the disk is full or fails; the file is as it was.
    """
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON, atomically and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


@contextmanager
def only_one(path: Path, on_wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock that is the file ``path``, made if need be; others, on every node that sees it, wait.

    The kernel gives it back when the process ends, however it ends.

    Args:
        on_wait: called once if another has it.

    Raises:
        OSError: the file system has no locks; what to do is in the message.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            if on_wait is not None and not _is_free(lock):
                on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}: this file system keeps no locks, without which two flows could run one job; "
                f"mount it with them (Lustre: -o flock; NFS: not nolock) or set storage.shared to one that has them",
                str(path),
            ) from error
        yield


def _is_free(lock: TextIO) -> bool:
    """Whether a lock was free, and is held now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_json(path: Path) -> Any:
    """The JSON value in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below ``folder`` durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def publish_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place; where another process was faster, its folder stays and ours goes."""
    sync_tree(temporary)
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary)
    sync_folder(final.parent)


def link(path: Path, target: Path) -> None:
    """Make ``path`` a relative symbolic link to ``target``, replacing an older link atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, path.parent))
    temporary.replace(path)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of_files(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over names (relative to ``root``) and contents of files, in the order of their names.

    Several files are read at once: of a large model's weights one processor digests some 1.5 GB a second.
    """
    ordered = sorted(paths)
    total = hashlib.sha256()
    contents = in_order(_digest_of_content, ordered, most_at_once=min(MOST_READERS, os.cpu_count() or 1))
    for path, content in zip(ordered, contents, strict=True):
        total.update(f"{path.relative_to(root)}\0{content}\n".encode())
    return total.hexdigest()


def _digest_of_content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
