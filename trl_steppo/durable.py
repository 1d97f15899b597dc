"""Files and directories that are either whole or not there, even after a power cut; and locks between processes.

They are written under another name next to their place (`.partial`), which nothing picks up. Once all of it is on the
disk, it is renamed. If anything fails before that, the place stays as it was.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_HELD_ERRNOS = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


# -- files and directories --------------------------------------------------------------------------------------------


@contextmanager
def file(path: Path, *, syncs: bool = True) -> Iterator[Path]:
    """
    Write a file so that it is complete wherever it is found. Folders above it are made.

    Args:
        path (`Path`):
            The file's place. A file that is there is replaced.
        syncs (`bool`, *optional*, defaults to `True`):
            Whether the file survives a power cut. `False` for what nothing depends on; it is much faster.

    Yields:
        `Path`: Where to write the file. It becomes `path` when the block ends, and is removed if the block raises.

    Example:
    ```python
    >>> with durable.file(Path("scores.json")) as partial:
    ...     partial.write_text(json.dumps(scores))
    ```
    """
    # Several processes may write the same file. A process that is killed leaves a hidden one.
    partial = partial_of(path.with_name(f".{path.name}.{os.getpid()}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    try:
        yield partial
        publish(partial, path, syncs=syncs)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def directory(path: Path, *, syncs: bool = True, replaces: bool = False) -> Iterator[Path]:
    """
    Write a directory so that it is complete wherever it is found. Folders above it are made.

    Args:
        path (`Path`):
            The directory's place.
        syncs (`bool`, *optional*, defaults to `True`):
            Whether the directory survives a power cut. `False` for what no later process needs; it is much faster.
        replaces (`bool`, *optional*, defaults to `False`):
            Whether a directory that is there is deleted. Otherwise one with something in it is an `OSError`.

    Yields:
        `Path`: The directory to write into. It becomes `path` when the block ends, and is removed if the block raises.
    """
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, path, syncs=syncs, replaces=replaces)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_of(path: Path) -> Path:
    """Where a file or a directory is written before it is whole."""
    return path.with_name(f"{path.name}.partial")


def publish(partial: Path, path: Path, *, syncs: bool = True, replaces: bool = False) -> None:
    """
    Move a file or a directory to its place, once all of it is on the disk.

    Args:
        partial (`Path`):
            What was written. All of it is there.
        path (`Path`):
            The place. A file that is there is replaced.
        syncs (`bool`, *optional*, defaults to `True`):
            Whether the result survives a power cut.
        replaces (`bool`, *optional*, defaults to `False`):
            Whether a directory that is there is deleted, when the new one has its place.

    Raises:
        OSError: If it cannot be written, as on a full disk; if a directory with something in it has the place, and
            is not to be replaced.
    """
    if syncs:
        for part in (*partial.rglob("*"), partial):
            sync(part)
    replaced = retire(path) if replaces and path.is_dir() else None
    try:
        os.replace(partial, path)
    except BaseException:
        if replaced is not None:
            replaced.rename(path)
        raise
    if syncs:
        sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def retire(path: Path) -> Path:
    """
    Rename a directory that is to be deleted, so that a process that is killed meanwhile leaves no half of it in its
    place. Returns the new path, which nothing picks up.
    """
    retired = path.with_name(f"{path.name}.replaced")
    shutil.rmtree(retired, ignore_errors=True)
    path.rename(retired)
    return retired


def sync(path: Path) -> None:
    """
    Have a file, or the names in a directory, on the disk before going on.

    Raises:
        OSError: If it cannot be written, as on a full disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- locks ------------------------------------------------------------------------------------------------------------


class LockedError(Exception):
    """
    A lock is held already.

    Args:
        path (`Path`):
            The lock's file.
        holder (`str`):
            The process that holds it, and its machine, as far as they are known.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.path = path
        self.holder = holder


class Lock:
    """
    A lock that one process holds until [`close`], or until the process ends in any way: the system then releases it.

    File systems without locks (some network file systems) and Windows have none; a warning says so.

    Args:
        path (`Path`):
            The lock's file. It names the holder, and is removed when the lock is released.

    Raises:
        LockedError: If the lock is held, also by another [`Lock`] of this process.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        while self._descriptor < 0:
            self._descriptor = _held(path)
        _OPEN.add(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())

    def close(self) -> None:
        """Release the lock, unless it was released before."""
        if self._descriptor not in _OPEN:
            return
        with suppress(OSError):
            self.path.unlink()
        _OPEN.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1


def is_held(path: Path) -> bool:
    """
    Whether a lock is held by a process that is alive. A killed one leaves the file behind.

    Args:
        path (`Path`):
            The lock's file. It is only read: taking the lock would keep a process away that starts just now. The
            holder on another machine is taken for alive.
    """
    try:
        words = path.read_text().split()
        process, machine = int(words[1]), words[3]
    except (OSError, ValueError, IndexError):
        return False
    if machine != platform.node() or os.name == "nt":  # where signal 0 would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


_OPEN: set[int] = set()  # descriptors of this process's locks


def _forget() -> None:
    """Close the locks in a process that was forked from their holder, and might outlive it."""
    for descriptor in _OPEN:
        os.close(descriptor)
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _held(path: Path) -> int:
    """The descriptor of the locked file; -1 if its holder released it meanwhile, which removed the file."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        _lock(descriptor, path)
        if not _is_at(path, descriptor):
            os.close(descriptor)
            return -1
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # on Windows
        logger.warning("this system cannot lock %s: nothing keeps another process away", path)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_ERRNOS:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise LockedError(path, holder or "another process") from error
        logger.warning("%s cannot be locked (%s): nothing keeps another process away", path, error)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
