"""What this package uses of argparse beyond its documented interface."""

from __future__ import annotations

import argparse


def groups_of(parser: argparse.ArgumentParser) -> list[tuple[str | None, list[argparse.Action]]]:
    """The groups of a parser's arguments: the title of each, and its arguments in their order."""
    return [(group.title, list(group._group_actions)) for group in parser._action_groups]
