"""The `trl-steppo` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .commands import Command, check, compare, config, gateway, hotpotqa, memory, recipes, report, show, try_out
from .errors import StepPOError

COMMANDS: dict[str, Command] = {
    "recipes": recipes,
    "config": config,
    "memory": memory,
    "check": check,
    "try": try_out,
    "show": show,
    "compare": compare,
    "report": report,
    "gateway": gateway,
    "hotpotqa": hotpotqa,
}


class _Parser(argparse.ArgumentParser):
    """Options are written with underscores, or with hyphens, as in TRL's scripts."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        hyphenated = [name.replace("_", "-") for name in names if name.startswith("--") and "_" in name]
        return super().add_argument(*names, *hyphenated, **settings)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with all subcommands; the reference page is made from it, too."""
    parser = _Parser(prog="trl-steppo", description="Step-level PPO for LLM agents.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; errors that name their cure are printed without a traceback."""
    words, passed_on = _split(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words, argparse.Namespace(passed_on=passed_on))
    try:
        COMMANDS[args.command].run(args)
    except (StepPOError, OSError, ValueError, TypeError) as error:  # transformers checks settings by the last two
        print(f"trl-steppo {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the command, and those after `--`, which `compare` passes on to a script."""
    if "--" not in words or words[0] != "compare":
        return list(words), []
    end = list(words).index("--")
    return list(words[:end]), list(words[end + 1 :])


if __name__ == "__main__":
    sys.exit(main())
