"""Groups runs into methods: runs that differ only in their seed repeat each other, others are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..types import JsonObject
from .runs import Run, short_names

# Settings that do not change what is learned: what is written and shown, and what saves memory
_IGNORED = {
    *("seed", "data_seed", "output_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub", "debug"),
    *("num_sample_generations", "log_episodes", "dump_episodes_dir", "resume_from_checkpoint", "local_rank"),
    *("do_train", "do_eval", "do_predict", "per_device_eval_batch_size", "skip_memory_metrics", "ddp_timeout"),
    *("versions", "rollout_cache_tokens", "max_concurrent_episodes", "prefix_sharing", "max_tokens_per_micro_batch"),
}
_IGNORED_PREFIXES = ("logging_", "log_level", "log_on", "save_", "eval_", "hub_", "trackio_", "dataloader_")

ALGORITHMS = {
    "step_gae": ("StepPO", "step"),
    "token_gae": ("token PPO", "token"),
    "grpo": ("GRPO", None),
    "rloo": ("RLOO", None),
    "gigpo": ("GiGPO", None),
    "reinforce_plus_plus": ("REINFORCE++", None),
}
"""
Title and usual ratio of estimators, as in [`ESTIMATORS`][trl_steppo.learning.estimators], which loads torch. Other
estimators are shown by their names.
"""


@dataclass(frozen=True)
class Method:
    """
    Runs that differ only in their seed.

    Args:
        name (`str`):
            Its name in the report.
        runs (`tuple[Run, ...]`):
            Its runs, in the order of their seeds.
    """

    name: str
    runs: tuple[Run, ...]


def group_runs(runs: Sequence[Run], names: Mapping[Path, str] | None = None) -> list[Method]:
    """
    Group runs into methods, in the order of their first runs.

    Args:
        runs (`Sequence[Run]`):
            The runs.
        names (`Mapping[Path, str]`, *optional*):
            Names of methods by the resolved directories of their runs. These are not grouped by their settings.

    Runs with equal settings and equal seeds cannot repeat each other: they differ in something that is not a setting.
    These, and runs without settings, are distinguished by the names of their directories, apart from a seed in the
    name.
    """
    named: dict[str, list[Run]] = {}
    unnamed: list[Run] = []
    for run in runs:
        name = (names or {}).get(run.directory.resolve())
        (unnamed if name is None else named.setdefault(name, [])).append(run)
    methods = [*(Method(name, _by_seed(members)) for name, members in named.items()), *_grouped(unnamed)]
    position = {run.directory: index for index, run in enumerate(runs)}
    return sorted(methods, key=lambda method: min(position[run.directory] for run in method.runs))


def _grouped(runs: Sequence[Run]) -> list[Method]:
    """Runs whose settings and directories tell to which methods they belong."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((_fingerprint(run), ""), []).append(run)
    named: dict[tuple[str, str], list[Run]] = {}
    for (fingerprint, _), members in groups.items():
        seeds = [run.seed for run in members]
        for run in members:
            needs_name = None in seeds or len(set(seeds)) < len(seeds)
            named.setdefault((fingerprint, _family(run.name) if needs_name else ""), []).append(run)
    members_of = list(named.values())
    names = _names(members_of, [family for _, family in named])
    return [Method(name, _by_seed(members)) for name, members in zip(names, members_of, strict=True)]


def _by_seed(members: Sequence[Run]) -> tuple[Run, ...]:
    return tuple(sorted(members, key=lambda run: (run.seed or 0, run.name)))


def differing_settings(methods: Sequence[Method]) -> dict[str, list[object]]:
    """The settings in which methods differ, with the value of each method."""
    settings = [relevant(method.runs[0]) for method in methods]
    names = dict.fromkeys(name for of_method in settings for name in of_method)
    values = {name: [of_method.get(name) for of_method in settings] for name in names}
    if "model" in values:
        values["model"] = _short_models(values["model"])
    return {name: by_method for name, by_method in values.items() if len(set(map(repr, by_method))) > 1}


def _short_models(models: Sequence[str | None]) -> list[str | None]:
    """The last parts of the models' paths, as many as are needed to distinguish them."""
    named = list(dict.fromkeys(_family(model) for model in models if model is not None))
    short = dict(zip(named, short_names([Path(name) for name in named]), strict=True))
    return [None if model is None else short[_family(model)] for model in models]


def relevant(run: Run) -> JsonObject:
    """The settings that may change what is learned."""
    return {
        name: value
        for name, value in (run.settings or {}).items()
        if value is not None and name not in _IGNORED and not name.startswith(_IGNORED_PREFIXES)
    }


def _fingerprint(run: Run) -> str:
    settings = relevant(run)
    if "model" in settings:  # each seed may start from its own policy, made with that seed
        settings["model"] = _family(settings["model"])
    return json.dumps(settings, sort_keys=True, default=repr)


def _family(name: str) -> str:
    """A directory's name without its seed."""
    return re.sub(r"[-_.]?seed[-_.=]?\d+", "", name, flags=re.IGNORECASE) or name


def _names(groups: Sequence[Sequence[Run]], families: Sequence[str]) -> list[str]:
    """The name of each method: its algorithm, and the settings that distinguish methods of the same algorithm."""
    algorithms = [_algorithm(group[0]) for group in groups]
    names = []
    for index, (algorithm, family) in enumerate(zip(algorithms, families, strict=True)):
        same = [i for i, other in enumerate(algorithms) if other == algorithm]
        differing = differing_settings([Method("", tuple(groups[i])) for i in same])
        details = [f"{setting}={values[same.index(index)]}" for setting, values in differing.items()]
        names.append(", ".join(part for part in (algorithm, *details, family) if part))
    return names


def _algorithm(run: Run) -> str:
    """The usual name of a run's algorithm, or that of its estimator; empty without settings."""
    settings = run.settings or {}
    estimator = str(settings.get("advantage_estimator") or "")
    title, usual_ratio = ALGORITHMS.get(estimator, (estimator, None))
    level = settings.get("importance_sampling_level")
    return title if usual_ratio in (None, level) else f"{title}, {level} ratio"
