"""`trl-steppo recipes`: the recipes that come with the package."""

from __future__ import annotations

import argparse

from ..recipes import find_recipe, read_header, recipe_names

HELP = "list the recipes that come with the package: what, model, GPUs"
EXAMPLES = """\
  trl-steppo recipes
  trl-steppo recipes mini_wiki
  accelerate launch examples/hotpotqa_steppo.py --config mini_wiki --seed 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a recipe, whose file is printed; left out, all are listed"
    )


def run(args: argparse.Namespace) -> None:
    """Print a recipe, or a table of all."""
    if args.name is not None:
        print(find_recipe(args.name).read_text(encoding="utf-8"), end="")
        return
    rows = [("recipe", "model", "GPUs", "what it trains")]
    rows += [(each.name, each.model, each.gpus, each.summary) for each in map(read_header, recipe_names())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
