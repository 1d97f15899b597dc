"""Reads what runs wrote into their `output_dir`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..types import JsonObject


@dataclass(frozen=True)
class Run:
    """
    A run, finished or not.

    Args:
        directory (`Path`):
            Its `output_dir`.
        name (`str`):
            A short name, different from that of every other run.
        history (`list[dict]`):
            Its logs, in order.
        settings (`dict`, *optional*):
            Its `StepPOConfig`; `None` if it wrote none.
        episode_files (`dict[int, Path]`, *optional*):
            Its logged episodes, by update.
        is_finished (`bool`, *optional*, defaults to `True`):
            Whether it ended regularly. If not, its history is that of its last checkpoint.
    """

    directory: Path
    name: str
    history: list[JsonObject]
    settings: JsonObject | None = None
    episode_files: dict[int, Path] = field(default_factory=dict)
    is_finished: bool = True

    @property
    def seed(self) -> int | None:
        """The seed in its settings."""
        seed: int | None = None if self.settings is None else self.settings.get("seed")
        return seed

    @property
    def metrics(self) -> set[str]:
        """The names of the metrics that it logged."""
        return {name for logs in self.history for name in logs}

    @property
    def num_updates(self) -> int:
        """Number of the last update that it logged."""
        return int(max(logs["step"] for logs in self.history))

    @property
    def episodes_per_update(self) -> float:
        """Mean number of episodes per update."""
        last = next(logs for logs in reversed(self.history) if "episode" in logs)
        return float(last["episode"] / last["step"])

    def series(self, metric: str) -> dict[int, float]:
        """A metric by update, without values that are not finite."""
        values = {logs["step"]: float(logs[metric]) for logs in self.history if metric in logs}
        return {step: value for step, value in values.items() if math.isfinite(value)}


def load_runs(directories: Sequence[str | Path]) -> list[Run]:
    """
    Read several runs.

    Args:
        directories (`Sequence[str | Path]`):
            The `output_dir` of each run.

    Raises:
        DataError: If one of them is not a run that logged an update, or is named twice.
    """
    paths = [Path(directory) for directory in directories]
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise DataError(f"{path} is named {resolved.count(path)} times; name every run once")
    names = short_names(resolved)
    return [_load(path, name) for path, name in zip(paths, names, strict=True)]


def _load(directory: Path, name: str) -> Run:
    file = directory / "trainer_state.json"
    is_finished = file.is_file()
    if not is_finished:
        file = _last_checkpoint(directory) / "trainer_state.json"
    state = _read_json(file)
    history = [logs for logs in state.get("log_history") or [] if "step" in logs]
    if not any("episode" in logs for logs in history):
        raise DataError(
            f"{file} holds no update: the run ended before its first log; train longer, or set `logging_steps` to 1"
        )
    settings_file = directory / "steppo_config.json"
    settings = _read_json(settings_file) if settings_file.is_file() else None
    run = Run(directory, name, history, settings, is_finished=is_finished)
    run.episode_files.update(_episode_files(run))
    return run


def _last_checkpoint(directory: Path) -> Path:
    """The newest checkpoint of an unfinished run."""
    paths = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    numbered = {int(number): path for path in paths if (number := path.name.removeprefix("checkpoint-")).isdecimal()}
    if not numbered:
        raise DataError(
            f"{directory} has no trainer_state.json, so it is not the `output_dir` of a finished run, and no "
            "checkpoint; a run writes the one when it ends, and the other every `save_steps` updates"
        )
    return numbered[max(numbered)]


def _read_json(file: Path) -> JsonObject:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}; a run writes a mapping there")
    return content


def _episode_files(run: Run) -> Iterator[tuple[int, Path]]:
    """The logs of this run's episodes. An earlier run in the same directory may have left further files."""
    if run.settings is not None and not run.settings.get("log_episodes"):
        return
    for path in sorted((run.directory / "episodes").glob("update_*.parquet")):
        number = path.stem.removeprefix("update_")
        if number.isdecimal() and int(number) <= run.num_updates:
            yield int(number), path


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to distinguish all paths."""
    longest = max((len(path.parts) for path in paths), default=1)
    for count in range(1, longest):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
