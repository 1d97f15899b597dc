"""What all benchmarks share: their flags, how their figures are printed, and how they are written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

T = TypeVar("T", bound="BenchmarkArguments")

_PACKAGES = ("trl-steppo", "torch", "transformers", "trl", "accelerate")


@dataclass
class BenchmarkArguments:
    """
    The flags of every benchmark.

    Args:
        quick (`bool`, *optional*, defaults to `False`):
            Take less than a minute.
        json (`str`, *optional*):
            File to write the figures to.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the workload.
    """

    quick: bool = field(default=False, metadata={"help": "Take less than a minute."})
    json: str | None = field(default=None, metadata={"help": "File to write the figures to."})
    seed: int = field(default=0, metadata={"help": "Seed of the workload."})


def parse_arguments(kind: type[T], argv: Sequence[str] | None = None) -> T:
    """The flags of a benchmark, from the command line or from `argv`."""
    parser: Any = HfArgumentParser(kind)  # type: ignore[arg-type]
    args: T
    (args,) = parser.parse_args_into_dataclasses(argv)
    return args


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The figures for people; all columns but the first hold numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_record(path: str | None, figures: Mapping[str, object]) -> None:
    """Write the figures with what is needed to measure them again; `None` writes nothing."""
    if path is None:
        return
    record = {
        **figures,
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": current_commit(),
        "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in _PACKAGES}},
        "machine": {"cpus": os.cpu_count(), "torch_threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=2) + "\n")


def current_commit() -> str | None:
    """The commit that was measured, with a mark if the code was changed since."""
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=here, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+changes" if changed.strip() else "")
