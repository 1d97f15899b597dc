"""The figures of the study, from what its record holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from common.intervals import Interval

from trl_steppo.report.plots import draw_curve
from trl_steppo.report.statistics import Curve

from .tasks import ROOMS_AXES

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of what draws
from matplotlib.figure import Figure

from trl_steppo.types import JsonObject


def draw(figures: JsonObject, directory: Path) -> None:
    """An image for each task, and one of the rooms' axes."""
    for name, of_task in figures.items():
        plot_task(directory / f"{name}.png", name, of_task)
    axes = {
        label: {value: figures[task.name]["summaries"] for value, task in by_value.items() if task.name in figures}
        for label, by_value in ROOMS_AXES.items()
    }
    if all(axes.values()):
        plot_axes(directory / "rooms.png", axes)


def plot_task(path: Path, title: str, figures: JsonObject) -> None:
    """
    Learning curves with their intervals, and the final scores.

    Args:
        path (`Path`):
            The image.
        title (`str`):
            Above it.
        figures (`JsonObject`):
            Of one task: `curves` and `summaries`.
    """
    figure, (curves, finals) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained")
    for number, (method, curve) in enumerate(figures["curves"].items()):
        low, middle, high = _columns(curve["sampled"])
        of_method = Curve(np.asarray(curve["episodes"]), middle, low, high, updates_per_point=1)
        draw_curve(curves, of_method, f"C{number}", alpha=0.08)
        for offset, marker, name in ((-0.12, "o", "final_greedy"), (0.12, "s", "final_sampled")):
            low, middle, high = _columns([figures["summaries"][method][name]])
            finals.errorbar(
                middle, [number + offset], xerr=[middle - low, high - middle], color=f"C{number}", marker=marker
            )
    curves.set(xlabel="episodes", ylabel="score of the episodes trained on", title=title)
    finals.set_yticks(range(len(figures["curves"])), list(figures["curves"]))
    for number, label in enumerate(finals.get_yticklabels()):  # the curves' legend, too
        label.set_color(f"C{number}")
    finals.invert_yaxis()
    finals.set(title="at the end: greedy (circle), sampled (square)")
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
    measures = {"final_greedy": "greedy score at the end", "area": "area under the learning curve"}
    figure, grid = pyplot.subplots(
        len(measures), len(axes), figsize=(5 * len(axes), 7), sharey="row", squeeze=False, layout="constrained"
    )
    for row, (measure, label) in zip(grid, measures.items(), strict=True):
        for axis, (varied, by_value) in zip(row, axes.items(), strict=True):
            methods = list(dict.fromkeys(method for summaries in by_value.values() for method in summaries))
            for number, method in enumerate(methods):
                values = [value for value, summaries in by_value.items() if method in summaries]
                low, middle, high = _columns([by_value[value][method][measure] for value in values])
                axis.errorbar(
                    values, middle, yerr=[middle - low, high - middle], color=f"C{number}", marker="o", label=method
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(by_value), [str(value) for value in by_value])
            axis.minorticks_off()
            axis.set(xlabel=varied, ylabel=label)
    grid[0][0].legend(fontsize="small")
    _save(figure, path)


def _columns(intervals: Sequence[Interval]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Low, middle and high; without an interval they are the same."""
    rows = [[middle if bound is None else bound for bound in (low, middle, high)] for low, middle, high in intervals]
    low, middle, high = np.asarray(rows, dtype=float).T
    return low, middle, high


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
