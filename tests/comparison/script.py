"""A training script that learns nothing: it takes a trainer's flags, and writes what a trainer writes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("output_dir", "run_name", "resume_from_checkpoint", "config"):
    parser.add_argument(f"--{name}")
parser.add_argument("--seed", type=int)
parser.add_argument("--learning_rate", "--learning-rate", type=float, default=0.1)
parser.add_argument("--total_updates", type=int, default=2)
parser.add_argument("--reward_weights", type=float, nargs="+")
parser.add_argument("--fails", default="false")
parser.add_argument("--waits_after", type=int, help="an update, after which it waits to be interrupted")
args = parser.parse_args()

output_dir = Path(args.output_dir)
done = int(args.resume_from_checkpoint.rpartition("-")[2]) if args.resume_from_checkpoint else 0
with (output_dir / "starts.txt").open("a") as file:
    file.write(f"from {done}, threads {os.environ.get('OMP_NUM_THREADS')}\n")
settings = {"advantage_estimator": "step_gae", "importance_sampling_level": "step", "log_episodes": 0}
settings |= {"seed": args.seed, "run_name": args.run_name, "learning_rate": args.learning_rate}
(output_dir / "steppo_config.json").write_text(json.dumps(settings))
history = [
    {"step": update, "episode": 8 * update, "env/reward": args.learning_rate * update + 0.01 * args.seed}
    for update in range(1, args.total_updates + 1)
]


def save(directory: Path, update: int) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": history[:update]}))


def stop(update: int, *_: object) -> None:
    save(output_dir / f"checkpoint-{update}", update)
    sys.exit(1)


print("it begins")
for update in range(done + 1, args.total_updates + 1):
    with (output_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(history[update - 1]) + "\n")
    if update == args.waits_after:
        signal.signal(signal.SIGINT, partial(stop, update))
        (output_dir / "waits").touch()
        time.sleep(60)
if args.fails == "true":
    raise SystemExit("broken on purpose")
save(output_dir, args.total_updates)
