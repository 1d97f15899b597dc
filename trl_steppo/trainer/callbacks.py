"""Output of a run on the terminal: a progress bar with one line for each log, and tables of sampled episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from ..types import Episode, TokenIds

_SHORT_NAMES = {  # of the metrics in a summary line
    "env/exact_match": "em",
    "env/reward": "reward",
    "env/episode_steps": "steps",
    "env/failed_episodes": "failed",
    "policy/approxkl_avg": "kl",
    "policy/entropy_avg": "entropy",
    "critic/explained_variance": "explained_var",
    "perf/rollout_s": "rollout_s",
    "perf/train_s": "train_s",
}
_MAX_CELL_LENGTH = 400


class StepPOProgressCallback(ProgressCallback):
    """A progress bar over updates that shows the essential metrics in one line; trackers get all of them."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:  # the run's times, after its last line
            return
        line = summary_line(state.global_step, logs)
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line)


def close_progress_bars(callbacks: Sequence[object]) -> None:
    """Close the progress bars of a run, or of an evaluation, that has ended with an exception."""
    for callback in callbacks:
        if isinstance(callback, ProgressCallback):
            for name in ("training_bar", "prediction_bar"):
                bar = getattr(callback, name, None)
                if bar is not None:
                    bar.close()
                    setattr(callback, name, None)


def summary_line(update: int, logs: dict[str, float]) -> str:
    """The essential metrics of one log, in one line."""
    if any(name.startswith("eval_") for name in logs):
        shown = {
            name.removeprefix("eval_"): value
            for name, value in logs.items()
            if name.startswith("eval_") and name not in ("eval_runtime", "eval_samples_per_second")
        }
        head = "evaluation"
    else:
        shown = {short: logs[name] for name, short in _SHORT_NAMES.items() if name in logs}
        head = f"{logs.get('episode', 0):.0f} episodes"
    return f"update {update} | {head} | " + "  ".join(f"{name} {value:.3g}" for name, value in shown.items())


def print_episodes(episodes: Sequence[Episode], decode: Callable[[TokenIds], str], title: str) -> None:
    """
    Print a table of episodes with one row per step. Values that reward functions logged have columns of their own.

    Args:
        episodes (`Sequence[Episode]`):
            The episodes.
        decode (`Callable`):
            Converts token ids to text.
        title (`str`):
            Title of the table.
    """
    table = Table(title=title, show_lines=True)
    logged = dict.fromkeys(name for episode in episodes for name in episode.logged)
    for column in ("episode", "step", "read", "wrote", "reward", *logged):
        table.add_column(Text(column))
    for episode in episodes:
        seen = 0
        for step in episode.steps:
            read = decode(step.prompt_ids[seen:])
            table.add_row(
                episode.episode_id if step.step_index == 0 else "",
                str(step.step_index),
                _cell(read),
                _cell(decode(step.response_ids)),
                f"{step.reward:.3g}",
                *(_cell(str(episode.logged.get(name, ""))) for name in (logged if step is episode.steps[-1] else ())),
            )
            seen = len(step.prompt_ids) + len(step.response_ids)
        if episode.error is not None:
            table.add_row(episode.episode_id, "", "", _cell(episode.error), "failed")
    Console().print(table)


def _cell(text: str) -> Text:
    """Text without markup, and without its middle if it is long."""
    if len(text) > _MAX_CELL_LENGTH:
        text = f"{text[: _MAX_CELL_LENGTH // 2]} ... {text[-_MAX_CELL_LENGTH // 2 :]}"
    return Text(text.strip())
