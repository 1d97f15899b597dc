"""`trl-steppo report`: runs as one HTML file."""

from __future__ import annotations

import argparse

HELP = "runs as one HTML file: curves, final figures, episodes step by step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's output_dir")
    parser.add_argument("--output", default="report.html", metavar="FILE.html", help="plots lie beside it as PNG")


def run(args: argparse.Namespace) -> None:
    """Write the report, and print the names of its files."""
    from ..report import write_report

    for path in write_report(args.runs, args.output):
        print(path)
