"""Runs of an example script: each a process of its own, as a user starts it. A run that is there is not repeated."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from trl_steppo.assets import ROOMS_POLICY, locate_model
from trl_steppo.keeper import Keeper
from trl_steppo.recipes import find_recipe
from trl_steppo.types import JsonObject

from .record import current_commit

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCHER = ("-m", "accelerate.commands.launch", "--num_processes", "1")

_SECONDS = "seconds.txt"  # written when a run is over, and well: its mark
_COMMIT = "commit.txt"  # written when it starts: figures may be read under another
_SETTINGS = "run.json"  # written when it starts: another run may be asked for under the same name
_DEFAULT_CONFIGS = {"hotpotqa_steppo.py": "mini_wiki", "rooms_steppo.py": "rooms"}
_POLL_S = 0.2


@dataclass(frozen=True)
class Run:
    """
    A run, to do or done.

    Args:
        arguments (`tuple[str, ...]`):
            What Python is started with: a script and its flags.
        output_dir (`Path`):
            Where the run writes; its output goes to `log.txt` there.
        inputs (`tuple[Path, ...]`, *optional*):
            Files and directories that decide what it does, besides its arguments.
    """

    arguments: tuple[str, ...]
    output_dir: Path
    inputs: tuple[Path, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether a run is there that need not be played again, if it is this one (`refuse_other_runs`)."""
        return (self.output_dir / _SECONDS).is_file()

    @property
    def settings(self) -> str:
        """The command without the place it writes to, which comes last."""
        return settings_in(self.command)

    def hashes(self) -> dict[str, str]:
        """Of what its inputs hold now, by their names."""
        return {_name_of(path): _hash_of(path) for path in self.inputs}

    @property
    def played_settings(self) -> str | None:
        """`settings` as they were when the run in its directory began. `None`: it kept none."""
        return self._kept().get("settings")

    @property
    def played_hashes(self) -> dict[str, str] | None:
        """`hashes` as they were when the run in its directory began. `None`: it kept none."""
        return under_current_names(self._kept().get("inputs"))

    def _kept(self) -> JsonObject:
        path = self.output_dir / _SETTINGS
        kept: JsonObject = json.loads(path.read_text()) if path.is_file() else {}
        return kept

    @property
    def seconds(self) -> float:
        """What it took."""
        return float((self.output_dir / _SECONDS).read_text())

    @property
    def commit(self) -> str | None:
        """The code it ran."""
        path = self.output_dir / _COMMIT
        return (path.read_text().strip() or None) if path.is_file() else None

    @property
    def command(self) -> str:
        """What a user types for the same run."""
        here = os.path.relpath(Path(__file__).parents[2])
        return shlex.join(["python", *(argument.removeprefix(f"{here}/") for argument in self.arguments)])

    def history(self) -> list[JsonObject]:
        """Everything it logged."""
        logged: list[JsonObject] = json.loads((self.output_dir / "trainer_state.json").read_text())["log_history"]
        return logged


def example_run(
    script: str,
    output_dir: Path,
    flags: Mapping[str, object],
    *,
    switches: Sequence[str] = (),
    launcher: Sequence[str] = (),
) -> Run:
    """
    A run of one of the examples.

    Args:
        script (`str`):
            Its name in `examples/`.
        output_dir (`Path`):
            Where it writes.
        flags (`Mapping[str, object]`):
            Its flags, without the dashes.
        switches (`Sequence[str]`, *optional*):
            More of them, as on the command line.
        launcher (`Sequence[str]`, *optional*):
            What starts the script: nothing, or `LAUNCHER`.
    """
    given = [part for name, value in {**flags, "output_dir": output_dir}.items() for part in (f"--{name}", str(value))]
    arguments = (*launcher, os.path.relpath(EXAMPLES / script), *switches, *given)
    return Run(arguments, output_dir, _inputs_of(script, flags))


def settings_in(command: str) -> str:
    """A run's command without the place it writes to, which comes last. Recipes were named by their paths before."""
    return re.sub(r"\bexamples/configs/(\S+)\.yaml", r"\1", command.partition(" --output_dir ")[0])


def play(
    runs: Iterable[Run],
    *,
    parallel: int = 1,
    num_threads: int | None = None,
    on_finish: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """
    Play the runs that are not finished, in their order. One that was stopped half-way starts again; one that is
    finished, but of other settings, is refused: it is neither taken for this one nor thrown away.

    Args:
        runs (`Iterable[Run]`):
            The runs.
        parallel (`int`, *optional*, defaults to `1`):
            Maximum number at a time.
        num_threads (`int`, *optional*):
            Threads of each. `None`: as PyTorch chooses.
        on_finish (`Callable`, *optional*):
            Called with each run once it is finished, with those that were before, too.

    Returns:
        `list[Run]`: Those that failed. Their logs say why.
    """
    waiting = deque(runs)
    refuse_other_runs(waiting)
    playing: dict[Run, tuple[Keeper, subprocess.Popen[bytes], float]] = {}
    failed = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or playing:
            while waiting and len(playing) < parallel:
                run = waiting.popleft()
                if run.is_finished:
                    on_finish(run)
                else:
                    playing[run] = (*_start(run, num_threads), time.perf_counter())
            for run, (keeper, process, start) in list(playing.items()):
                if process.poll() is None:
                    continue
                keeper.end()
                del playing[run]
                if process.returncode == 0:
                    _mark_finished(run, time.perf_counter() - start)
                    on_finish(run)
                else:
                    failed.append(run)
            if playing:
                time.sleep(_POLL_S)
    finally:
        for keeper, _, _ in playing.values():
            keeper.end()
        for _, process, _ in playing.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def refuse_other_runs(runs: Iterable[Run]) -> None:
    """Raise if a directory holds a finished run that began with other settings, or other files, than this one has."""
    for run in runs:
        if run.is_finished and (run.played_settings, run.played_hashes) != (run.settings, run.hashes()):
            there = run.played_settings or "a run that kept no settings"
            changed = ", ".join(changed_inputs(run.played_hashes, run.hashes())) or "none that it knows of"
            raise SystemExit(
                f"{run.output_dir} holds a finished run of other settings; remove it, or name another --runs_dir\n"
                f"there: {there}\nhere:  {run.settings}\nfiles that have changed since: {changed}"
            )


def under_current_names(inputs: Mapping[str, str] | None) -> dict[str, str] | None:
    """The hashes that a run kept; policies and recipes, unchanged, had other directories in earlier versions."""
    if inputs is None:
        return None
    moved = (("trl_steppo/models/", "trl_steppo/assets/"), ("examples/configs/", "trl_steppo/recipes/"))
    return {functools.reduce(lambda name, move: name.replace(*move), moved, name): inputs[name] for name in inputs}


def changed_inputs(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """The names under which two runs read different things; those of a run that kept no hashes are unknown."""
    return [] if before is None else sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def refuse_failures(failed: Sequence[Run]) -> None:
    """Raise if a run failed, with where to look."""
    if failed:
        raise SystemExit("failed, see " + ", ".join(str(run.output_dir / "log.txt") for run in failed))


def updates_of(history: Iterable[JsonObject]) -> list[JsonObject]:
    """What each update logged; the last line of a run repeats some of its metrics and is none."""
    return [logs for logs in history if "perf/update_s" in logs]


def _start(run: Run, num_threads: int | None) -> tuple[Keeper, subprocess.Popen[bytes]]:
    """A run's process, which ends with what it has started, and with this process."""
    shutil.rmtree(run.output_dir, ignore_errors=True)
    run.output_dir.mkdir(parents=True)
    (run.output_dir / _COMMIT).write_text(f"{current_commit() or ''}\n")
    kept = {"settings": run.settings, "inputs": run.hashes()}
    (run.output_dir / _SETTINGS).write_text(json.dumps(kept, indent=2) + "\n")
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    keeper = Keeper([sys.executable, *run.arguments])
    with (run.output_dir / "log.txt").open("w") as log, keeper.starting() as descriptor:
        process = subprocess.Popen(
            keeper.command,
            env={**os.environ, "PYTHONWARNINGS": "ignore", **threads},
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[descriptor],
        )
    return keeper, process


def _mark_finished(run: Run, seconds: float) -> None:
    unfinished = run.output_dir / f"{_SECONDS}.part"
    unfinished.write_text(f"{seconds:.1f}\n")
    unfinished.replace(run.output_dir / _SECONDS)


def _inputs_of(script: str, flags: Mapping[str, object]) -> tuple[Path, ...]:
    """What an example reads: its configuration, and the policy and the rows where these are local."""
    config = find_recipe(str(flags.get("config", _DEFAULT_CONFIGS[script])))
    read = {**yaml.safe_load(config.read_text()), **flags}
    policy = locate_model(str(read["model_name_or_path"])) if "model_name_or_path" in read else ROOMS_POLICY
    local = (Path(path) for path in (policy, str(read.get("dataset_name", ""))) if path and Path(path).exists())
    return (config, *local)


def _name_of(path: Path) -> str:
    """Where it is in the repository, or as it was given."""
    root = EXAMPLES.parent
    return str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) else str(path)


def _hash_of(path: Path) -> str:
    """Of a configuration what it says, not how; of a directory its files."""
    digest = hashlib.sha256()
    if path.suffix == ".yaml":
        digest.update(json.dumps(yaml.safe_load(path.read_text()), sort_keys=True, default=str).encode())
        return digest.hexdigest()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
