"""
A real pretrained model on real questions, on a CPU: SmolLM2-135M-Instruct under StepPO and token-level PPO, on
the same seeds.

Both are paid the answer's exact match and 0.2 times the share of valid calls (`valid_calls`). A run is
`examples/hotpotqa_steppo.py` with the recipe `smollm2-135m-cpu`, in a process of its own; one that is
already in `--runs_dir` is not repeated. `--quick` plays the built-in policy on the built-in wiki: that it runs.

    python examples/make_smollm2_policy.py --output_dir models/SmolLM2-135M-Instruct
    python examples/warm_start.py --model_name_or_path models/SmolLM2-135M-Instruct \\
        --config smollm2-135m-cpu --output_dir models/SmolLM2-135M-warm
    python benchmarks/smollm2_hotpotqa.py --rows ROWS.jsonl [--json FILE]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean

import numpy as np
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from common.runs import Run, example_run, play, refuse_failures, updates_of
from scipy.stats import bootstrap

from trl_steppo import Episode
from trl_steppo.rollout import load_episodes
from trl_steppo.types import JsonObject

METHODS = {
    "steppo": [],
    "token_ppo": ["--advantage_estimator", "token_gae", "--importance_sampling_level", "token"],
}
CURVES = {
    "valid_call_rate": "rewards/valid_calls/mean",
    "exact_match": "env/exact_match",
    "f1": "env/f1",
    "steps": "env/episode_steps",
    "searches": "env/num_searches",
    "answered": "env/answered",
    "kl_to_start": "objective/kl",
    "explained_variance": "critic/explained_variance",
    "entropy": "policy/entropy_avg",
}
PHASES = ("rollout_s", "forward_s", "train_s", "update_s")
GAINS = ("first", "last", "gain", "gain_same_questions")
WINDOW = 3  # updates at the start and at the end whose episodes are compared


@dataclass
class SmolLM2Arguments(BenchmarkArguments):
    """
    Args:
        rows (`str`, *optional*):
            File of rows in the schema of `hotpotqa/hotpot_qa`. Needed without `--quick`.
        model_dir (`str`, *optional*, defaults to `"models/SmolLM2-135M-warm"`):
            What `examples/warm_start.py` made.
        seeds (`list[int]`, *optional*, defaults to `[1]`):
            Seeds of each method.
        updates (`int`, *optional*, defaults to `12`):
            Updates of a run.
        episodes (`int`, *optional*, defaults to `8`):
            Episodes of an update.
        parallel (`int`, *optional*, defaults to `2`):
            Runs at a time, of one thread each.
        runs_dir (`str`, *optional*, defaults to `"runs/smollm2"`):
            Where the runs are; those of `--quick` in its folder `quick`.
    """

    rows: str | None = field(default=None, metadata={"help": "File of rows in the schema of hotpotqa/hotpot_qa."})
    model_dir: str = field(default="models/SmolLM2-135M-warm", metadata={"help": "What examples/warm_start.py made."})
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Seeds of each method."})
    updates: int = field(default=12, metadata={"help": "Updates of a run."})
    episodes: int = field(default=8, metadata={"help": "Episodes of an update."})
    parallel: int = field(default=2, metadata={"help": "Runs at a time, of one thread each."})
    runs_dir: str = field(default="runs/smollm2", metadata={"help": "Where the runs are, or will be."})


def run_of(method: str, seed: int, output_dir: Path, args: SmolLM2Arguments) -> Run:
    """One run of the example."""
    model, rows = ("mini_wiki", "mini_wiki") if args.quick else (args.model_dir, str(args.rows))
    flags = {
        "config": "smollm2-135m-cpu",
        "model_name_or_path": model,
        "dataset_name": rows,
        "per_device_train_batch_size": args.episodes,
        "total_episodes": args.episodes * (2 if args.quick else args.updates),
        "dump_episodes_dir": output_dir / "episodes",
        "seed": seed,
    }
    return example_run("hotpotqa_steppo.py", output_dir, flags, switches=METHODS[method])


def read_run(run: Run) -> JsonObject:
    """What a run shows: its curves, how sure the change of the valid-call rate is, and where the time went."""
    updates = updates_of(run.history())
    played = [load_episodes(path) for path in sorted((run.output_dir / "episodes").glob("*.jsonl"))]
    shares = [[valid_share(episode) for episode in episodes if episode.valid] for episodes in played]
    window = min(WINDOW, len(shares) // 2)
    first, last = ([share for update in part for share in update] for part in (shares[:window], shares[-window:]))
    gains = gains_of_questions(chain(*played))
    return {
        "curves": {name: [logs.get(metric) for logs in updates] for name, metric in CURVES.items()},
        "valid_call_rate": {
            "first": interval(first),
            "last": interval(last),
            "gain": interval(last, first),
            "gain_same_questions": interval(gains) if len(gains) > 1 else None,
            "questions_played_again": len(gains),
        },
        "seconds_per_update": {name: mean(logs.get(f"perf/{name}", 0.0) for logs in updates) for name in PHASES},
        "seconds": run.seconds,
        "commit": run.commit,
    }


def valid_share(episode: Episode) -> float:
    """The share of an episode's responses that made a valid call."""
    return episode.metrics["rewards/valid_calls"]


def gains_of_questions(episodes: Iterable[Episode]) -> list[float]:
    """For each question that was played more than once: its last share of valid calls less its first."""
    of_question: dict[tuple[int, ...], list[float]] = {}
    for episode in episodes:
        if episode.valid:
            of_question.setdefault(tuple(episode.steps[0].prompt_ids), []).append(valid_share(episode))
    return [shares[-1] - shares[0] for shares in of_question.values() if len(shares) > 1]


def interval(values: list[float], baseline: list[float] | None = None) -> list[float]:
    """
    The mean of `values`, less that of `baseline`, between the ends of its 95 % interval over episodes: [low, mean,
    high]. By the percentile bootstrap, whose ends stay where the data can be; it knows nothing of other seeds.
    """
    samples = [np.asarray(sample) for sample in (values, baseline) if sample is not None]

    def difference(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        means: list[np.ndarray] = [np.mean(part, axis=axis) for part in parts]
        return means[0] - means[1] if len(means) > 1 else means[0]

    found = bootstrap(samples, difference, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return [float(found.low), float(difference(*samples)), float(found.high)]


def shown(bounds: list[float] | None) -> str:
    """An interval for people."""
    if bounds is None:
        return "-"
    low, middle, high = bounds
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main(args: SmolLM2Arguments) -> None:
    if not args.quick and (args.rows is None or not Path(args.model_dir).is_dir()):
        raise SystemExit("name real rows with --rows, and a model of examples/warm_start.py with --model_dir")
    root = Path(args.runs_dir) / ("quick" if args.quick else "")
    runs = {
        (method, seed): run_of(method, seed, root / f"{method}_seed{seed}", args)
        for seed in args.seeds
        for method in METHODS
    }
    refuse_failures(play(runs.values(), parallel=args.parallel, num_threads=1))
    figures: dict[str, dict[int, JsonObject]] = {method: {} for method in METHODS}
    for (method, seed), run in runs.items():
        figures[method][seed] = read_run(run)
    print_table(
        f"Valid-call rate in the first and last {WINDOW} updates, its gain, and that on the questions played twice "
        "(95 % intervals over episodes); seconds an update",
        ["method", "seed", "first", "last", "gain", "same questions", "EM, last", "s"],
        [
            [
                method,
                str(seed),
                *(shown(found["valid_call_rate"][part]) for part in GAINS),
                f"{mean(found['curves']['exact_match'][-WINDOW:]):.2f}",
                f"{found['seconds_per_update']['update_s']:.0f}",
            ]
            for method, by_seed in figures.items()
            for seed, found in by_seed.items()
        ],
    )
    rows = None if args.quick else Path(str(args.rows)).read_bytes()
    write_record(
        args.json,
        {
            "runs": figures,
            "updates": 2 if args.quick else args.updates,
            "episodes": args.episodes,
            "parallel": args.parallel,
            "rows_sha256": None if rows is None else hashlib.sha256(rows).hexdigest(),
            "rows": None if rows is None else len(rows.splitlines()),
        },
    )


if __name__ == "__main__":
    main(parse_arguments(SmolLM2Arguments))
