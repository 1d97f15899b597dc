"""The HTML file: one page that loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from .episodes import Sample, embedded_json, sample_episodes
from .figures import LAST, final_figures, number
from .methods import Method, differing_settings, group_runs
from .plots import (
    GRID,
    INK,
    METHOD_COLORS,
    PHASE_COLORS,
    Chart,
    Curves,
    charts_of,
    curves_of,
    panel_svg,
    phases_of,
    save_png,
)
from .runs import Run, load_runs
from .statistics import CONFIDENCE

_MAX_BYTES = 4_800_000
_MAX_EPISODE_BYTES = 2_500_000
_HERE = Path(__file__).parent


def write_page(
    directories: Sequence[str | Path], output: Path, named: Mapping[str, Sequence[str | Path]]
) -> list[Path]:
    """See [`write_report`][trl_steppo.report.write_report]."""
    names = {Path(directory).resolve(): name for name, members in named.items() for directory in members}
    given = {Path(directory).resolve() for directory in directories}
    runs = load_runs([*directories, *(directory for directory in names if directory not in given)])
    methods = group_runs(runs, names)
    charts = charts_of(methods)
    output.parent.mkdir(parents=True, exist_ok=True)
    curves = curves_of(charts, methods)
    page = _content(runs, methods, charts, curves)
    room = min(_MAX_EPISODE_BYTES, _MAX_BYTES - len(_render(page, methods, Sample()).encode()))
    sample = sample_episodes(methods, max_bytes=room)
    output.write_text(_render(page, methods, sample), encoding="utf-8")
    written = [output]
    for chart in charts:
        path = output.with_name(f"{output.stem}_{chart.slug}.png")
        save_png(chart, methods, curves, path)
        written.append(path)
    return written


def _content(
    runs: Sequence[Run], methods: Sequence[Method], charts: Sequence[Chart], curves: Curves
) -> dict[str, object]:
    """The content of the page, without the episodes."""
    return {
        "version": __version__,
        "methods": methods,
        "charts": [
            {
                "slug": chart.slug,
                "title": chart.title,
                "text": chart.text,
                "panels": [
                    {
                        "title": panel.title,
                        "metric": panel.metric,
                        "svg": Markup(panel_svg(panel, methods, curves)),
                        "summary": _summary(panel.metric, methods, curves),
                    }
                    for panel in chart.panels
                ],
            }
            for chart in charts
        ],
        "table": final_figures(methods),
        "length_notes": _length_notes(methods),
        "settings": differing_settings(methods),
        "runs": runs,
        "without_settings": [run.name for run in runs if run.settings is None],
        "without_episodes": [run.name for run in runs if not run.episode_files],
        "has_intervals": any(len(method.runs) > 1 for method in methods),
        "confidence": CONFIDENCE,
        "last": LAST,
        "updates_per_point": max((curve.updates_per_point for curve in curves.values()), default=1),
        "colors": {"method": METHOD_COLORS, "phase": PHASE_COLORS, "ink": INK, "grid": GRID},
    }


def _render(page: dict[str, object], methods: Sequence[Method], sample: Sample) -> str:
    script = (_HERE / "viewer.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    data = {"methods": [m.name for m in methods], "questions": sample.questions, "episodes": sample.episodes}
    return environment.get_template("page.html.jinja").render(
        **page,
        sample=sample,
        data=embedded_json(data),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
    )


def _length_notes(methods: Sequence[Method]) -> list[str]:
    """Notes on runs that are shorter than others, or unfinished."""
    notes = []
    for method in methods:
        lengths = sorted({run.num_updates for run in method.runs})
        if len(lengths) > 1:
            notes.append(
                f"{method.name}: its runs have {lengths[0]} to {lengths[-1]} updates. Its final figures are as of "
                f"{lengths[0]}, where all of them have come; beyond, the curves are those of the longer "
                "runs alone."
            )
    runs = [run for method in methods for run in method.runs if not run.is_finished]
    for title, is_running in (
        ("Still going on", True),
        ("Not finished, and shown as far as they were logged", False),
    ):
        named = [f"{run.name} (update {run.num_updates})" for run in runs if run.is_running is is_running]
        if named:
            notes.append(f"{title}: {', '.join(named)}.")
    return notes


def _summary(metric: str, methods: Sequence[Method], curves: Curves) -> str:
    """A panel in words, for screen readers."""
    if not metric:
        parts = [
            f"{method.name}: " + ", ".join(f"{name} {seconds:.2g} s" for name, seconds in phases_of(method).items())
            for method in methods
        ]
        return "; ".join(parts)
    parts = []
    for method in methods:
        curve = curves.get((method.name, metric))
        if curve is not None:
            parts.append(f"{method.name} from {number(curve.center[0])} to {number(curve.center[-1])}")
    return "; ".join(parts)
