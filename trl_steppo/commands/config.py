"""`trl-steppo config`: the accelerate files that are shipped with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigurationError
from ..recipes import closest

HELP = "files for `accelerate launch` that come with the package"
EXAMPLES = """\
  trl-steppo config
  trl-steppo config zero3
  accelerate launch --config_file "$(trl-steppo config zero3)" examples/hotpotqa_steppo.py --config RECIPE
"""

CONFIGS = Path(__file__).parents[1] / "configs"
"""The directory of the shipped files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a file, whose path is printed; left out, all are listed"
    )


def run(args: argparse.Namespace) -> None:
    """Print a path for `accelerate launch --config_file`, or the names of all files."""
    if args.name is None:
        for name in shipped_names():
            comment = shipped_file(name).read_text().splitlines()[0].removeprefix("# ")
            print(f"{name:16}{comment}")
    elif args.name in shipped_names():
        print(shipped_file(args.name))
    else:
        near = closest(args.name, shipped_names())
        raise ConfigurationError(f"there is no {args.name!r}{near}\nThe files are {', '.join(shipped_names())}.")


def shipped_names() -> list[str]:
    """Names of the shipped files, sorted."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def shipped_file(name: str) -> Path:
    """The path of the shipped file with this name."""
    return CONFIGS / f"{name}.yaml"
