"""
The figures of the study, from what its record holds.

Colours say how credit is assigned, the same in every figure. Names stand at their curves, so that nobody has to match
a legend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from common.intervals import Interval

from trl_steppo.report.plots import draw_curve
from trl_steppo.report.statistics import Curve

from .tasks import ROOMS_AXES

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of what draws
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_steppo.types import JsonObject

_INK, _FAINT = "#1f2328", "#d8dee4"
_BLUE, _ORANGE, _GREEN, _GREY = "#0969da", "#cf5c00", "#1a7f37", "#6e7781"


@dataclass(frozen=True)
class Style:
    """
    How a method is drawn.

    Args:
        name (`str`):
            What people call it.
        colour (`str`):
            The colour of its kind.
        is_main (`bool`, *optional*, defaults to `True`):
            Whether its curve is thick, with its interval and its name. Others are thin lines.
        is_dashed (`bool`, *optional*, defaults to `False`):
            Whether its curve is dashed.
    """

    name: str
    colour: str
    is_main: bool = True
    is_dashed: bool = False


METHOD_STYLES = {
    "steppo": Style("StepPO", _BLUE),
    "without_step_ratio": Style("StepPO without step ratio", _BLUE, is_main=False),
    "steppo_lam_1": Style("StepPO with λ = 1", _BLUE, is_main=False),
    "token_ppo": Style("token PPO, same γ, λ", _ORANGE),
    "without_step_gae": Style("StepPO without step GAE", _ORANGE, is_main=False),
    "without_both": Style("StepPO without both", _ORANGE, is_main=False),
    "token_ppo_lam_1": Style("token PPO with λ = 1", _ORANGE, is_main=False),
    "token_ppo_gamma_lam_1": Style("token PPO, γ = λ = 1", _GREEN),
    "grpo": Style("GRPO", _GREY, is_main=False),
    "rloo": Style("RLOO", _GREY, is_main=False),
    "gigpo": Style("GiGPO", _GREY, is_main=False),
    "reinforce_plus_plus": Style("REINFORCE++", _GREY, is_main=False),
}
"""In the order in which they are listed: by how credit is assigned."""

_KINDS = {
    _BLUE: "credit of steps, γλ = 0.94",
    _ORANGE: "credit of tokens, γλ = 0.94",
    _GREEN: "credit of tokens, not discounted",
    _GREY: "no critic",
}


def draw(figures: JsonObject, directory: Path) -> None:
    """An image for each task, and one of the rooms' axes."""
    for name, of_task in figures.items():
        plot_task(directory / f"{name}.png", of_task, METHOD_STYLES, _KINDS)
    axes = {
        label: {value: figures[task.name]["summaries"] for value, task in by_value.items() if task.name in figures}
        for label, by_value in ROOMS_AXES.items()
    }
    if all(axes.values()):
        plot_axes(directory / "rooms.png", axes)


def plot_task(path: Path, figures: JsonObject, styles: Mapping[str, Style], kinds: Mapping[str, str]) -> None:
    """
    Learning curves with their intervals, and the final scores.

    Args:
        path (`Path`):
            The image.
        figures (`JsonObject`):
            Of one task: `curves` and `summaries`.
        styles (`Mapping[str, Style]`):
            How each method is drawn, in the order in which they are listed.
        kinds (`Mapping[str, str]`):
            What each colour says, where it is used.
    """
    shown = {method: style for method, style in styles.items() if method in figures["curves"]}
    figure, (curves, finals) = pyplot.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained")
    _plot_curves(curves, figures["curves"], shown)
    used = [colour for colour in kinds if any(style.colour == colour for style in shown.values())]
    for number, colour in enumerate(used):
        place = (0.02, 0.98 - 0.065 * number)
        curves.text(*place, kinds[colour], color=colour, fontsize=10, va="top", transform=curves.transAxes)
    _plot_finals(finals, figures["summaries"], shown)
    _save(figure, path)


def plot_axes(path: Path, axes: Mapping[str, Mapping[int, JsonObject]]) -> None:
    """
    Final score and area under the curve as functions of what was varied.

    Args:
        path (`Path`):
            The image.
        axes (`Mapping[str, Mapping[int, JsonObject]]`):
            For each axis, by its label, the summaries of the methods at each of its values.
    """
    measures = {"area": "Area under the learning curve", "final_greedy": "Greedy score at the end"}
    figure, grid = pyplot.subplots(
        len(measures), len(axes), figsize=(5.5 * len(axes), 7), sharey=True, squeeze=False, layout="constrained"
    )
    for row, (measure, title) in zip(grid, measures.items(), strict=True):
        for axis, (varied, by_value) in zip(row, axes.items(), strict=True):
            _plot_axis(axis, measure, by_value)
            axis.set_xlabel(varied, color=_INK)
            axis.set_title(title, loc="left", fontsize=11, color=_INK)
    for number, style in enumerate(style for method, style in METHOD_STYLES.items() if style.is_main):
        place = (0.42, 0.05 + 0.075 * (2 - number))
        grid[-1][0].text(*place, style.name, color=style.colour, fontsize=11, transform=grid[-1][0].transAxes)
    _save(figure, path)


# -- parts ------------------------------------------------------------------------------------------------------------


def _plot_curves(axis: Axes, curves: JsonObject, styles: Mapping[str, Style]) -> None:
    """The score of each method over its episodes, with its name at the end of the curve."""
    last, ends = 0, {}
    for method, style in styles.items():
        low, middle, high = _columns(curves[method]["sampled"])
        episodes = np.asarray(curves[method]["episodes"])
        unknown = np.full_like(middle, np.nan)
        band = (low, high) if style.is_main else (unknown, unknown)
        draw_curve(
            axis,
            Curve(episodes, middle, *band, updates_per_point=1),
            style.colour,
            alpha=0.15,
            linewidth=2.2 if style.is_main else 0.8,
            linestyle="--" if style.is_dashed else "-",
        )
        last = max(last, int(episodes[-1]))
        if style.is_main:
            ends[style.name] = (float(middle[-3:].mean()), style.colour)
    heights = _apart([height for height, _ in ends.values()], 0.1)
    for (name, (_, colour)), height in zip(ends.items(), heights, strict=True):
        axis.text(
            last * 1.015,
            height,
            name.replace(", ", ",\n", 1),
            color=colour,
            fontsize=10,
            va="center",
            fontweight="bold",
        )
    _tidy(axis, grid="y")
    axis.set(xlim=(0, last), ylim=(0, 1), xticks=range(0, last + 1, 500))
    axis.set_xlabel("episodes played", color=_INK)
    axis.set_title("While training: score of the sampled episodes", loc="left", fontsize=11, color=_INK)


def _plot_finals(axis: Axes, summaries: JsonObject, styles: Mapping[str, Style]) -> None:
    """The final scores of each method with their intervals, a line a method."""
    for number, (method, style) in enumerate(styles.items()):
        for name, aside, fill in (("final_sampled", -0.1, "white"), ("final_greedy", 0.1, style.colour)):
            low, middle, high = _columns([summaries[method][name]])
            axis.errorbar(
                middle,
                [number + aside],
                xerr=[middle - low, high - middle],
                color=style.colour,
                marker="o",
                markersize=6.5,
                markerfacecolor=fill,
                elinewidth=1.4,
                linestyle="none",
            )
    _tidy(axis, grid="x")
    axis.set_yticks(range(len(styles)), [style.name for style in styles.values()], fontsize=10)
    for label, style in zip(axis.get_yticklabels(), styles.values(), strict=True):
        label.set_color(style.colour)
    axis.set(xlim=(0, 1.03), ylim=(len(styles) - 0.4, -0.6))
    axis.set_title("At the end: ○ sampled, ● greedy", loc="left", fontsize=11, color=_INK)


def _plot_axis(axis: Axes, measure: str, by_value: Mapping[int, JsonObject]) -> None:
    """A measure of each method over one axis of the rooms; points at one value stand side by side."""
    methods = [method for method in METHOD_STYLES if any(method in summaries for summaries in by_value.values())]
    for number, method in enumerate(methods):
        style = METHOD_STYLES[method]
        values = [value for value, summaries in by_value.items() if method in summaries]
        low, middle, high = _columns([by_value[value][method][measure] for value in values])
        aside = (max(by_value) / min(by_value)) ** (0.013 * (number - (len(methods) - 1) / 2))
        axis.errorbar(
            [value * aside for value in values],
            middle,
            yerr=[middle - low, high - middle],
            color=style.colour,
            marker="o",
            linewidth=1.8,
            elinewidth=1.2,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(by_value), [str(value) for value in by_value])
    axis.minorticks_off()
    axis.set_ylim(-0.03, 1.05)
    _tidy(axis, grid="y")


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights that are at least `gap` apart, in their order, around where they were."""
    order = np.argsort(heights)
    wanted = np.asarray(heights, dtype=float)[order]
    placed = wanted.copy()
    for number in range(1, len(placed)):
        placed[number] = max(placed[number], placed[number - 1] + gap)
    placed -= (placed - wanted).mean() if len(placed) else 0.0
    moved = np.empty_like(placed)
    moved[order] = placed
    return [float(height) for height in moved]


def _tidy(axis: Axes, grid: str) -> None:
    """No frame, faint lines of one direction."""
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.grid(axis=grid, color=_FAINT, linewidth=0.7)  # type: ignore[arg-type]  # "x" or "y"
    axis.set_axisbelow(True)
    axis.tick_params(colors=_INK, length=0, labelsize=9.5)


def _columns(intervals: Sequence[Interval]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Low, middle and high; without an interval they are the same."""
    rows = [[middle if bound is None else bound for bound in (low, middle, high)] for low, middle, high in intervals]
    low, middle, high = np.asarray(rows, dtype=float).T
    return low, middle, high


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
