"""The runs on the terminal while they play: a table that renews itself, or a line for each change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from ..episodes.printing import plain
from .plan import ArmRun
from .processes import State
from .progress import progress_of

_STYLES = {
    State.WAITING: "dim",
    State.RUNNING: "bold",
    State.STOPPING: "yellow",
    State.FINISHED: "green",
    State.FAILED: "bold red",
    State.STOPPED: "yellow",
}
# The order in which runs have the room of the terminal
_ORDER = (State.FAILED, State.RUNNING, State.STOPPING, State.STOPPED, State.WAITING, State.FINISHED)
_REFRESHES_PER_S = 1.0


class Screen:
    """
    Shows runs while they play.

    Args:
        runs (`Sequence[ArmRun]`):
            All runs, in the order of the table.
        console (`Console`, *optional*):
            Where to. On a terminal it is a table that renews itself; elsewhere a line for each change.
    """

    def __init__(self, runs: Sequence[ArmRun], console: Console | None = None) -> None:
        self._console = console or Console()
        self._states = dict.fromkeys(runs, State.WAITING)
        self._begun: dict[ArmRun, float] = {}
        self._ended: dict[ArmRun, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._table, refresh_per_second=_REFRESHES_PER_S, transient=False
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def change(self, run: ArmRun, state: State) -> None:
        """Note the new state of a run."""
        before, self._states[run] = self._states[run], state
        if state is State.RUNNING:
            self._begun[run] = time.monotonic()
        elif state is not State.STOPPING:
            self._ended[run] = time.monotonic()
        if self._live is not None:
            self._live.refresh()
        else:
            self._console.print(plain(self._line(run, state, before)), soft_wrap=True)
        if state is State.FAILED:
            self._show_log(run)

    def _line(self, run: ArmRun, state: State, before: State) -> str:
        if state is State.RUNNING:
            return f"{run.label}: started"
        if state is State.FINISHED and before is State.WAITING:
            return f"{run.label}: finished before"
        update, reward = _progress(run)
        return f"{run.label}: {state.value} after {self._minutes(run)} min, update {update}, reward {reward}"

    def _show_log(self, run: ArmRun) -> None:
        lines = "\n".join(f"    {line}" for line in run.last_lines())
        text = f"{run.label} failed; the end of {run.output_dir / 'log.txt'}:\n{lines}"
        self._console.print(plain(text), soft_wrap=True)

    def _minutes(self, run: ArmRun) -> str:
        begun = self._begun.get(run)
        return "" if begun is None else f"{(self._ended.get(run, time.monotonic()) - begun) / 60:.1f}"

    def _table(self) -> RenderableType:
        room = max(5, self._console.size.height - 7)
        runs = list(self._states)
        hidden: list[ArmRun] = []
        if len(runs) > room:
            ranked = sorted(runs, key=lambda run: _ORDER.index(self._states[run]))
            hidden = ranked[room:]
            runs = [run for run in runs if run in set(ranked[:room])]
        table = Table()
        for column in ("arm", "seed", "state", "update", "reward", "minutes"):
            table.add_column(column, justify="left" if column in ("arm", "state") else "right")
        for run in runs:
            state = self._states[run]
            update, reward = ("", "") if state is State.WAITING else _progress(run)
            style = _STYLES[state]
            table.add_row(plain(run.arm), str(run.seed), plain(state.value, style), update, reward, self._minutes(run))
        if not hidden:
            return table
        counts = [f"{n} {state.value}" for state in _ORDER if (n := sum(self._states[run] is state for run in hidden))]
        return Group(table, plain(f"and {', '.join(counts)}", "dim"))


def _progress(run: ArmRun) -> tuple[str, str]:
    """The last update and its reward, in words."""
    progress = progress_of(run.output_dir)
    if progress is None:
        return "–", "–"
    return str(progress.update), "–" if progress.reward is None else f"{progress.reward:.3g}"
