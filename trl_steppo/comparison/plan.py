"""The runs of all arms and seeds of a script."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ..errors import ConfigurationError
from ..recipes import find_recipe
from .runs import PlannedRun, changed_inputs

_OURS = ("seed", "run_name", "output_dir", "resume_from_checkpoint")  # flags that the plan sets
_NAME = re.compile(r"[^\s./\\-][^/\\]*")


@dataclass(frozen=True)
class Arm:
    """
    What is compared: a name, and the settings that make it.

    Args:
        name (`str`):
            Its name in the report, and the name of its directory.
        settings (`Mapping[str, tuple[str, ...]]`):
            The words after each flag, by the flag's name without dashes.
    """

    name: str
    settings: Mapping[str, tuple[str, ...]]

    @property
    def words(self) -> list[str]:
        """Its flags."""
        return [word for name, values in self.settings.items() for word in (f"--{name}", *values)]


@dataclass(frozen=True)
class ArmRun(PlannedRun):
    """A run of an arm with a seed."""

    arm: str = field(kw_only=True)
    seed: int = field(kw_only=True)

    @property
    def script(self) -> Path:
        """The script that it starts."""
        return Path(self.arguments[0])

    @property
    def has_former_script(self) -> bool:
        """Whether its directory holds what another version of the script made: all of a run, or a checkpoint."""
        name = self.name_of(self.script)
        then = (self.played_hashes or {}).get(name)
        changed = then is not None and then != self.hashes()[name]
        return changed and (self.is_finished or self.checkpoint is not None)

    @property
    def label(self) -> str:
        """What it is called on the screen."""
        return f"{self.arm}, seed {self.seed}"


def parse_arm(words: Sequence[str]) -> Arm:
    """
    An arm from its words on the command line: a name, and `key=value` for each setting. A list of values is written
    as in JSON: `reward_weights=[1,0.5]`.
    """
    name, *assignments = words
    if not _NAME.fullmatch(name) or "=" in name:
        raise ConfigurationError(
            f"--arm {name}: an arm begins with its name, which is that of its directory, too: --arm NAME key=value"
        )
    settings: dict[str, tuple[str, ...]] = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        key = key.lstrip("-").replace("-", "_")
        if not sign or not key:
            raise ConfigurationError(f"arm {name}: {assignment!r} is not a setting; write key=value")
        if key in settings:
            raise ConfigurationError(f"arm {name}: `{key}` is set twice")
        settings[key] = _values(value)
    return Arm(name, settings)


def refuse_reserved(names: Iterable[str], where: str) -> None:
    """Raise if settings are among those that the plan makes itself."""
    for name in names:
        if name in _OURS:
            cure = "--seeds" if name == "seed" else "--output_dir" if name == "output_dir" else "the arms' names"
            raise ConfigurationError(f"{where}: `{name}` is set for each run, from {cure}; leave it out")


def names_of_flags(words: Sequence[str]) -> list[str]:
    """The names of the flags among a script's arguments, without dashes."""
    flags = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
    return [name.replace("-", "_") for name in flags]


def plan_runs(
    script: str,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    directory: Path,
    *,
    flags: Sequence[str] = (),
    config: str | None = None,
    launcher: Sequence[str] = (sys.executable,),
) -> list[ArmRun]:
    """
    Plan every arm with every seed, seed by seed, so that arms can be compared before all seeds are done.

    Args:
        script (`str`):
            The script.
        arms (`Sequence[Arm]`), seeds (`Sequence[int]`):
            What is compared, and the seeds of each.
        directory (`Path`):
            A run writes to `ARM/seed_N` in it.
        flags (`Sequence[str]`, *optional*):
            The script's arguments in all runs. An arm's settings override them.
        config (`str`, *optional*):
            The script's `--config`.
        launcher (`Sequence[str]`, *optional*, defaults to this Python):
            The command that starts the script.

    Raises:
        ConfigurationError: If arms have one name, or a setting is that of the plan.
    """
    names = [arm.name for arm in arms]
    for kind, values in (("arms", names), ("seeds", [str(seed) for seed in seeds])):
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ConfigurationError(f"two {kind} are {', '.join(repeated)}; each is played once")
    refuse_reserved(names_of_flags(flags), "after --")
    for arm in arms:
        refuse_reserved(arm.settings, f"arm {arm.name}")
    first = () if config is None else ("--config", config)
    return [
        ArmRun(
            arguments=(
                *(script, *first, *flags, *arm.words),
                *("--seed", str(seed), "--run_name", arm.name),
                *("--output_dir", str(directory / arm.name / f"seed_{seed}")),
            ),
            output_dir=directory / arm.name / f"seed_{seed}",
            inputs=(Path(script), *_configs((*first, *flags, *arm.words))),
            launcher=tuple(launcher),
            goes_on=True,
            arm=arm.name,
            seed=seed,
        )
        for seed in seeds
        for arm in arms
    ]


def refuse_others(runs: Iterable[ArmRun]) -> None:
    """
    Raise if a run's directory holds what this run is not: a run of other settings that is finished or has a
    checkpoint, or files that no comparison has written.
    """
    for run in runs:
        if not run.output_dir.is_dir() or not any(run.output_dir.iterdir()):
            continue
        if run.played_settings is None:
            raise ConfigurationError(
                f"{run.output_dir} holds files that no comparison has written; remove them, or name another "
                "--output_dir"
            )
        differences = differences_of(run)
        if differences and (run.is_finished or run.checkpoint is not None):
            raise ConfigurationError(
                f"{run.output_dir} holds a run of other settings; remove it, or name another --output_dir. "
                f"What differs: {'; '.join(differences)}"
            )


def note_former_script(runs: Iterable[ArmRun]) -> str | None:
    """A warning that some runs were made by an earlier version of the script; `None` if none was."""
    former = [run for run in runs if run.has_former_script]
    if not former:
        return None
    directories = "\n".join(f"  {run.output_dir}" for run in former)
    return (
        f"warning: {former[0].script} has changed since these runs began. Their results stay, and stand next to those "
        f"of the changed script:\n{directories}\nTo play them again, remove these directories."
    )


def differences_of(run: ArmRun) -> list[str]:
    """In what a run differs from the one in its directory, in words. A script that has changed does not count."""
    there, here = _by_flag(run.played_settings or ""), _by_flag(run.settings)
    changed = [
        f"{name} is {there.get(name, 'not set')} there, and {here.get(name, 'not set')} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    inputs = changed_inputs(run.played_hashes, run.hashes())
    return changed + [f"{name} has changed since" for name in inputs if name != run.name_of(run.script)]


def _by_flag(command: str) -> dict[str, str]:
    """The words of a command by flag. The last of equal flags counts, as for argparse."""
    by_flag: dict[str, list[str]] = {"the script": []}
    words = by_flag["the script"]
    for word in shlex.split(command):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            words = by_flag[name] = [value] if sign else []
        else:
            words.append(word)
    return {name: " ".join(of_flag) for name, of_flag in by_flag.items()}


def _values(value: str) -> tuple[str, ...]:
    """The words of a value: one, or those of a JSON list."""
    if value.startswith("["):
        try:
            listed = json.loads(value)
        except ValueError:
            return (value,)
        if isinstance(listed, list) and all(isinstance(entry, str | int | float) for entry in listed):
            return tuple(entry if isinstance(entry, str) else json.dumps(entry) for entry in listed)
    return (value,)


def _configs(words: Sequence[str]) -> tuple[Path, ...]:
    """The files that the flags `--config` name."""
    given = [after for word, after in pairwise(words) if word == "--config"]
    given += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    found = []
    for name in given:
        with suppress(ConfigurationError):  # which the script raises, too
            found.append(find_recipe(name))
    return tuple(found)
