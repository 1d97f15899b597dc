"""Groups runs into methods: runs that differ only in their seed repeat each other, others are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..types import JsonObject
from .runs import Run, short_names
from .trl_settings import as_our_settings

# Settings that do not change what is learned: what is written and shown, and what saves memory
_IGNORED = {
    *("seed", "data_seed", "output_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub", "debug"),
    *("num_sample_generations", "log_episodes", "dump_episodes_dir", "resume_from_checkpoint", "local_rank"),
    *("do_train", "do_eval", "do_predict", "per_device_eval_batch_size", "skip_memory_metrics", "ddp_timeout"),
    *("versions", "rollout_cache_tokens", "max_concurrent_episodes", "prefix_sharing", "max_tokens_per_micro_batch"),
    *("tracing", "local_rollout_forward_batch_size", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "use_cpu", "no_cuda", "torch_empty_cache_steps"),
    *("log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
    *("vllm_server_base_url", "vllm_server_timeout", "vllm_weights_dir", "vllm_server_host", "vllm_server_port"),
}
_IGNORED_PREFIXES = (
    *("logging_", "log_level", "log_on", "save_", "eval_", "hub_", "trackio_", "dataloader_", "environment_seed"),
)
_BUDGETS = ("total_episodes", "max_steps", "num_train_epochs", "num_total_batches")
_DERIVED = (
    *("world_size", "local_batch_size", "micro_batch_size", "mini_batch_size", "local_mini_batch_size"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
"""Sizes that say how an update is divided; `batch_size` says what is learned from."""
_FIRST = (
    *("model", "advantage_estimator", "policy_loss_fn", "learning_rate", "gamma", "lam", "cliprange", "kl_coef"),
    *("kl_loss_coef", "beta", "loss_type", "num_generations", "max_staleness", "environment", "reward", "data"),
)
"""Settings that people compare, which name methods before others do."""
_LAST = ("batch_size", *_BUDGETS)
_MAX_NAMED = 3  # settings in a method's name

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

_TRL = "trl."
_TRAINERS = ("StepPOTrainer", "PPOTrainer")  # whose settings say all


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

    Runs of one `run_name`, if it was set, and of equal settings, are one method. Those with equal seeds cannot repeat
    each other: they differ in something that is not a setting. These, and runs without settings, are distinguished by
    the names of their directories, apart from a seed in the name.
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
        groups.setdefault((_run_name(run), _fingerprint(run)), []).append(run)
    split: dict[tuple[str, str, Path | None], list[Run]] = {}
    for (title, fingerprint), members in groups.items():
        seeds = [run.seed for run in members]
        for run in members:
            needs_name = None in seeds or len(set(seeds)) < len(seeds)
            family = _family_of(run) if needs_name else None
            split.setdefault((title, fingerprint, family), []).append(run)
    members_of = list(split.values())
    families = [family for _, _, family in split]
    named = list(dict.fromkeys(family for family in families if family is not None))
    short = dict(zip(named, short_names(named), strict=True))
    names = _names(
        members_of,
        [title or _algorithm(members[0]) for (title, _, _), members in zip(split, members_of, strict=True)],
        ["" if family is None else short[family] for family in families],
    )
    return [Method(name, _by_seed(members)) for name, members in zip(names, members_of, strict=True)]


def _by_seed(members: Sequence[Run]) -> tuple[Run, ...]:
    return tuple(sorted(members, key=lambda run: (run.seed or 0, run.name)))


def differing_settings(methods: Sequence[Method]) -> dict[str, list[object]]:
    """
    The settings in which methods differ, with the value of each method. Between runs of different libraries, those of
    TRL are by our names, and only settings that both have are compared.
    """
    settings = [relevant(method.runs[0]) for method in methods]
    of_trl = [_is_trl(method.runs[0]) for method in methods]
    if len(set(of_trl)) == 2:
        settings = _comparable(methods)
    names = dict.fromkeys(name for of_method in settings for name in of_method)
    values = {name: [of_method.get(name) for of_method in settings] for name in names}
    if "model" in values:
        values["model"] = _short_models(values["model"])
    return {name: by_method for name, by_method in values.items() if len(set(map(repr, by_method))) > 1}


def _comparable(methods: Sequence[Method]) -> list[JsonObject]:
    """The settings of methods of both libraries, by our names: those that a run of each kind has."""
    runs = [method.runs[0] for method in methods]
    theirs = {run.name: as_our_settings(run.settings or {}) for run in runs if _is_trl(run)}
    ours = {run.name: run.settings or {} for run in runs if not _is_trl(run)}
    shared = set().union(*theirs.values()) & set().union(*ours.values())
    given = [{**theirs, **ours}[run.name] for run in runs]
    order = dict.fromkeys(name for of_run in given for name in of_run if name in shared)
    return [{name: of_run[name] for name in order if of_run.get(name) is not None} for of_run in given]


def _short_models(models: Sequence[str | None]) -> list[str | None]:
    """The last parts of the models' paths, as many as are needed to distinguish them."""
    named = list(dict.fromkeys(_family(model) for model in models if model is not None))
    short = dict(zip(named, short_names([Path(name) for name in named]), strict=True))
    return [None if model is None else short[_family(model)] for model in models]


def relevant(run: Run) -> JsonObject:
    """The settings that may change what is learned."""
    settings = run.settings or {}
    ignored = {*_IGNORED, *(_DERIVED if settings.get("batch_size") else ())}
    if settings.get("trainer") in _TRAINERS:
        ignored.add("trainer")
    return {
        name: value
        for name, value in settings.items()
        if value is not None and name not in ignored and not name.startswith(_IGNORED_PREFIXES)
    }


def _fingerprint(run: Run) -> str:
    settings = relevant(run)
    if "model" in settings:  # each seed may start from its own policy, made with that seed
        settings["model"] = _family(settings["model"])
    return json.dumps(settings, sort_keys=True, default=repr)


# -- names ------------------------------------------------------------------------------------------------------------


def _run_name(run: Run) -> str:
    """The `run_name` that a user has given, without its seed; transformers may set it to `output_dir`."""
    settings = run.settings or {}
    name = settings.get("run_name")
    return "" if not name or name == settings.get("output_dir") else _family(str(name), run.seed)


def _family(name: str, seed: int | None = None) -> str:
    """A name or path without its seed, as in `run_seed3`, `run-s3` or `run/3`; `seed`: the run's, if it is known."""
    first, *others = name.split("/")
    parts = [_without_seed(first, seed), *(_without_seed(part, seed) for part in others)]
    return "/".join(parts[:1] + [part for part in parts[1:] if part]) or name


def _without_seed(part: str, seed: int | None) -> str:
    def without(found: re.Match[str]) -> str:
        return "" if seed is None or int(found[1]) == seed else found[0]

    short = re.sub(r"[-_. ]?seed[-_.= ]?\d+", "", part, flags=re.IGNORECASE)
    short = re.sub(r"(?:^|[-_. ])s[-_.=]?(\d+)(?![^-_. ])", without, short, flags=re.IGNORECASE)
    short = re.sub(r"^(\d+)$", without, short)
    return short if short == part else short.lstrip("-_. ")


def _family_of(run: Run) -> Path:
    """A run's directory without its seed."""
    return Path(_family(str(run.directory), run.seed))


def _names(groups: Sequence[Sequence[Run]], titles: Sequence[str], families: Sequence[str]) -> list[str]:
    """
    The name of each method: its title, which is its algorithm or its `run_name`, and the fewest settings that
    distinguish it from the methods of the same title.
    """
    names = []
    for index, (title, family) in enumerate(zip(titles, families, strict=True)):
        same = [i for i, other in enumerate(titles) if other == title]
        details = _details([Method("", tuple(groups[i])) for i in same])[same.index(index)]
        names.append(", ".join(part for part in (title, *details, family) if part))
    return [name if names.count(name) == 1 else f"{name} ({groups[i][0].name})" for i, name in enumerate(names)]


def _details(methods: Sequence[Method]) -> list[list[str]]:
    """The few settings that distinguish methods, in words, for each of them."""
    differing = differing_settings(methods)
    chosen: list[str] = []
    classes = [""] * len(methods)
    for name in sorted(differing, key=_rank):
        finer = [f"{seen}, {value!r}" for seen, value in zip(classes, differing[name], strict=True)]
        if len(set(finer)) > len(set(classes)) and len(chosen) < _MAX_NAMED:
            chosen.append(name)
            classes = finer
    return [[_in_words(name, differing[name][index]) for name in chosen] for index in range(len(methods))]


def _rank(name: str) -> tuple[int, int]:
    """Which settings come first in names: those that people compare; hashes and budgets come last."""
    if name in _FIRST:
        return 0, _FIRST.index(name)
    return (3, _LAST.index(name)) if name in _LAST else (2 if name.endswith("_source") else 1, 0)


def _in_words(name: str, value: object) -> str:
    if name.endswith("_source"):
        return f"{name.removesuffix('_source')} {str(value)[:6]}"
    for function in ("advantage_estimator_", "policy_loss_fn_"):  # a value that a `partial` gives it
        name = name.removeprefix(function)
    return f"{name}={value}"


def _algorithm(run: Run) -> str:
    """The usual name of a run's algorithm, with a user's own loss and trainer; empty without settings."""
    settings = run.settings or {}
    trainer = str(settings.get("trainer") or "")
    if trainer.startswith(_TRL):
        return f"{trainer.removeprefix(_TRL)} (TRL)" if trainer != _TRL else "TRL"
    estimator = str(settings.get("advantage_estimator") or "")
    title, usual_ratio = ALGORITHMS.get(estimator, (estimator, None))
    level = settings.get("importance_sampling_level")
    parts = [title] if usual_ratio in (None, level) else [f"{title}, {level} ratio"]
    parts += [str(settings["policy_loss_fn"])] if settings.get("policy_loss_fn") else []
    parts += [trainer] if trainer and trainer not in _TRAINERS else []
    return ", ".join(part for part in parts if part)


def _is_trl(run: Run) -> bool:
    return str((run.settings or {}).get("trainer")).startswith(_TRL)
