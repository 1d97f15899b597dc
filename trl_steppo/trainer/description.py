"""What a run trains on, in words: its settings do not hold it, and runs that differ in it are not repetitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import Any

from ..compat.transformers import source_of
from .data_stream import checksum

_NAMES = ("__qualname__", "__name__")  # of what can be called, the best first
_PLAIN = (str, int, float, bool, type(None))


def describe_task(
    *,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    environment_factory: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None,
    tools: Sequence[Callable[..., Any]] | None,
    reward_funcs: Sequence[Callable[..., Any]] | None,
    reward_model: Any,
    agent: Callable[..., Any] | str | Sequence[str] | None,
) -> dict[str, Any]:
    """
    Args:
        model, reward_model ([`~transformers.PreTrainedModel`]):
            By where they were loaded from.
        train_dataset, eval_dataset (`Dataset`, `Sequence[dict]` or `dict` of them):
            By their number of rows, with a checksum of the first and the last.
        environment_factory, tools, reward_funcs, agent:
            As the trainer takes them; by their names. The plain values that a `partial` gives an environment are
            told one by one: `environment_top_k`.

    Returns:
        `dict[str, Any]`: The same for runs that train on the same. `None` where there is none.
    """
    factories: list[Any] = [environment_factory] if environment_factory else []
    if isinstance(environment_factory, Mapping):
        factories = list(environment_factory.values())
    players = [*factories, *(tools or ()), *([agent] if agent else [])]
    given = environment_factory.keywords if isinstance(environment_factory, partial) else {}
    scorers = ", ".join(_name_of(function) for function in reward_funcs or ())
    return {
        "model": _model_name(model),
        "data": _describe_rows(train_dataset),
        "evaluation_data": _describe_rows(eval_dataset),
        "environment": ", ".join(_name_of(player) for player in players) or None,
        **{f"environment_{name}": value for name, value in given.items() if isinstance(value, _PLAIN)},
        "reward": ", ".join(part for part in (scorers, _model_name(reward_model)) if part) or None,
    }


def _model_name(model: Any) -> str | None:
    """Where its weights are from; of one that was made here its class."""
    if model is None:
        return None
    return source_of(getattr(model, "config", None)) or type(model).__name__  # a reward model may be any module


def _describe_rows(dataset: Any) -> str | None:
    if isinstance(dataset, dict):
        return "; ".join(f"{name}: {_describe_rows(rows)}" for name, rows in dataset.items())
    if dataset is None:
        return None
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)  # of those of the hub
    if not isinstance(dataset, Sized):
        return ", ".join(part for part in (name, "streamed") if part)
    return ", ".join(part for part in (name, f"{len(dataset)} rows", _checksum(dataset)) if part)


def _checksum(dataset: Any) -> str | None:
    """Of the first row and the last: enough to tell two data sets of one size apart."""
    if not len(dataset):
        return None
    return checksum([dataset[0], dataset[len(dataset) - 1]])


def _name_of(player: Callable[..., Any] | str | Sequence[str]) -> str:
    if isinstance(player, str):
        return player
    if not callable(player):
        return " ".join(player)
    if isinstance(player, partial):
        return _name_of(player.func)
    return next((getattr(player, name) for name in _NAMES if hasattr(player, name)), type(player).__name__)
