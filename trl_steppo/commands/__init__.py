"""
The subcommands of `trl-steppo`: each module says what its command takes, and runs it.

| file | what it is |
|---|---|
| `config.py` | where the shipped accelerate files are |
| `memory.py` | what a run needs of each GPU |
| `memory_plan.py`, `shapes.py` | the estimate, and what of a model decides it |
| `check.py`, `launch_file.py`, `trial.py` | a recipe, compared with its accelerate file and tried out |
| `report.py` | runs as one HTML file |
| `gateway.py` | a model served to agents |
| `hotpotqa.py` | data sets prepared for training |

To load them imports nothing heavy: what a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
from typing import Protocol


class Command(Protocol):
    """A module with a subcommand in it."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare what the command takes."""
        ...

    def run(self, args: argparse.Namespace) -> None:
        """Do it. Raises errors that name their cure."""
        ...
