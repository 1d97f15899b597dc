"""The code that a run was made with: versions of packages, and the commit of its script."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__

_PACKAGES = ("torch", "transformers", "trl", "accelerate")
_GIT_TIMEOUT_S = 5.0


def versions() -> dict[str, str | bool | None]:
    """
    The versions of what a run was made with.

    Returns:
        `dict`: Versions of `trl_steppo`, `python`, `torch`, `transformers`, `trl` and `accelerate`. `git_commit` of
        the directory of the script that runs (of the working directory in a notebook), and `git_dirty`: whether files
        that git tracks differ from it. Both are `None` where there is no git, or no repository.
    """
    directory = _script_directory()
    commit = _git(directory, "rev-parse", "HEAD")
    changes = None if commit is None else _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {
        "trl_steppo": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _script_directory() -> Path:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(file).resolve().parent if file else Path.cwd()


def _git(directory: Path, *words: str) -> str | None:
    """The output of a git command that changes nothing; `None` if it fails for any reason."""
    command = ["git", "--no-optional-locks", "-C", str(directory), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
