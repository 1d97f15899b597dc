"""
Step-level beside token-level PPO, and beside baselines without a critic: the same episodes, the same budget, learning
rates tuned in the same way, many seeds.

Each method's learning rate is chosen from the same grid, by the area under the learning curve on seeds of their own,
on every task anew; where the best one is at an end of the grid, the grid goes on there. The critic's rate is
`CRITIC_OVER_POLICY` times the policy's. Then come the seeds of the result. The tasks: the mini wiki, and the rooms,
where the number of steps and the length of a response are set, one axis at a time. Each run is an example script in a
process of its own; what it showed is kept as a small file in `--results_dir`, and a run whose file is there is not
repeated, so that a study can be stopped, and go on on another day.

    python benchmarks/step_vs_token.py [--tasks mini_wiki rooms] [--methods main] [--parallel N] [--json FILE]
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from _intervals import (
    Interval,
    curve_interval,
    episodes_ratio,
    episodes_to_reach,
    final_sampled,
    interval,
    probability_of_improvement,
)
from _plots import plot_axes, plot_task
from _record import BenchmarkArguments, parse_arguments, print_table, write_record
from _runs import (
    EXAMPLES,
    Run,
    changed_inputs,
    example_run,
    play,
    refuse_failures,
    settings_in,
    under_current_names,
    updates_of,
)

from trl_steppo import durable
from trl_steppo.report.statistics import interquartile_mean

CRITIC_OVER_POLICY = 2.5
TOKEN_CLIPRANGE = 0.2
TUNING_SEEDS = (101, 102)
MOST_BEYOND = 2  # rates beyond an end of the grid

TOKEN_GAE = {"advantage_estimator": "token_gae"}
TOKEN_RATIO = {"importance_sampling_level": "token"}
WITH_CRITIC: dict[str, dict[str, Any]] = {
    "steppo": {},
    "token_ppo": {**TOKEN_GAE, **TOKEN_RATIO},
    "token_ppo_gamma_lam_1": {**TOKEN_GAE, **TOKEN_RATIO, "gamma": 1.0, "lam": 1.0},
    # Averaged over steps as StepPO is: only the credit and the ratio differ.
    "without_step_gae": {**TOKEN_GAE, "loss_aggregation": "step"},
    "without_step_ratio": {**TOKEN_RATIO},
    "without_both": {**TOKEN_GAE, **TOKEN_RATIO, "loss_aggregation": "step"},
    # What lambda does, apart from gamma
    "steppo_lam_1": {"lam": 1.0},
    "token_ppo_lam_1": {**TOKEN_GAE, **TOKEN_RATIO, "lam": 1.0},
}
# Ratios as these methods were published with: per token, but for RLOO, to which a whole response is one action. The
# returns of REINFORCE++ are those of tokens, without a discount.
WITHOUT_CRITIC: dict[str, dict[str, Any]] = {
    "grpo": {"advantage_estimator": "grpo", "num_generations": 8, **TOKEN_RATIO},
    "rloo": {"advantage_estimator": "rloo", "num_generations": 8},
    "gigpo": {"advantage_estimator": "gigpo", "num_generations": 8, **TOKEN_RATIO},
    "reinforce_plus_plus": {
        "advantage_estimator": "reinforce_plus_plus",
        "num_generations": 1,
        "gamma": 1.0,
        "loss_aggregation": "token",
        **TOKEN_RATIO,
    },
}
METHODS = {**WITH_CRITIC, **WITHOUT_CRITIC}
MAIN = ("steppo", "token_ppo", "token_ppo_gamma_lam_1")
OTHERS = tuple(name for name in METHODS if name not in MAIN)
ABLATION = {
    "full": "steppo",
    "without step GAE": "without_step_gae",
    "without step ratio": "without_step_ratio",
    "without both": "without_both",
}
PHASES = ("tuning", "result", "summary")

_GROUPS = {"main": MAIN, "others": OTHERS}

# Evaluated at the start and at the end alone: the curve is that of the episodes trained on.
EVERY_RUN = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1_000_000, "num_sample_generations": 0}
QUICK = {"total_episodes": 64, "per_device_train_batch_size": 32}  # that it runs, not that it learns


@dataclass(frozen=True, eq=False)
class Task:
    """
    What is trained on.

    Args:
        name (`str`):
            Its folder in the results.
        script (`str`):
            The example that plays it.
        config (`str`):
            The example's configuration, for the methods with a critic.
        group_config (`str`, *optional*):
            The same for those without; `None`: they are not run.
        score (`str`):
            The environment's score.
        flags (`Mapping[str, Any]`):
            The script's flags.
        response_tokens (`int`):
            About how long a response is. A step's ratio is the geometric mean of its tokens' ratios, so where a few
            tokens decide it moves by a fraction of theirs: its clip range is the tokens' over this length. (Published
            ones, of 3e-4 and 4e-4 for responses of some hundred tokens, are of that size.)
        rates (`tuple[float, ...]`):
            The grid of learning rates, the same for every method, each twice the one before.
        result_seeds (`Mapping[str, int]`):
            Number of seeds of each method.
    """

    name: str
    script: str
    config: str
    group_config: str | None
    score: str
    flags: Mapping[str, Any]
    response_tokens: int
    rates: tuple[float, ...]
    result_seeds: Mapping[str, int]


MINI_WIKI = Task(
    name="mini_wiki",
    script="hotpotqa_steppo.py",
    config="mini_wiki.yaml",
    group_config="mini_wiki_group.yaml",
    score="exact_match",
    flags={
        "model_name_or_path": "mini_wiki_thinking",
        "response_length": 64,
        "total_episodes": 1536,
        "per_device_train_batch_size": 64,
    },
    response_tokens=40,
    rates=(2e-4, 4e-4, 8e-4),
    result_seeds=dict.fromkeys(METHODS, 8),
)


def rooms(num_rooms: int, num_words: int) -> Task:
    """The rooms of one size."""
    return Task(
        name=f"rooms_h{num_rooms}_l{num_words}",
        script="rooms_steppo.py",
        config="rooms.yaml",
        group_config=None,
        score="score",
        flags={"max_interaction_steps": num_rooms, "response_length": num_words},
        response_tokens=num_words,
        rates=(5e-4, 1e-3, 2e-3),
        result_seeds=dict.fromkeys(MAIN, 3),
    )


# One axis at a time
ROOMS_BY_STEPS = {steps: rooms(steps, 32) for steps in (3, 6, 12)}
ROOMS_BY_TOKENS = {tokens: rooms(6, tokens) for tokens in (8, 32, 128)}
ROOMS_AXES = {"steps of an episode (H), L = 32": ROOMS_BY_STEPS, "tokens of a response (L), H = 6": ROOMS_BY_TOKENS}
TASKS = {
    "mini_wiki": [MINI_WIKI],
    "rooms": list({task.name: task for axis in ROOMS_AXES.values() for task in axis.values()}.values()),
}


@dataclass(frozen=True, order=True)
class Cell:
    """One run of the study."""

    task: str
    phase: str
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its name in the phase's folder."""
        return f"{self.method}_lr{self.learning_rate:g}_seed{self.seed}"


@dataclass(frozen=True)
class Record:
    """
    What is kept of a run.

    Args:
        episodes (`list[int]`):
            Played by the end of each update.
        sampled (`list[float]`):
            The mean score of each update's episodes.
        greedy_start, greedy_end (`float`):
            The score on the evaluation rows before and after.
        explained_variance (`list[float | None]`):
            Of the critic, by update.
        clip_fraction (`list[float | None]`):
            Share of ratios beyond the clip range, by update; `None` where the critic was trained alone.
        response_tokens, episode_steps (`list[float]`, *optional*):
            Tokens of a response and steps of an episode, in the mean of each update. `None` in older files.
        seconds (`float`):
            The whole process.
        processor, commit, command (`str`):
            What it ran on, and how.
        staleness (`list[float]`, *optional*):
            Updates between the weights that sampled a step and those that trained on it, in the mean of each update.
        inputs (`dict[str, str]`, *optional*):
            Hashes of the files it read: its configuration, and the policy. `None` in the oldest records.
    """

    episodes: list[int]
    sampled: list[float]
    greedy_start: float
    greedy_end: float
    explained_variance: list[float | None]
    clip_fraction: list[float | None]
    seconds: float
    processor: str
    commit: str | None
    command: str
    response_tokens: list[float] | None = None
    episode_steps: list[float] | None = None
    staleness: list[float] | None = None
    inputs: dict[str, str] | None = None

    @property
    def area(self) -> float:
        """Under the learning curve, over its length."""
        return mean(self.sampled)


@dataclass
class StudyArguments(BenchmarkArguments):
    """
    Args:
        tasks (`list[str]`, *optional*, defaults to all):
            `mini_wiki`, `rooms`.
        methods (`list[str]`, *optional*, defaults to all):
            Names of methods; `main` and `others` stand for several.
        phases (`list[str]`, *optional*, defaults to both):
            `tuning`, `result`; `summary` alone plays nothing. What is there is summed up in any case.
        parallel (`int`, *optional*):
            Runs at a time, of one thread each. `None`: one for each core.
        results_dir (`str`, *optional*, defaults to `"benchmarks/results/step_vs_token"`):
            Where a small file of each run is kept, and the figures. `--quick` writes to `quick` in `runs_dir`.
        runs_dir (`str`, *optional*, defaults to `"runs/step_vs_token"`):
            Where the runs write.
    """

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks, in order."})
    methods: list[str] = field(
        default_factory=lambda: ["main", "others"],
        metadata={"help": "Methods; `main` and `others` stand for several."},
    )
    phases: list[str] = field(
        default_factory=lambda: list(PHASES), metadata={"help": "tuning, result; summary alone plays nothing."}
    )
    parallel: int | None = field(default=None, metadata={"help": "Runs at a time. None: one for each core."})
    results_dir: str = field(
        default="benchmarks/results/step_vs_token", metadata={"help": "Where a file of each run is kept."}
    )
    runs_dir: str = field(default="runs/step_vs_token", metadata={"help": "Where the runs write."})


# -- what a run is ----------------------------------------------------------------------------------------------------


def run_of(task: Task, cell: Cell, runs_dir: Path, extra: Mapping[str, Any]) -> Run:
    """The process of a cell, with every setting that differs from the task's configuration as a flag."""
    with_critic = cell.method in WITH_CRITIC
    config = task.config if with_critic else task.group_config
    flags: dict[str, Any] = {
        "config": os.path.relpath(EXAMPLES / "configs" / str(config)),
        **task.flags,
        **EVERY_RUN,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
    }
    if with_critic:
        flags |= {"critic_learning_rate": cell.learning_rate * CRITIC_OVER_POLICY, "gamma": 0.99, "lam": 0.95}
    method = METHODS[cell.method]
    ratio_tokens = 1 if "importance_sampling_level" in method else task.response_tokens
    flags |= {"cliprange": TOKEN_CLIPRANGE / ratio_tokens, **method, **extra}
    return example_run(task.script, runs_dir / cell.task / cell.phase / cell.name, flags)


def record_of(run: Run, score: str) -> Record:
    """What is kept of a finished run."""
    history = run.history()
    updates = updates_of(history)
    greedy = [logs[f"eval_{score}"] for logs in history if f"eval_{score}" in logs]
    return Record(
        episodes=[int(logs["episode"]) for logs in updates],
        sampled=[logs[f"env/{score}"] for logs in updates],
        greedy_start=greedy[0],
        greedy_end=greedy[-1],
        explained_variance=[logs.get("critic/explained_variance") for logs in updates],
        clip_fraction=[logs.get("policy/clipfrac_avg") for logs in updates],
        seconds=run.seconds,
        processor=processor_name(),
        commit=run.commit,
        command=run.command,
        response_tokens=[logs["rollout/response_tokens"] for logs in updates],
        episode_steps=[logs["env/episode_steps"] for logs in updates],
        staleness=[logs.get("rollout/staleness", 0.0) for logs in updates],
        inputs=run.played_hashes,
    )


def processor_name() -> str:
    """The processor's model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# -- the files of the runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """The directory with a file for each run."""

    root: Path

    def path(self, cell: Cell) -> Path:
        """Where a run's file is."""
        return self.root / cell.task / cell.phase / f"{cell.name}.json"

    def holds(self, cell: Cell) -> bool:
        """Whether the run is done."""
        return self.path(cell).is_file()

    def read(self, cell: Cell) -> Record:
        """What is kept of a run."""
        return Record(**json.loads(self.path(cell).read_text())["record"])

    def write(self, cell: Cell, record: Record) -> None:
        """Keep it: whole, or not at all."""
        with durable.file(self.path(cell)) as partial:
            partial.write_text(json.dumps({"run": asdict(cell), "record": asdict(record)}) + "\n")

    def areas(self, cells: Iterable[Cell]) -> dict[Cell, float | None]:
        """Under the curve of each; `None` for those that are not done."""
        return {cell: self.read(cell).area if self.holds(cell) else None for cell in cells}

    def records(self, cells: Iterable[Cell]) -> dict[Cell, Record]:
        """Those that are done."""
        return {cell: self.read(cell) for cell in cells if self.holds(cell)}


# -- the plan ---------------------------------------------------------------------------------------------------------


def tuning_cells(task: Task, method: str, rates: Iterable[float]) -> list[Cell]:
    """A method at some learning rates."""
    return [Cell(task.name, "tuning", method, rate, seed) for seed in TUNING_SEEDS for rate in rates]


def tuning_of(task: Task, method: str, store: Store) -> list[Cell]:
    """
    The grid of a method, the same for every method; with the next rate beyond an end at which the best one is, as far
    as that is known from what was played, so that in the end it is between two that are worse.
    """
    rates = task.rates
    for _ in range(MOST_BEYOND):
        best = best_rate(store.areas(tuning_cells(task, method, rates)))
        if best == rates[0]:
            rates = (rates[0] / 2, *rates)
        elif best == rates[-1]:
            rates = (*rates, rates[-1] * 2)
        else:
            break
    return tuning_cells(task, method, rates)


def best_rate(areas: Mapping[Cell, float | None]) -> float | None:
    """
    The learning rate whose area under the learning curve is the largest in the mean over the tuning seeds.

    Args:
        areas (`Mapping[Cell, float | None]`):
            The areas of one method's grid; `None`: it was not played yet.

    Returns:
        `float`: `None` while the grid is not complete.
    """
    by_rate: dict[float, list[float]] = {}
    for cell, area in areas.items():
        if area is None:
            return None
        by_rate.setdefault(cell.learning_rate, []).append(area)
    return max(by_rate, key=lambda rate: mean(by_rate[rate]))


def result_cells(task: Task, methods: Iterable[str], rates: Mapping[str, float]) -> list[Cell]:
    """Seed by seed, so that methods can be compared before all seeds are done."""
    cells = [
        Cell(task.name, "result", method, rates[method], seed)
        for method in methods
        if method in rates
        for seed in range(1, task.result_seeds.get(method, 0) + 1)
    ]
    return sorted(cells, key=lambda cell: cell.seed)


def stages(args: StudyArguments) -> list[tuple[str, tuple[str, ...]]]:
    """The parts of the study in the order of their use: the main comparison of every task, then the other methods."""
    asked = set(args.methods) | {name for group, of in _GROUPS.items() if group in args.methods for name in of}
    unknown = asked - set(METHODS) - set(_GROUPS)
    if unknown or set(args.tasks) - set(TASKS) or set(args.phases) - set(PHASES):
        raise SystemExit(
            f"choose --methods of {', '.join([*_GROUPS, *METHODS])}; --tasks of {', '.join(TASKS)}; "
            f"--phases of {', '.join(PHASES)}"
        )
    parts = [
        (task, tuple(name for name in group if name in asked)) for group in _GROUPS.values() for task in args.tasks
    ]
    return [(task, methods) for task, methods in parts if methods]


def play_cells(cells: Sequence[Cell], tasks: Mapping[str, Task], store: Store, args: StudyArguments) -> list[Run]:
    """Play those that are not done, and keep what they show."""
    extra = QUICK if args.quick else {}
    planned = {run_of(tasks[cell.task], cell, Path(args.runs_dir), extra): cell for cell in cells}
    refuse_other_settings((run, cell, store) for run, cell in planned.items())
    runs = {run: cell for run, cell in planned.items() if not store.holds(cell)}

    def keep(run: Run) -> None:
        cell = runs[run]
        record = record_of(run, tasks[cell.task].score)
        store.write(cell, record)
        print(f"{cell.task} {cell.phase} {cell.name}: area {record.area:.3f}, {record.seconds:.0f} s", flush=True)

    return play(runs, parallel=args.parallel or os.cpu_count() or 1, num_threads=1, on_finish=keep)


def refuse_other_settings(planned: Iterable[tuple[Run, Cell, Store]]) -> None:
    """Raise if what is kept was played with other settings, or other files, than what would be played now."""
    for run, cell, store in planned:
        if not store.holds(cell):
            continue
        kept = store.read(cell)
        changed = changed_inputs(under_current_names(kept.inputs), run.hashes())
        if settings_in(kept.command) != settings_in(run.command) or changed:
            raise SystemExit(
                f"{store.path(cell)} was played with other settings than those of this study; remove it and "
                f"{run.output_dir}, or name another --results_dir and --runs_dir\nthere: {kept.command}\n"
                f"here:  {run.command}\nfiles that have changed since: {', '.join(changed) or 'none that it knows of'}"
            )


def chosen_rates(task: Task, store: Store) -> dict[str, float]:
    """The rates of all methods that are tuned."""
    best = {method: best_rate(store.areas(tuning_of(task, method, store))) for method in task.result_seeds}
    return {method: rate for method, rate in best.items() if rate is not None}


def tune(tasks: Mapping[str, Task], methods: Iterable[str], store: Store, args: StudyArguments) -> list[Run]:
    """Play the grids, until no best rate is at an end of one. Returns the runs that failed."""
    pairs = [(task, method) for task in tasks.values() for method in methods if method in task.result_seeds]
    while True:
        grids = chain(*(tuning_of(task, method, store) for task, method in pairs))
        # Seed by seed, and the methods of a task at one rate together
        cells = sorted(grids, key=lambda cell: (cell.seed, cell.task, cell.learning_rate))
        failed = play_cells(cells, tasks, store, args)
        if failed or all(store.holds(cell) for task, method in pairs for cell in tuning_of(task, method, store)):
            return failed


def run_study(args: StudyArguments, store: Store) -> list[Run]:
    """Play everything that is asked for and not done. Returns the runs that failed."""
    failed: list[Run] = []
    for group, methods in stages(args):
        tasks = {task.name: task for task in TASKS[group]}
        if "tuning" in args.phases:
            failed += tune(tasks, methods, store, args)
        if "result" in args.phases:
            rates = {name: chosen_rates(task, store) for name, task in tasks.items()}
            cells = [cell for name, task in tasks.items() for cell in result_cells(task, methods, rates[name])]
            failed += play_cells(sorted(cells, key=lambda cell: cell.seed), tasks, store, args)
    return failed


# -- what it shows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One method on one task, summed up over its seeds."""

    learning_rate: float
    num_seeds: int
    greedy_start: float
    final_greedy: Interval
    final_sampled: Interval
    area: Interval
    episodes_to_token_ppo: float | None
    steppo_larger: Interval | None  # how likely the area of a StepPO run is larger than one of its
    steppo_greedier: Interval | None  # the same of the greedy score at the end
    explained_variance: float | None
    clip_fraction: float
    seconds: float


def summarize(records: Mapping[str, Sequence[Record]], rates: Mapping[str, float]) -> dict[str, Summary]:
    """
    Args:
        records (`Mapping[str, Sequence[Record]]`):
            The runs of each method, for the result.
        rates (`Mapping[str, float]`):
            Its learning rate.
    """
    areas = {method: [record.area for record in runs] for method, runs in records.items()}
    greedy = {method: [record.greedy_end for record in runs] for method, runs in records.items()}
    curves = {method: [record.sampled for record in runs] for method, runs in records.items()}
    threshold = (
        float(interquartile_mean(final_sampled(curves["token_ppo"]))) - 1e-9 if "token_ppo" in curves else np.inf
    )

    def steppo_above(scores: Mapping[str, Sequence[float]], method: str) -> Interval | None:
        is_other = "steppo" in scores and method != "steppo"
        return probability_of_improvement(scores["steppo"], scores[method]) if is_other else None

    summaries = {}
    for method, runs in records.items():
        episodes = episodes_to_reach(curves[method], runs[0].episodes, threshold)
        explained = [value for run in runs for value in run.explained_variance if value is not None]
        summaries[method] = Summary(
            learning_rate=rates[method],
            num_seeds=len(runs),
            greedy_start=mean(run.greedy_start for run in runs),
            final_greedy=interval(greedy[method]),
            final_sampled=interval([float(value) for value in final_sampled(curves[method])]),
            area=interval(areas[method]),
            episodes_to_token_ppo=episodes if np.isfinite(episodes) else None,
            steppo_larger=steppo_above(areas, method),
            steppo_greedier=steppo_above(greedy, method),
            explained_variance=mean(explained) if explained else None,
            clip_fraction=mean(value for run in runs for value in run.clip_fraction if value is not None),
            seconds=mean(run.seconds for run in runs),
        )
    return summaries


def shown(bounds: Interval, digits: int = 3) -> str:
    """An interval for people."""
    low, estimate, high = ("-" if bound is None else f"{bound:.{digits}f}" for bound in bounds)
    return f"{estimate} ({low} to {high})"


def print_summaries(task: Task, summaries: Mapping[str, Summary]) -> None:
    """The tables of one task."""
    print_table(
        f"{task.name}: interquartile means (95 % intervals over seeds)",
        ["method", "greedy, end", "sampled, end", "area"],
        [
            [method, shown(found.final_greedy), shown(found.final_sampled), shown(found.area)]
            for method, found in summaries.items()
        ],
    )
    print_table(
        f"{task.name}: episodes to token PPO's final sampled score; how likely a StepPO run is better; clipped ratios",
        ["method", "rate", "seeds", "episodes", "area", "greedy", "clipped"],
        [
            [
                method,
                f"{found.learning_rate:g}",
                str(found.num_seeds),
                "-" if found.episodes_to_token_ppo is None else f"{found.episodes_to_token_ppo:.0f}",
                "-" if found.steppo_larger is None else shown(found.steppo_larger, 2),
                "-" if found.steppo_greedier is None else shown(found.steppo_greedier, 2),
                f"{found.clip_fraction:.4f}",
            ]
            for method, found in summaries.items()
        ],
    )


def print_ablation(task: str, summaries: Mapping[str, Summary]) -> None:
    """The table of the paper's form, of the parts that are there, where some are left out."""
    parts = {label: summaries[method] for label, method in ABLATION.items() if method in summaries}
    if len(parts) < 2:
        return
    print_table(
        f"{task}: what StepPO's parts do",
        ["StepPO", "greedy, end", "sampled, end", "area"],
        [
            [label, shown(found.final_greedy), shown(found.final_sampled), shown(found.area)]
            for label, found in parts.items()
        ],
    )


def figures_of(records: Mapping[str, Sequence[Record]], summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """A task's figures for the record."""
    ratio: Interval = [None, None, None]
    if {"steppo", "token_ppo"} <= set(records):
        curves = {method: [run.sampled for run in records[method]] for method in ("steppo", "token_ppo")}
        ratio = episodes_ratio(curves["steppo"], curves["token_ppo"], records["steppo"][0].episodes)
    return {
        "final_em": {method: found.final_greedy for method, found in summaries.items()},
        "episodes_ratio": ratio[1],
        "episodes_ratio_interval": ratio,
        "summaries": {method: asdict(found) for method, found in summaries.items()},
        "ablation": {label: asdict(summaries[name]) for label, name in ABLATION.items() if name in summaries},
        "curves": {
            method: {"episodes": runs[0].episodes, "sampled": curve_interval([run.sampled for run in runs])}
            for method, runs in records.items()
        },
    }


def gather(store: Store, rates: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The figures of every task that has runs for the result, printed as well."""
    figures: dict[str, Any] = {}
    for task in chain(*TASKS.values()):
        records: dict[str, list[Record]] = {}
        for cell, record in store.records(result_cells(task, METHODS, rates[task.name])).items():
            records.setdefault(cell.method, []).append(record)
        if records:
            summaries = summarize(records, rates[task.name])
            print_summaries(task, summaries)
            print_ablation(task.name, summaries)
            figures[task.name] = figures_of(records, summaries)
    return figures


def draw(figures: Mapping[str, Any], directory: Path) -> None:
    """An image for each task, and one of the rooms' axes."""
    for name, found in figures.items():
        plot_task(directory / f"{name}.png", name, found)
    axes = {
        label: {value: figures[task.name]["summaries"] for value, task in by_value.items() if task.name in figures}
        for label, by_value in ROOMS_AXES.items()
    }
    if all(axes.values()):
        plot_axes(directory / "rooms.png", axes)


def in_short(args: StudyArguments) -> StudyArguments:
    """What `--quick` does: no tuning, two methods, one seed, two updates, and nothing kept among the results."""
    directory = Path(args.runs_dir) / "quick"
    return replace(
        args,
        tasks=["mini_wiki"],
        methods=["steppo", "token_ppo"],
        results_dir=str(directory / "results"),
        runs_dir=str(directory),
    )


def play_in_short(args: StudyArguments, store: Store, rates: Mapping[str, float]) -> list[Run]:
    """One short run of each method."""
    cells = [Cell("mini_wiki", "result", method, rate, 1) for method, rate in rates.items()]
    return play_cells(cells, {"mini_wiki": MINI_WIKI}, store, args)


def main(args: StudyArguments) -> None:
    args = in_short(args) if args.quick else args
    store = Store(Path(args.results_dir))
    if args.quick:
        rates: dict[str, dict[str, float]] = {task.name: {} for task in chain(*TASKS.values())}
        rates["mini_wiki"] = dict.fromkeys(args.methods, MINI_WIKI.rates[1])
        failed = play_in_short(args, store, rates["mini_wiki"])
    else:
        failed = run_study(args, store)
        rates = {task.name: chosen_rates(task, store) for task in chain(*TASKS.values())}
    figures = gather(store, rates)
    draw(figures, store.root)
    write_record(args.json, {**figures.get("mini_wiki", {}), "tasks": figures, "rates": rates})
    refuse_failures(failed)


if __name__ == "__main__":
    main(parse_arguments(StudyArguments))
