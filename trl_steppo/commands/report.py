"""`trl-steppo report`: runs as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import ConfigurationError

HELP = "write runs as one HTML file: curves, final figures, episodes step by step"
EXAMPLES = """\
  trl-steppo report runs/mini_wiki
  trl-steppo report runs/a runs/b --output comparison.html
  trl-steppo report --method StepPO=runs/a1,runs/a2 --method GRPO=runs/b1,runs/b2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's output_dir, or a directory that holds runs")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME=RUN,RUN",
        help="these runs are one method of this name; may be repeated",
    )
    parser.add_argument("--output", metavar="FILE.html", help="plots lie next to it as PNG (default: report.html)")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="write no file: serve the page on this machine, and renew it as runs go on",
    )
    parser.add_argument("--port", type=int, metavar="N", help="of --watch; 0 takes any free one (default: 8642)")


def run(args: argparse.Namespace) -> None:
    """Write the report, and print the names of its files; or serve it."""
    from ..report import serve_report, write_report

    methods = _named(args.method)
    if not args.runs and not methods:
        raise ConfigurationError("name at least one run's output_dir")
    if args.watch:
        if args.output is not None:
            raise ConfigurationError(f"--output {args.output} has no effect with --watch, which writes no file")
        serve_report(args.runs, methods=methods, port=args.port)
        return
    if args.port is not None:
        raise ConfigurationError("--port has an effect with --watch only")
    for path in write_report(args.runs, args.output or "report.html", methods=methods):
        print(path)


def _named(words: Sequence[str]) -> dict[str, list[str]]:
    """The runs of each method, from `NAME=RUN,RUN`."""
    methods: dict[str, list[str]] = {}
    for word in words:
        name, _, runs = word.partition("=")
        members = [run for run in runs.split(",") if run]
        if not name or not members:
            raise ConfigurationError(f"--method {word}: write NAME=RUN,RUN, as in --method StepPO=runs/a,runs/b")
        methods.setdefault(name, []).extend(members)
    return methods
