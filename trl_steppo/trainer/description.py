"""A description of what a run trains on. Runs that differ in it are not repetitions of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial

from torch import nn

from ..compat.transformers import source_of
from ..types import Model
from .data_stream import RowSource, SizedRows, checksum

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
) -> dict[str, object]:
    """
    Describe what a run trains on. The description is the same for runs that train on the same.

    Args:
        model, reward_model ([`~transformers.PreTrainedModel`]):
            Described by where they were loaded from.
        train_dataset, eval_dataset (`Dataset`, `Sequence[dict]` or `dict` of them):
            Described by their number of rows, with a checksum of the first and the last.
        environment_factory, tools, reward_funcs, agent:
            As the trainer takes them; described by their names. Plain values that a `partial` gives an environment are
            listed one by one, as in `environment_top_k`.

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
        "reward": ", ".join(part for part in (scorers, _model_name(reward_model)) if part) or None,
    }


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
