"""A description of what a run trains on. Runs that differ in it are not repetitions of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial

from torch import nn

from ..compat.transformers import source_of
from ..learning.estimators import Estimator, is_built_in
from ..learning.own_functions import OwnAdvantages, OwnReturns
from ..types import Model
from .data_stream import RowSource, SizedRows, checksum
from .sources import source_hash
from .steppo_config import StepPOConfig

_NAMES = ("__qualname__", "__name__")  # attributes of callables with their name, the best first
_PLAIN = (str, int, float, bool, type(None))


def describe_task(
    *,
    model: Model,
    train_dataset: RowSource | None,
    eval_dataset: RowSource | Mapping[str, RowSource] | None,
    environment_factory: Callable[..., object] | Mapping[str, Callable[..., object]] | None,
    tools: Sequence[Callable[..., object]] | None,
    reward_funcs: Sequence[Callable[..., object]] | None,
    reward_model: nn.Module | None,
    agent: Callable[..., object] | str | Sequence[str] | None,
    estimator: Estimator,
    policy_loss_fn: Callable[..., object] | None,
) -> dict[str, object]:
    """
    Describe what a run trains on. The description is the same for runs that train on the same.

    Args:
        model, reward_model ([`~transformers.PreTrainedModel`]):
            Described by where they were loaded from.
        train_dataset, eval_dataset (`Dataset`, `Sequence[dict]` or `dict` of them):
            Described by their number of rows, with a checksum of the first and the last.
        environment_factory, tools, reward_funcs, agent:
            As the trainer takes them; described by their names, and by a hash of their sources. Plain values that a
            `partial` gives an environment are listed one by one, as in `environment_top_k`.
        estimator ([`Estimator`]), policy_loss_fn (`Callable`, *optional*):
            What an update is made with; described by a hash of its source, the loss also by its name. Plain values
            that a `partial` gives them are listed, as in `advantage_estimator_alpha`.

    Returns:
        `dict[str, object]`: The description by subject; `None` for subjects that a run does not have.
    """
    factories: list[Callable[..., object]] = []
    if isinstance(environment_factory, Mapping):
        factories = list(environment_factory.values())
    elif environment_factory is not None:
        factories = [environment_factory]
    players = [*factories, *(tools or ()), *([agent] if agent else [])]
    settings = environment_factory.keywords if isinstance(environment_factory, partial) else {}
    scorers = ", ".join(_name_of(function) for function in reward_funcs or ())
    return {
        "model": _model_name(model),
        "data": _describe_rows(train_dataset),
        "evaluation_data": _describe_rows(eval_dataset),
        "environment": ", ".join(_name_of(player) for player in players) or None,
        **{f"environment_{name}": value for name, value in settings.items() if isinstance(value, _PLAIN)},
        "environment_source": source_hash(*players),
        "reward": ", ".join(part for part in (scorers, _model_name(reward_model)) if part) or None,
        "reward_source": source_hash(*(reward_funcs or ())),
        "advantage_estimator_source": _estimator_source(estimator),
        **_plain_settings("advantage_estimator", _function_of(estimator)),
        "policy_loss_fn": None if policy_loss_fn is None else _name_of(policy_loss_fn),
        **_plain_settings("policy_loss_fn", policy_loss_fn),
        "policy_loss_fn_source": None if policy_loss_fn is None else source_hash(policy_loss_fn),
    }


def describe_trainer(kind: type) -> dict[str, object]:
    """The name of a trainer's class, and a hash of its source where it is a user's."""
    return {"trainer": kind.__name__, "trainer_source": source_hash(kind)}


def own_functions(args: StepPOConfig, task: Mapping[str, object]) -> dict[str, str | None]:
    """
    A user's functions that an update is made with, in words, by the names of the trainer's arguments.

    Args:
        args ([`StepPOConfig`]):
            The run's settings, with the name of its estimator.
        task (`dict`):
            Its description by [`describe_task`].
    """
    names = {
        "advantage_estimator": None if task["advantage_estimator_source"] is None else args.advantage_estimator,
        "policy_loss_fn": task["policy_loss_fn"],
    }
    return {
        argument: None if name is None else f"{name} ({task[f'{argument}_source'] or 'without source'})"
        for argument, name in ((key, _with_settings(key, name, task)) for key, name in names.items())
    }


def _with_settings(argument: str, name: object, task: Mapping[str, object]) -> str | None:
    """A function's name with the plain values that a `partial` gives it, as in `n_step n=2`."""
    if name is None:
        return None
    prefix = f"{argument}_"
    found = {key.removeprefix(prefix): value for key, value in task.items() if key.startswith(prefix)}
    return " ".join([str(name), *(f"{key}={value}" for key, value in found.items() if key != "source")])


def _plain_settings(argument: str, function: object) -> dict[str, object]:
    """Plain values that a `partial` gives a user's function, as in `advantage_estimator_n`, without seeds."""
    settings = function.keywords if isinstance(function, partial) else {}
    return {
        f"{argument}_{name}": value
        for name, value in settings.items()
        if isinstance(value, _PLAIN) and "seed" not in name.lower()
    }


def _function_of(estimator: Estimator) -> object:
    """The user's function of an [`Estimator.over_steps`]; `None` for other estimators."""
    parts = estimator.assign.keywords.values() if isinstance(estimator.assign, partial) else ()
    return next((part.function for part in parts if isinstance(part, OwnAdvantages | OwnReturns)), None)


def _estimator_source(estimator: Estimator) -> str | None:
    """A hash of an estimator's source and of what it says of itself; `None` for those of the package."""
    return None if is_built_in(estimator) else source_hash(estimator)


def _model_name(model: Model | nn.Module | None) -> str | None:
    """Where a model's weights are from, or else its class."""
    if model is None:
        return None
    return source_of(getattr(model, "config", None)) or type(model).__name__  # a reward model may be any module


def _describe_rows(dataset: RowSource | Mapping[str, RowSource] | None) -> str | None:
    if isinstance(dataset, Mapping):
        return "; ".join(f"{name}: {_describe_rows(rows)}" for name, rows in dataset.items())
    if dataset is None:
        return None
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)  # of a dataset from the hub
    if not isinstance(dataset, Sized):
        return ", ".join(part for part in (name, "streamed") if part)
    return ", ".join(part for part in (name, f"{len(dataset)} rows", _checksum(dataset)) if part)


def _checksum(dataset: SizedRows) -> str | None:
    """A checksum of the first row and the last, which is enough to distinguish two datasets of one size."""
    if not len(dataset):
        return None
    return checksum([dataset[0], dataset[len(dataset) - 1]])


def _name_of(player: Callable[..., object] | str | Sequence[str]) -> str:
    if isinstance(player, str):
        return player
    if not callable(player):
        return " ".join(player)
    if isinstance(player, partial):
        return _name_of(player.func)
    names = (getattr(player, name) for name in _NAMES if hasattr(player, name))
    return str(next(names, type(player).__name__))
