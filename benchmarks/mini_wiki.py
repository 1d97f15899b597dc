"""
What the main example learns: `examples/hotpotqa_steppo.py` as StepPO and as token-level PPO, on the same seeds.

Each run is a process of its own, as a user starts it. A run that is already in `--runs_dir` is not repeated.

    python benchmarks/mini_wiki.py [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from _record import BenchmarkArguments, parse_arguments, print_table, write_record

EXAMPLE = Path(__file__).parents[1] / "examples" / "hotpotqa_steppo.py"
TOKEN_LEVEL = ["--advantage_estimator", "token_gae", "--importance_sampling_level", "token"]
METHODS = {
    "steppo": [],
    "token_ppo": TOKEN_LEVEL,
    "token_ppo_gamma_1": [*TOKEN_LEVEL, "--gamma", "1", "--lam", "1"],
}
QUICK = ["--total_episodes", "256", "--eval_strategy", "no"]  # two updates: shows that it runs, not that it learns


@dataclass
class MiniWikiArguments(BenchmarkArguments):
    """
    Args:
        seeds (`list[int]`, *optional*, defaults to `[1, 2, 3]`):
            Seeds of each method; `--quick` takes the first, of two methods.
        runs_dir (`str`, *optional*, defaults to `"runs/benchmark"`):
            Where the runs are; those of `--quick` in its folder `quick`.
    """

    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of each method."})
    runs_dir: str = field(default="runs/benchmark", metadata={"help": "Where the runs are, or will be."})


def run(method: str, seed: int, output_dir: Path, *, quick: bool) -> None:
    """One run of the example, unless it is there already."""
    if (output_dir / "seconds.txt").is_file():
        return
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(EXAMPLE)]
    flags = ["--seed", str(seed), "--output_dir", str(output_dir), "--num_sample_generations", "0"]
    start = time.perf_counter()
    subprocess.run(
        [*command, *flags, *METHODS[method], *(QUICK if quick else [])],
        check=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (output_dir / "seconds.txt").write_text(f"{time.perf_counter() - start:.1f}\n")


def read_run(output_dir: Path) -> dict[str, float]:
    """What a run shows: greedy exact match before and after, and how it was spent."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    evaluations = [logs["eval_exact_match"] for logs in history if "eval_exact_match" in logs]
    updates = [logs for logs in history if "loss/policy_avg" in logs or "loss/value_avg" in logs]
    middle = updates[len(updates) // 3 : 2 * len(updates) // 3] or updates
    explained = [logs["critic/explained_variance"] for logs in middle if "critic/explained_variance" in logs]
    return {
        "start_em": evaluations[0],
        "end_em": evaluations[-1],
        "sampled_em_last_5_updates": mean(logs["env/exact_match"] for logs in updates[-5:]),
        "explained_variance_mid_run": mean(explained),
        "overhead_fraction": mean(logs["perf/overhead_fraction"] for logs in updates),
        "seconds": float((output_dir / "seconds.txt").read_text()),
    }


def main(args: MiniWikiArguments) -> None:
    root = Path(args.runs_dir) / ("quick" if args.quick else "")
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for method in list(METHODS)[:2] if args.quick else METHODS:
        figures[method] = {}
        for seed in args.seeds[:1] if args.quick else args.seeds:
            output_dir = root / f"{method}_seed{seed}"
            run(method, seed, output_dir, quick=args.quick)
            figures[method][seed] = read_run(output_dir)
    columns = list(next(iter(figures["steppo"].values())))
    print_table(
        "Greedy exact match on the mini wiki's 300 validation questions, and what a run takes",
        ["method", "seed", *columns],
        [
            [method, str(seed), *(f"{run[name]:.3g}" for name in columns)]
            for method, by_seed in figures.items()
            for seed, run in by_seed.items()
        ],
    )
    write_record(args.json, {"runs": figures})


if __name__ == "__main__":
    main(parse_arguments(MiniWikiArguments))
