"""Who learns from which episodes of an update: each rank from its own, or all of them from equal shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

import torch
from accelerate import PartialState
from torch.nn.functional import pad

from ..batching import LayoutName, divide
from ..types import Episode
from .ranks import gather_objects
from .update import Credit, Lesson, Rollout, Scores, Steps


def own_lesson(rollout: Rollout, scores: Scores, credit: Credit) -> Lesson:
    """This rank's own steps."""
    return Lesson(rollout.steps, scores, credit, [len(rollout.episodes)], 0)


def lesson_of_all_ranks(rollout: Rollout, scores: Scores, credit: Credit) -> Lesson:
    """The steps of all ranks, the same on each of them. Every rank must call it."""
    if PartialState().num_processes == 1:
        return own_lesson(rollout, scores, credit)
    device = rollout.batch.rewards.device
    found = gather_objects([(list(map(_bare, rollout.episodes)), _moved(scores, "cpu"), _moved(credit, "cpu"))])
    episodes, all_scores, all_credit = zip(*found, strict=True)
    return Lesson(
        Steps.of([episode for of_rank in episodes for episode in of_rank]),
        _moved(_joined(all_scores), device),
        _moved(_joined(all_credit), device),
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
            For each rank of the lesson, the episodes of its own that are in the mini-batch.
        layout (`str`):
            How steps share their prefixes; see [`StepRolloutCollator`].
    """
    if len(chosen) == 1:
        return list(chosen[0])
    starts = accumulate(lesson.num_episodes, initial=0)
    mini_batch = [start + index for start, of_rank in zip(starts, chosen, strict=False) for index in of_rank]
    rows = [episode.stream_position for episode in lesson.steps.episodes]
    return divide(mini_batch, lesson.steps.sequences, rows, layout=layout, num_ranks=len(chosen))[lesson.rank]


def _bare(episode: Episode) -> Episode:
    """Without what nothing is learned from, which may be large, or unfit for a journey."""
    steps = tuple(replace(step, observation="", info={}) for step in episode.steps)
    return replace(episode, steps=steps, metrics={})


def _moved(found: Any, device: torch.device | str) -> Any:
    """The same dataclass with its tensors on a device."""
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    return replace(found, **{name: x.to(device) for name, x in values.items() if isinstance(x, torch.Tensor)})


def _joined(found: Sequence[Any]) -> Any:
    """Dataclasses of step-major tensors as one; rows of action tokens as wide as the widest."""
    joined = {}
    for field in fields(found[0]):
        tensors = [getattr(one, field.name) for one in found]
        if not isinstance(tensors[0], torch.Tensor):
            continue
        if tensors[0].dim() == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
        joined[field.name] = torch.cat(tensors)
    return replace(found[0], **joined)
