"""
What the main example learns: `examples/hotpotqa_steppo.py` as StepPO and as token-level PPO, on the same seeds.

Each run is a process of its own, as a user starts it. A run that is already in `--runs_dir` is not repeated.

    python benchmarks/mini_wiki.py [--quick] [--json FILE]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from common.runs import LAUNCHER, Run, example_run, play, refuse_failures, updates_of

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


def run_of(method: str, seed: int, output_dir: Path, *, quick: bool) -> Run:
    """One run of the example."""
    flags = {"seed": seed, "num_sample_generations": 0, "log_episodes": 0}
    switches = [*METHODS[method], *(QUICK if quick else [])]
    return example_run("hotpotqa_steppo.py", output_dir, flags, switches=switches, launcher=LAUNCHER)


def read_run(run: Run) -> dict[str, float]:
    """What a run shows: greedy exact match before and after, and how it was spent."""
    history = run.history()
    evaluations = [logs["eval_exact_match"] for logs in history if "eval_exact_match" in logs]
    updates = updates_of(history)
    middle = updates[len(updates) // 3 : 2 * len(updates) // 3] or updates
    explained = [logs["critic/explained_variance"] for logs in middle if "critic/explained_variance" in logs]
    return {
        "start_em": evaluations[0],
        "end_em": evaluations[-1],
        "sampled_em_last_5_updates": mean(logs["env/exact_match"] for logs in updates[-5:]),
        "explained_variance_mid_run": mean(explained),
        "overhead_fraction": mean(logs["perf/overhead_fraction"] for logs in updates),
        "seconds": run.seconds,
    }


def main(args: MiniWikiArguments) -> None:
    root = Path(args.runs_dir) / ("quick" if args.quick else "")
    methods = list(METHODS)[:2] if args.quick else list(METHODS)
    seeds = args.seeds[:1] if args.quick else args.seeds
    runs = {
        (method, seed): run_of(method, seed, root / f"{method}_seed{seed}", quick=args.quick)
        for method in methods
        for seed in seeds
    }
    refuse_failures(play(runs.values()))
    figures = {method: {seed: read_run(runs[method, seed]) for seed in seeds} for method in methods}
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
