"""
A run whose agents start children and never end: `owned_processes.py OUTPUT_DIR SETTINGS`, with settings as JSON.

Each agent writes the ids of its processes to `OUTPUT_DIR/pids`. Every second one ignores SIGTERM, as its children do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.trainer.tiny import make_trainer, message_rows

AGENT = """
case "$(cat)" in *'"number": '[0-9]*[13579],*) trap '' TERM;; esac
sleep 600 & child=$!
setsid sleep 600 & elsewhere=$!
echo $$ $child $elsewhere > "$PIDS/$$.partial"
mv "$PIDS/$$.partial" "$PIDS/$$"
wait
"""


def main(directory: Path, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["PIDS"] = str(directory / "pids")
    Path(os.environ["PIDS"]).mkdir(parents=True)
    rows = [{**row, "number": 10 + index, "z": 0} for index, row in enumerate(message_rows(16))]
    make_trainer(
        directory, agent=["sh", "-c", AGENT], train_dataset=rows, per_device_train_batch_size=16, **settings
    ).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
