"""A run to be started: its command, and what its directory says about it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from .. import durable
from ..report.files import last_checkpoint
from ..types import JsonObject

LOG = "log.txt"
"""The output of a run's process, in its directory."""

_SECONDS = "seconds.txt"  # written when a run has ended well: its mark
_SETTINGS = "run.json"  # written when it starts: another run may be asked for under the same name


@dataclass(frozen=True)
class PlannedRun:
    """
    A run, to do or done.

    Args:
        arguments (`tuple[str, ...]`):
            A script and its flags. The last flag is `--output_dir`.
        output_dir (`Path`):
            Where the run writes. Its process's output goes to `log.txt` there.
        inputs (`tuple[Path, ...]`, *optional*):
            Files and directories that decide what it does, besides its arguments.
        launcher (`tuple[str, ...]`, *optional*, defaults to this Python):
            The command that starts the script.
        goes_on (`bool`, *optional*, defaults to `False`):
            Whether a run that was cut off goes on from its last checkpoint. Otherwise it starts again.
    """

    arguments: tuple[str, ...]
    output_dir: Path
    inputs: tuple[Path, ...] = ()
    launcher: tuple[str, ...] = (sys.executable,)
    goes_on: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether its directory holds a run that ended well. Its settings may be others: see `played_settings`."""
        return (self.output_dir / _SECONDS).is_file()

    @property
    def has_trained(self) -> bool:
        """Whether a trainer has written its end there, or, as those of TRL do, a last checkpoint."""
        return (self.output_dir / "trainer_state.json").is_file() or self.checkpoint is not None

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint in its directory."""
        return last_checkpoint(self.output_dir)

    @property
    def words(self) -> list[str]:
        """The command that starts it, or has it go on."""
        checkpoint = self.checkpoint if self.goes_on else None
        resume = () if checkpoint is None else ("--resume_from_checkpoint", str(checkpoint))
        return [*self.launcher, *self.arguments, *resume]

    @property
    def command(self) -> str:
        """What a user types for the same run."""
        python = [word if word != sys.executable else "python" for word in self.launcher]
        return shlex.join([*python, *self.arguments])

    @property
    def settings(self) -> str:
        """The command without the place it writes to, which comes last."""
        return settings_in(self.command)

    def hashes(self) -> dict[str, str]:
        """Of what its inputs hold now, by their names."""
        return {self.name_of(path): hash_of(path) for path in self.inputs}

    def name_of(self, path: Path) -> str:
        """The name of an input."""
        return os.path.relpath(path)

    @property
    def played_settings(self) -> str | None:
        """`settings` as they were when the run in its directory began. `None`: it kept none."""
        return self._kept().get("settings")

    @property
    def played_hashes(self) -> dict[str, str] | None:
        """`hashes` as they were when the run in its directory began. `None`: it kept none."""
        return self._kept().get("inputs")

    def _kept(self) -> JsonObject:
        path = self.output_dir / _SETTINGS
        kept: JsonObject = json.loads(path.read_text()) if path.is_file() else {}
        return kept

    @property
    def seconds(self) -> float:
        """How long the process that finished it took."""
        return float((self.output_dir / _SECONDS).read_text())

    def prepare(self) -> None:
        """Make its directory ready for its start. What an earlier process left is removed, unless it goes on."""
        continues = self.goes_on and self.checkpoint is not None
        if not continues:
            shutil.rmtree(self.output_dir, ignore_errors=True)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / "trainer_state.json").unlink(missing_ok=True)
        if continues and self.played_settings is not None:
            return  # it keeps the hashes of what it began with
        kept = {"settings": self.settings, "inputs": self.hashes()}
        with durable.file(self.output_dir / _SETTINGS) as partial:
            partial.write_text(json.dumps(kept, indent=2) + "\n")

    def mark_finished(self, seconds: float) -> None:
        """Have it not played again."""
        with durable.file(self.output_dir / _SECONDS) as partial:
            partial.write_text(f"{seconds:.1f}\n")

    def last_lines(self, count: int = 15) -> list[str]:
        """The end of its process's output."""
        path = self.output_dir / LOG
        # A progress bar writes its states over each other.
        text = path.read_text(errors="replace").replace("\r", "\n") if path.is_file() else ""
        return [line for line in text.splitlines() if line.strip()][-count:]


def settings_in(command: str) -> str:
    """A run's command without the place it writes to, which comes last."""
    return command.partition(" --output_dir ")[0]


def changed_inputs(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """The names under which two runs read different things; those of a run that kept no hashes are unknown."""
    return [] if before is None else sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def hash_of(path: Path) -> str:
    """A hash of a file, of the content of a YAML file whatever its form, or of the files in a directory."""
    digest = hashlib.sha256()
    if path.suffix in (".yaml", ".yml"):
        digest.update(json.dumps(yaml.safe_load(path.read_text()), sort_keys=True, default=str).encode())
        return digest.hexdigest()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
