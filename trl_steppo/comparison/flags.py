"""Which settings a script takes, asked of the script itself."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigurationError

REQUIRED = ("output_dir", "seed", "run_name", "resume_from_checkpoint")
"""The flags that a comparison sets itself."""

_PATIENCE_S = 600.0  # for imports on a slow disk


def flags_of(script: Path) -> set[str]:
    """
    The flags of a script, without dashes, from its `--help`.

    Raises:
        ConfigurationError: If the script has no `--help`, or does not take what a comparison sets.
    """
    text = _help(script, "--help")
    if "--help_all" in text:  # the first one shows the most important flags
        text += _help(script, "--help_all")
    flags = {name.replace("-", "_") for name in re.findall(r"--([A-Za-z][\w-]*)", text)}
    missing = [name for name in REQUIRED if name not in flags]
    if missing:
        raise ConfigurationError(
            f"{script} does not take {', '.join(f'--{name}' for name in missing)}; parse its flags with "
            "`StepPOParser(StepPOConfig)`, as in docs/guides/compare.md"
        )
    return flags


def refuse_unknown(names: Iterable[str], flags: set[str], where: str) -> None:
    """Raise if a script has no setting of one of these names. The message has the nearest name."""
    for name in names:
        if name not in flags:
            near = difflib.get_close_matches(name, sorted(flags), n=1)
            cure = f"did you mean `{near[0]}`?" if near else "see its --help"
            raise ConfigurationError(f"{where}: the script has no setting `{name}`; {cure}")


def _help(script: Path, flag: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), flag],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_PATIENCE_S,
        env={**os.environ, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise ConfigurationError(f"`python {script} {flag}` fails, so its flags are unknown:\n{last}")
    return done.stdout
