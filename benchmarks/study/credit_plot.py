"""The picture of the idea: a bar for each token of an episode, as high as its credit."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import accumulate
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of what draws
from matplotlib.axes import Axes

_GAP = 6  # tokens' widths between two responses, where an observation stands
_WIDTH, _HEIGHT = 7.0, 3.9  # inches: 700 pixels wide on a page


class Theme(Enum):
    """Colours for light pages and for dark ones: background, text, faint lines, tokens, steps."""

    LIGHT = ("#ffffff", "#1f2328", "#d1d9e0", "#bf5b00", "#0969da")
    DARK = ("#0d1117", "#e6edf3", "#3d444d", "#f0883e", "#4493f8")


def plot_credit(
    directory: Path,
    headlines: Sequence[str],
    by_tokens: Sequence[Sequence[float]],
    by_steps: Sequence[float],
    theme: Theme,
) -> Path:
    """
    Draw the credit of tokens above the credit of steps.

    Args:
        directory (`Path`):
            Where the image goes: `credit_light.png` or `credit_dark.png`.
        headlines (`Sequence[str]`):
            What the agent does in each step.
        by_tokens (`Sequence[Sequence[float]]`):
            For each step, the credit of each token.
        by_steps (`Sequence[float]`):
            The credit of each step.
        theme ([`Theme`]):
            The colours.

    Returns:
        `Path`: The image.
    """
    background, ink, faint, token_colour, step_colour = theme.value
    lengths = [len(tokens) for tokens in by_tokens]
    starts = [end + number * _GAP for number, end in enumerate(accumulate(lengths, initial=0))][:-1]
    figure, axes = pyplot.subplots(
        2, 1, figsize=(_WIDTH, _HEIGHT), sharex=True, sharey=True, layout="constrained", facecolor=background
    )
    of_steps = [[credit] * length for credit, length in zip(by_steps, lengths, strict=True)]
    rows = (
        (by_tokens, token_colour, "PPO, credit of tokens: it fades on its way back from the reward"),
        (of_steps, step_colour, "StepPO, credit of steps: all tokens of a response have the same"),
    )
    for axis, (credit, colour, title) in zip(axes, rows, strict=True):
        for start, values in zip(starts, credit, strict=True):
            axis.bar(range(start, start + len(values)), values, width=0.8, color=colour)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=colour)
        _strip(axis, ink, faint, background)
    label = {"fontsize": 9.5, "color": ink, "textcoords": "offset points"}
    for start, height in zip(starts, by_steps, strict=True):
        axes[1].annotate(f"{height:.2f}", (start, height), xytext=(0, 3), **label)
    first, last = by_tokens[0][0], by_tokens[-1][-1]
    end = starts[-1] + lengths[-1]
    axes[0].annotate(f"first token: {first:.2f}", (starts[0], max(by_tokens[0][:12])), xytext=(0, 3), **label)
    axes[0].annotate(f"last token: {last:.2f}", (end, last), xytext=(0, 3), ha="right", **label)
    for axis in axes:
        axis.set_xlim(-2, end + 12)
        axis.annotate("reward\n1", (end + 6, 0.02), xytext=(0, 0), ha="center", va="bottom", **label)
    for start, number, headline in zip(starts, range(1, len(starts) + 1), headlines, strict=True):
        axes[1].annotate(f"step {number}: {headline}", (start, 0), xytext=(0, -5), va="top", **label)
    figure.supylabel("advantage", fontsize=9.5, color=ink)
    path = directory / f"credit_{theme.name.lower()}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor=background)
    pyplot.close(figure)
    return path


def _strip(axis: Axes, ink: str, faint: str, background: str) -> None:
    """Leave the base line and three numbers."""
    axis.set_facecolor(background)
    axis.set(ylim=(-0.08, 1.05), xticks=[], yticks=[0, 0.5, 1])
    axis.tick_params(colors=ink, length=0, labelsize=9)
    axis.grid(axis="y", color=faint, linewidth=0.6)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)
