"""Which rank learns from which steps: each from its own, or all of them from equal shares of all steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import TypeVar

import torch
from accelerate import PartialState
from torch.nn.functional import pad

from ..batching import LayoutName, divide
from ..types import Episode
from .ranks import gather_objects
from .update import Credit, Lesson, Rollout, Scores, Steps

Tensors = TypeVar("Tensors", Scores, Credit)


def own_lesson(rollout: Rollout, scores: Scores, credit: Credit) -> Lesson:
    """The steps of this rank."""
    return Lesson(rollout.steps, scores, credit, [len(rollout.episodes)], 0)


def lesson_of_all_ranks(rollout: Rollout, scores: Scores, credit: Credit) -> Lesson:
    """The steps of all ranks, the same on each of them. Collective: every rank must call this."""
    if PartialState().num_processes == 1:
        return own_lesson(rollout, scores, credit)
    device = rollout.batch.rewards.device
    own_part = (list(map(_stripped, rollout.episodes)), _moved(scores, "cpu"), _moved(credit, "cpu"))
    episodes, scores_of_ranks, credit_of_ranks = zip(*gather_objects([own_part]), strict=True)
    return Lesson(
        Steps.of([episode for of_rank in episodes for episode in of_rank]),
        _moved(_joined(scores_of_ranks), device),
        _moved(_joined(credit_of_ranks), device),
        list(map(len, episodes)),
        PartialState().process_index,
    )


def own_share(lesson: Lesson, chosen: Sequence[Sequence[int]], layout: LayoutName) -> list[int]:
    """
    The episodes of a mini-batch that this rank forwards.

    Args:
        lesson ([`Lesson`]):
            What is learned.
        chosen (`Sequence[Sequence[int]]`):
            For each rank of the lesson, which of its episodes are in the mini-batch.
        layout (`str`):
            How steps share their prefixes; see [`StepRolloutCollator`].

    Returns:
        `list[int]`: Their numbers in the lesson.
    """
    if len(chosen) == 1:
        return list(chosen[0])
    starts = accumulate(lesson.num_episodes, initial=0)
    mini_batch = [start + index for start, of_rank in zip(starts, chosen, strict=False) for index in of_rank]
    rows = [episode.stream_position for episode in lesson.steps.episodes]
    return divide(mini_batch, lesson.steps.sequences, rows, layout=layout, num_ranks=len(chosen))[lesson.rank]


def _stripped(episode: Episode) -> Episode:
    """An episode without what nothing is learned from, which may be large, or impossible to pickle."""
    steps = tuple(replace(step, observation="", info={}) for step in episode.steps)
    return replace(episode, steps=steps, metrics={})


def _moved(data: Tensors, device: torch.device | str) -> Tensors:
    """The same dataclass with its tensors on a device."""
    return replace(data, **{name: tensor.to(device) for name, tensor in _tensors(data).items()})


def _joined(parts: Sequence[Tensors]) -> Tensors:
    """Dataclasses of step-major tensors as one; rows of action tokens as wide as the widest."""
    joined = {}
    for name in _tensors(parts[0]):
        tensors = [_tensors(part)[name] for part in parts]
        if tensors[0].dim() == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return replace(parts[0], **joined)


def _tensors(data: Scores | Credit) -> dict[str, torch.Tensor]:
    """The tensors of a dataclass, by their fields."""
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
