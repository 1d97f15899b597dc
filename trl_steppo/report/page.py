"""The HTML file: one page that loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from .. import __version__
from .episodes import Sample, embedded_json, sample_episodes
from .figures import LAST, final_figures, number
from .find import Gathered, gather
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
from .runs import Run
from .statistics import CONFIDENCE

_MAX_BYTES = 4_800_000
_MAX_EPISODE_BYTES = 2_500_000
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Content:
    """
    What a page is made of.

    Args:
        runs (`Sequence[Run]`), methods (`Sequence[Method]`), charts (`Sequence[Chart]`), curves (`Curves`):
            The runs, and what is made of them.
        notes (`Sequence[str]`, *optional*):
            Which runs were left out, and why.
    """

    runs: Sequence[Run]
    methods: Sequence[Method]
    charts: Sequence[Chart]
    curves: Curves
    notes: Sequence[str] = ()


def write_page(places: Sequence[str | Path], output: Path, named: Mapping[str, Sequence[str | Path]]) -> list[Path]:
    """See [`write_report`][trl_steppo.report.write_report]."""
    content = content_of(gather(places, named))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page_of(content), encoding="utf-8")
    written = [output]
    for chart in content.charts:
        path = output.with_name(f"{output.stem}_{chart.slug}.png")
        save_png(chart, content.methods, content.curves, path)
        written.append(path)
    return written


def content_of(gathered: Gathered) -> Content:
    """Group runs, and compute their curves."""
    runs = gathered.runs
    methods = group_runs(runs, gathered.names)
    charts = charts_of(methods)
    return Content(runs, methods, charts, curves_of(charts, methods), gathered.notes)


def page_of(content: Content, version: str | None = None) -> str:
    """
    The page as HTML.

    Args:
        content ([`Content`]):
            What is on it.
        version (`str`, *optional*):
            Of a page that renews itself: it asks its server for `/version`, and is loaded again when that differs.
    """
    page = _described(content) | {"version": version}
    room = min(_MAX_EPISODE_BYTES, _MAX_BYTES - len(_render(page, content.methods, Sample()).encode()))
    return _render(page, content.methods, sample_episodes(content.methods, max_bytes=room))


def _described(content: Content) -> dict[str, object]:
    """The content of the page, without the episodes."""
    methods, curves = content.methods, content.curves
    return {
        "package_version": __version__,
        "methods": methods,
        "charts": [
            {
                "slug": chart.slug,
                "title": chart.title,
                "text": chart.text,
                "panels": [
                    {
                        "title": panel.title,
                        "unit": panel.unit,
                        "metric": panel.metric,
                        "meaning": panel.meaning,
                        "svg": Markup(panel_svg(panel, methods, curves)),
                        "summary": _summary(panel.metric, methods, curves),
                    }
                    for panel in chart.panels
                ],
            }
            for chart in content.charts
        ],
        "table": final_figures(methods),
        "length_notes": [*_length_notes(methods), *(f"Left out: {note}" for note in content.notes)],
        "settings": differing_settings(methods),
        "runs": content.runs,
        "without_settings": [run.name for run in content.runs if run.settings is None],
        "without_episodes": [run.name for run in content.runs if not run.episode_files],
        "has_intervals": any(len(method.runs) > 1 for method in methods),
        "confidence": CONFIDENCE,
        "last": LAST,
        "updates_per_point": max((curve.updates_per_point for curve in curves.values()), default=1),
    }


def waiting_page(message: str, version: str) -> str:
    """The page before any run has logged an update."""
    return _template("waiting.html.jinja").render(message=message, **_frame(version))


def _render(page: dict[str, object], methods: Sequence[Method], sample: Sample) -> str:
    version = page["version"]
    assert version is None or isinstance(version, str)
    data = {"methods": [m.name for m in methods], "questions": sample.questions, "episodes": sample.episodes}
    data["outcomes"] = sample.outcomes
    return _template("page.html.jinja").render(
        **page | _frame(version, "viewer.js"), sample=sample, data=embedded_json(data)
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["code"] = _with_code
    return environment.get_template(name)


def _frame(version: str | None, *scripts: str) -> dict[str, object]:
    """What every page has: its colors, its style, its scripts, and their hashes, without which no script runs."""
    names = [*scripts, *(() if version is None else ("live.js",))]
    texts = [(_HERE / name).read_text(encoding="utf-8") for name in names]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return {
        "version": version,
        "colors": {"method": METHOD_COLORS, "phase": PHASE_COLORS, "ink": INK, "grid": GRID},
        "style": Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        "scripts": [Markup(text) for text in texts],
        "script_sources": " ".join(f"'sha256-{digest}'" for digest in digests),
    }


def _with_code(text: str) -> Markup:
    """Text whose parts in backticks are code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


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
