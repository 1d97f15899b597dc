"""What was written is there after a power cut."""

from __future__ import annotations

import os
from pathlib import Path


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
