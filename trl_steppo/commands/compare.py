"""`trl-steppo compare`: a script's settings against each other, with several seeds of each."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, StepPOError
from ..extras import install_command

if TYPE_CHECKING:
    from ..comparison.plan import Arm, ArmRun
    from ..report.statistics import Estimate

HELP = "train a script with several settings and seeds, and report on them"
EXAMPLES = """\
  trl-steppo compare train.py --seeds 1 2 3 --arm StepPO --arm PPO advantage_estimator=token_gae
  trl-steppo compare train.py --seeds 1 2 --arm fast learning_rate=1e-4 --arm slow learning_rate=1e-5 --dry_run
  trl-steppo compare train.py --seeds 1 2 --arm a --arm b gamma=0.9 --parallel 2 -- --total_episodes 512
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.usage = (
        "trl-steppo compare SCRIPT --seeds SEED [SEED ...] --arm NAME [key=value ...] [--arm ...] [options] "
        "[-- flags of the script]"
    )
    parser.description = (
        "Train every arm with every seed, each run in a process of its own, as many at a time as there are GPUs (or "
        "cores), and write a report. The same command again goes on where it was. SCRIPT takes the settings of "
        "StepPOConfig as flags; what stands after -- is given to all of its runs."
    )
    parser.add_argument("script", metavar="SCRIPT", help="a training script")
    parser.add_argument("--seeds", nargs="+", type=int, required=True, metavar="SEED", help="seeds of each arm")
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "key=value"),
        help="a name, and the settings that make this arm; once for each arm",
    )
    parser.add_argument("--config", metavar="FILE", help="the script's --config, in all runs")
    parser.add_argument(
        "--output_dir", metavar="DIR", help="runs go to DIR/NAME/seed_N (default: runs/ and the script's name)"
    )
    parser.add_argument("--output", metavar="FILE.html", help="the report (default: report.html in DIR)")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs at a time (default: GPUs, or else cores)")
    parser.add_argument(
        "--launcher", metavar="COMMAND", help='what starts the script, as in "accelerate launch" (default: python)'
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and start none")


def run(args: argparse.Namespace) -> None:
    """Play the runs that are not finished, write the report, and print the table of final figures."""
    from ..comparison.plan import names_of_flags, note_former_script, parse_arm, plan_runs, refuse_others
    from ..comparison.slots import slots_of, usable_gpus

    directory = Path(args.output_dir or Path("runs") / Path(args.script).stem)
    if not Path(args.script).is_file():
        raise ConfigurationError(f"there is no script {args.script}")
    arms = [parse_arm(words) for words in args.arm]
    runs = plan_runs(
        args.script,
        arms,
        args.seeds,
        directory,
        flags=args.passed_on,
        config=args.config,
        launcher=shlex.split(args.launcher) if args.launcher else [sys.executable],
    )
    _check_settings(args.script, arms, names_of_flags(args.passed_on))
    slots = slots_of(len(runs), parallel=args.parallel, gpus=usable_gpus())
    refuse_others(runs)
    warning = note_former_script(runs)
    if warning is not None:
        print(warning, file=sys.stderr)
    if args.dry_run:
        _print_commands(runs, slots)
        return
    _need_report()
    start = time.perf_counter()
    try:
        failed = _play(runs, directory, slots)
    except KeyboardInterrupt:
        print(_how_to_go_on(runs))
        sys.exit(130)
    done = sum(run.is_finished for run in runs)
    print(f"{done} of {len(runs)} runs are finished, {(time.perf_counter() - start) / 60:.1f} min")
    _report(runs, Path(args.output or directory / "report.html"))
    if failed:
        logs = "\n".join(f"  {run.label}: {run.output_dir / 'log.txt'}" for run in failed)
        raise StepPOError(f"{len(failed)} of {len(runs)} runs failed; the same command again plays these:\n{logs}")


def _check_settings(script: str, arms: Sequence[Arm], passed_on: Sequence[str]) -> None:
    """Raise if the script does not know a setting."""
    from ..comparison.flags import flags_of, refuse_unknown

    flags = flags_of(Path(script))
    for arm in arms:
        refuse_unknown(arm.settings, flags, f"arm {arm.name}")
    refuse_unknown(passed_on, flags, "after --")


def _print_commands(runs: Sequence[ArmRun], slots: Sequence[dict[str, str]]) -> None:
    for run in runs:
        note = "  # finished" if run.is_finished else ""
        print(f"{run.command}{note}")
    shares = dict.fromkeys(" ".join(f"{name}={value}" for name, value in slot.items()) for slot in slots)
    print(f"# {len(runs)} runs, {len(slots)} at a time, with {'; '.join(shares)}")


def _need_report() -> None:
    """Raise now, and not after hours of training, if there can be no report."""
    missing = [name for name in ("jinja2", "matplotlib", "scipy") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"a comparison ends in a report, which needs the extra `report`: {install_command('report')} "
            f"({', '.join(missing)} cannot be imported)"
        )


def _play(runs: Sequence[ArmRun], directory: Path, slots: Sequence[dict[str, str]]) -> list[ArmRun]:
    from .. import durable
    from ..comparison.processes import play
    from ..comparison.screen import Screen

    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = durable.Lock(directory / ".compare.lock")
    except durable.LockedError as error:
        raise ConfigurationError(
            f"{directory} belongs to a comparison that is going on ({error.holder}); wait for it, or name another "
            "--output_dir"
        ) from error
    try:
        with Screen(runs) as screen:
            return play(runs, slots, screen.change)
    finally:
        lock.close()


def _how_to_go_on(runs: Sequence[ArmRun]) -> str:
    finished = sum(run.is_finished for run in runs)
    begun = [run for run in runs if run.played_settings is not None and not run.is_finished]
    saved = sum(run.checkpoint is not None for run in begun)
    lines = [f"stopped; the same command again goes on: {finished} of {len(runs)} runs are finished"]
    if saved:
        lines.append(f"{saved} go on from their last checkpoints")
    if saved < len(begun):
        lines.append(
            f"{len(begun) - saved} have no checkpoint and start again (with -- --save_strategy steps, a run that is "
            "stopped saves one)"
        )
    return ", ".join(lines)


def _report(runs: Sequence[ArmRun], output: Path) -> None:
    """Write the report of all runs that have logged an update, and print the figures of their ends."""
    from ..report import write_report
    from ..report.find import gather

    arms: dict[str, list[Path]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run.output_dir)
    readable = gather([], arms, leaves_out=True)
    if not readable.runs:
        return
    directories = {run.directory for run in readable.runs}
    arms = {arm: [path for path in paths if path in directories] for arm, paths in arms.items()}
    print_figures(arms)
    print(f"report: {write_report([], output, methods=arms)[0]}")


def print_figures(arms: Mapping[str, Sequence[Path]]) -> None:
    """Print the final figures of some arms, from their runs' directories: as many columns as have room."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..episodes.printing import plain
    from ..report.figures import final_figures, number
    from ..report.methods import group_runs
    from ..report.runs import load_runs

    names = {directory.resolve(): arm for arm, directories in arms.items() for directory in directories}
    methods = group_runs(load_runs(list(names)), names)
    figures = final_figures(methods)
    columns = [
        ["arm", *(method.name for method in methods)],
        ["runs", *(str(len(method.runs)) for method in methods)],
        ["episodes", *(number(episodes) for episodes in figures.episodes)],
    ]
    for index, title in enumerate(figures.columns):
        columns.append([title.replace(", ", ",\n"), *(_with_interval(row[index]) for row in figures.rows)])
    console = Console()
    table = Table(title="Final figures, and their range or interval over runs", title_justify="left", box=SIMPLE_HEAD)
    width = 1
    for index, (title, *_) in enumerate(columns):
        width += 2 + max(len(line) for cell in columns[index] for line in cell.split("\n"))
        if index and width > console.width:
            columns = columns[:index]
            break
        table.add_column(plain(title), justify="right" if index else "left", overflow="fold")
    for cells in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*map(plain, cells))
    console.print(table)


def _with_interval(value: Estimate | None) -> str:
    from ..report.figures import number

    if value is None or value.low is None:
        return number(None if value is None else value.center)
    return f"{number(value.center)}\n{number(value.low)} to {number(value.high)}"
