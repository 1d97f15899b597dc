"""
Shows that a change of the code changes nothing that the code does: runs of many configurations, at fixed seeds, whose
weights, logs and episodes are compared byte for byte.

    python tests/unchanged.py record before --package ../old_checkout
    python tests/unchanged.py record after --before before
    python tests/unchanged.py compare before after

Each run is a program of `examples/`, of the checkout that is named, in processes of its own. The second record resumes
from the first one's checkpoint, and trains on the first one's episodes of a run ahead, which depend on the clock.
Batches depend on which environments answer in time, so the machine should be quiet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

HERE = Path(__file__).parent.parent
COMMON = ["--total_episodes=128", "--per_device_train_batch_size=32", "--eval_strategy=no", "--eval_on_start=false"]
GROUP = ["--config", "{recipes}/mini_wiki_group.yaml", "--num_generations=4"]
SPLIT = ["--config", "{recipes}/mini_wiki.yaml", "--max_tokens_per_micro_batch=2048"]
TIMES = ("_s", "_runtime", "_per_second", "tokens_per_s", "overhead_fraction")
"""Ends of the names of metrics that are times."""

RUNS: dict[str, list[str]] = {
    "steppo": ["--eval_strategy=steps", "--eval_steps=2"],
    "token_ppo": ["--advantage_estimator=token_gae", "--importance_sampling_level=token"],
    "grpo": [*GROUP, "--advantage_estimator=grpo"],
    "rloo": [*GROUP, "--advantage_estimator=rloo"],
    "gigpo": [*GROUP, "--advantage_estimator=gigpo"],
    "reinforce_plus_plus": [*GROUP, "--advantage_estimator=reinforce_plus_plus"],
    "lora": ["--use_peft=true", "--lora_r=8", "--critic_shares_base=true"],
    "kl": ["--kl_coef=0.05", "--kl_loss_coef=0.1", "--entropy_coef=0.01"],
    "micro_batches_ddp": SPLIT,
    "micro_batches_zero3": SPLIT,
    "ahead": ["--max_staleness=1"],
    "replay": ["--replay_episodes_dir={before}/ahead/episodes", "--rollout_correction=truncate"],
    "agent": [
        "--max_concurrent_episodes=1",
        "--total_episodes=32",
        "--per_device_train_batch_size=8",
        "--num_mini_batches=2",
    ],
    "interrupted": ["--save_strategy=steps", "--save_steps=2"],
    "resumed": [
        "--save_strategy=steps",
        "--save_steps=2",
        "--resume_from_checkpoint={before}/interrupted/checkpoint-2",
    ],
}
"""The flags of each run."""

BEFORE_ONLY = ("ahead", "interrupted")
"""Runs that others go on from."""

RECIPES = ("trl_steppo/recipes", "examples/configs")
"""Where a checkout has them, now and before."""

RANKS = {"micro_batches_ddp": "ddp_cpu2.yaml", "micro_batches_zero3": "zero3_cpu2.yaml"}


def command(name: str, out: Path, package: Path, before: Path) -> list[str]:
    """How to start a run."""
    launch = [sys.executable]
    if name in RANKS:
        launch += [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(package / "trl_steppo/configs" / RANKS[name]),
        ]
    program = "train_openai_agent.py" if name == "agent" else "hotpotqa_steppo.py"
    recipes = next(path for path in RECIPES if (package / path).is_dir())
    flags = [flag.format(before=before, recipes=recipes) for flag in [*COMMON, *RUNS[name]]]
    directories = [f"--output_dir={out / name}", f"--dump_episodes_dir={out / name / 'episodes'}"]
    return [*launch, f"examples/{program}", *flags, *directories]


def record(out: Path, package: Path, names: list[str], before: Path) -> None:
    """Make the runs."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in names:
        if name in BEFORE_ONLY and before != out:
            continue
        words = command(name, out, package, before)
        (out / name).mkdir(parents=True, exist_ok=True)
        with (out / name / "output.txt").open("w") as output:
            ended = subprocess.run(words, cwd=package, env=environment, stdout=output, stderr=subprocess.STDOUT)
        print(f"{name}: {'done' if ended.returncode == 0 else f'failed with status {ended.returncode}'}", flush=True)
        (out / name / "summary.json").write_text(json.dumps(summary(out / name), indent=1))


def summary(run: Path) -> dict[str, Any]:
    """What a run has come to."""
    weights = {
        str(file.relative_to(run)): digest(file)
        for file in sorted(run.glob("**/*.safetensors"))
        if "checkpoint-" not in str(file.relative_to(run))
    }
    episodes = {file.name: [untimed(json.loads(line)) for line in lines(file)] for file in dumps(run)}
    state = run / "trainer_state.json"
    logs = json.loads(state.read_text())["log_history"] if state.is_file() else None
    return {"weights": weights, "logs": logs and [untimed(entry) for entry in logs], "episodes": episodes}


def digest(file: Path) -> str:
    """Of all tensors of a file, by name; what else the file says is left out."""
    whole = hashlib.sha256()
    with safe_open(file, "numpy") as tensors:
        for name in sorted(tensors.keys()):
            array = tensors.get_tensor(name)
            whole.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return whole.hexdigest()


def dumps(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("episodes/**/*") if path.is_file())


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line]


def untimed(value: Any) -> Any:
    """Without what depends on the clock."""
    if isinstance(value, dict):
        return {key: untimed(part) for key, part in value.items() if key != "eps" and not key.endswith(TIMES)}
    return [untimed(part) for part in value] if isinstance(value, list) else value


def compare(before: Path, after: Path) -> int:
    """Print what differs; the number of runs that do."""
    differing = 0
    for name in [name for name in RUNS if name not in BEFORE_ONLY]:
        one, other = (json.loads((directory / name / "summary.json").read_text()) for directory in (before, after))
        unequal = [key for key in one if one[key] != other[key]]
        empty = [f"no {key}" for key in one if not one[key] and (key, name) != ("episodes", "replay")]
        counts = f"{len(one['weights'])} files of weights, {len(one['logs'] or ())} logs, {len(one['episodes'])} dumps"
        print(f"{name}: {'DIFFERS in ' + ', '.join(unequal) if unequal else 'identical'} ({counts})", *empty)
        differing += bool(unequal or empty)
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--package", type=Path, default=HERE, help="the checkout whose code runs")
    recording.add_argument("--before", type=Path, help="an earlier record, to go on from")
    recording.add_argument("--only", nargs="*", default=list(RUNS), help="the names of some runs")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        raise SystemExit(compare(arguments.before, arguments.after))
    out = arguments.out.resolve()
    before = arguments.before.resolve() if arguments.before else out
    record(out, arguments.package.resolve(), arguments.only, before)


if __name__ == "__main__":
    main()
