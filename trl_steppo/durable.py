"""What was written is there after a power cut; what one process holds, no other one writes."""

from __future__ import annotations

import errno
import logging
import os
import platform
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


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


class LockedError(Exception):
    """
    Someone else holds a lock.

    Args:
        path (`Path`):
            Of the lock's file.
        holder (`str`):
            Who, as it was written there: a process and its machine, as far as it is known.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.path = path
        self.holder = holder


class Lock:
    """
    A file that one process holds until [`close`], or until it ends, whatever ends it: the system lets go of it then.

    On a file system without such locks (some network file systems), and on Windows, there is none, and a warning says
    so.

    Args:
        path (`Path`):
            The file. It names its holder, and is removed when it is let go of.

    Raises:
        LockedError: If it is held, also by another [`Lock`] of this process.
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
        """Let go of it; it may have been let go of before."""
        if self._descriptor not in _OPEN:
            return
        with suppress(OSError):
            self.path.unlink()
        _OPEN.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1


_OPEN: set[int] = set()  # descriptors of this process's locks


def _forget() -> None:
    """In a process that was forked from a holder, and would hold on to the lock after its end."""
    for descriptor in _OPEN:
        os.close(descriptor)
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _held(path: Path) -> int:
    """The descriptor of the locked file; -1 if it was removed meanwhile, by one that let go of it."""
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
        if error.errno in _HELD:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise LockedError(path, holder or "another process") from error
        logger.warning("%s cannot be locked (%s): nothing keeps another process away", path, error)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
