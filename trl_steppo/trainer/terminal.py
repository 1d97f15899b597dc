"""What a run says on the terminal besides its metrics, unless transformers' log level is `error` or higher."""

from __future__ import annotations

import logging
import os

import transformers


def is_quiet() -> bool:
    """Whether `log_level`, or `transformers.logging.set_verbosity_error()`, asks for errors only."""
    return transformers.utils.logging.get_verbosity() >= logging.ERROR


def notice(text: str) -> None:
    """Print a line on the first rank, unless the run is quiet. Needs no process group."""
    if os.environ.get("RANK", "0") == "0" and not is_quiet():
        print(text, flush=True)
