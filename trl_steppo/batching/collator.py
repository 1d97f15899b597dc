"""Episodes -> StepBatch: rows for the forward pass, and step-major tensors for everything after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ..errors import DataError
from ..types import Episode
from .rows import Row, row_per_step, share_prefixes


@dataclass
class StepBatch:
    """
    A batch of episodes: R packed rows of L tokens to forward, N steps of up to A response tokens to learn from.

    A *position* is an index into the flattened rows (r·L + l). The forward pass gathers by position into step-major
    tensors, so that nothing after it knows how the rows were packed.

    Args:
        input_ids, position_ids (`torch.Tensor`):
            (R, L), padded on the right.
        attention_mask (`torch.Tensor`):
            (R, L), `True` for tokens.
        step_of_token (`torch.Tensor`):
            (R, L), the step that a token is the action of; -1 for context and padding.
        action_ids (`torch.Tensor`):
            (N, A), the response tokens.
        action_mask (`torch.Tensor`):
            (N, A), `True` for response tokens.
        logit_positions (`torch.Tensor`):
            (N, A), the position whose logits predict each response token; 0 where masked.
        value_positions (`torch.Tensor`):
            (N,), the last prompt token, where the state's value is read.
        rollout_logprobs (`torch.Tensor`):
            (N, A), as sampled; 0 where masked.
        rewards (`torch.Tensor`):
            (N,)
        temperatures (`torch.Tensor`):
            (N,), the temperature each step was sampled at.
        policy_versions, episode_index, step_index (`torch.Tensor`):
            (N,); `episode_index` counts the episodes of this batch.
        truncated (`torch.Tensor`):
            (E,), `True` where a budget cut the episode.
        bootstrap_positions (`torch.Tensor`):
            (E,), where the value after a truncated episode is read; -1 where it is 0.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    step_of_token: torch.Tensor
    action_ids: torch.Tensor
    action_mask: torch.Tensor
    logit_positions: torch.Tensor
    value_positions: torch.Tensor
    rollout_logprobs: torch.Tensor
    rewards: torch.Tensor
    temperatures: torch.Tensor
    policy_versions: torch.Tensor
    episode_index: torch.Tensor
    step_index: torch.Tensor
    truncated: torch.Tensor
    bootstrap_positions: torch.Tensor

    @property
    def num_steps(self) -> int:
        return self.action_mask.shape[0]

    @property
    def num_episodes(self) -> int:
        return self.truncated.shape[0]

    @classmethod
    def empty(cls) -> StepBatch:
        """No episode at all: one padding token to forward, which no loss reads."""
        token = torch.zeros(1, 1, dtype=torch.long)
        steps, floats, no = torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, 1, dtype=torch.long)
        return cls(
            input_ids=token,
            position_ids=token,
            attention_mask=token == 0,
            step_of_token=token - 1,
            action_ids=no,
            action_mask=no.bool(),
            logit_positions=no,
            value_positions=steps,
            rollout_logprobs=no.float(),
            rewards=floats,
            temperatures=floats,
            policy_versions=steps,
            episode_index=steps,
            step_index=steps,
            truncated=steps.bool(),
            bootstrap_positions=steps,
        )

    def to(self, device: torch.device | str) -> StepBatch:
        """The same batch on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


class StepRolloutCollator:
    """
    Turns episodes into a [`StepBatch`].

    Args:
        pad_token_id (`int`, *optional*, defaults to `0`):
            Fills rows on the right; any id will do, since nothing attends to it.
        prefix_sharing (`bool`, *optional*, defaults to `True`):
            Whether steps that continue one another share a row. Losses and gradients are the same either way.
        bootstrap_truncated (`bool`, *optional*, defaults to `False`):
            Whether the state after a truncated episode is forwarded too, to read its value.

    Example:
    ```python
    >>> from trl_steppo import Episode, Step, StopReason
    >>> from trl_steppo.batching import StepRolloutCollator

    >>> steps = [
    ...     Step([1, 2], [3], [-0.5], 0.0, 0, 0, 1.0, StopReason.STOP),
    ...     Step([1, 2, 3, 4], [5, 6], [-0.1, -0.2], 1.0, 1, 0, 1.0, StopReason.STOP),
    ... ]
    >>> batch = StepRolloutCollator()([Episode("e0", 0, 0, steps, terminated=True, truncated=False)])
    >>> batch.input_ids.tolist(), batch.step_of_token.tolist()
    ([[1, 2, 3, 4, 5, 6]], [[-1, -1, 0, -1, 1, 1]])
    ```
    """

    def __init__(
        self, *, pad_token_id: int = 0, prefix_sharing: bool = True, bootstrap_truncated: bool = False
    ) -> None:
        self.pad_token_id = pad_token_id
        self.prefix_sharing = prefix_sharing
        self.bootstrap_truncated = bootstrap_truncated

    def __call__(self, episodes: Sequence[Episode]) -> StepBatch:
        """
        Args:
            episodes (`Sequence[Episode]`):
                Valid episodes, each with its steps in order from 0.

        Raises:
            DataError: If there is no episode, an episode failed, is given twice, or has lost, doubled or misplaced a
                step; the message names it.
        """
        _check(episodes)
        rows: list[Row] = []
        bootstrap_reads: list[tuple[int, int] | None] = []  # (row, index) of each episode's final state
        num_steps = 0
        for episode in episodes:
            packed = share_prefixes(episode.steps) if self.prefix_sharing else row_per_step(episode.steps)
            for row in packed:
                rows.append(Row(row.ids, [(num_steps + position, start) for position, start in row.steps]))
            bootstrap_reads.append(self._append_final_state(rows, episode))
            num_steps += len(episode.steps)
        return self._tensors(episodes, rows, bootstrap_reads)

    def _append_final_state(self, rows: list[Row], episode: Episode) -> tuple[int, int] | None:
        """Make sure the state after a truncated episode is forwarded; where its value is read."""
        final = episode.final_prompt_ids
        if not (self.bootstrap_truncated and episode.truncated and final):
            return None
        if self.prefix_sharing and final[: len(rows[-1].ids)] == rows[-1].ids:
            rows[-1] = Row(final, rows[-1].steps)
        else:
            rows.append(Row(final, []))
        return len(rows) - 1, len(final) - 1

    def _tensors(
        self, episodes: Sequence[Episode], rows: list[Row], bootstrap_reads: list[tuple[int, int] | None]
    ) -> StepBatch:
        steps = [step for episode in episodes for step in episode.steps]
        N, A = len(steps), max(len(step.response_ids) for step in steps)
        R, L = len(rows), max(len(row.ids) for row in rows)

        input_ids = np.full((R, L), self.pad_token_id, dtype=np.int64)
        step_of_token = np.full((R, L), -1, dtype=np.int64)
        lengths = np.array([len(row.ids) for row in rows])
        value_positions = np.zeros(N, dtype=np.int64)
        for r, row in enumerate(rows):
            input_ids[r, : len(row.ids)] = np.asarray(row.ids.memory())
            for n, start in row.steps:
                step_of_token[r, start : start + len(steps[n].response_ids)] = n
                value_positions[n] = r * L + start - 1

        num_actions = np.array([len(step.response_ids) for step in steps])
        action_mask = np.arange(A) < num_actions[:, None]  # (N, A)
        action_ids = np.full((N, A), self.pad_token_id, dtype=np.int64)
        rollout_logprobs = np.zeros((N, A), dtype=np.float32)
        for n, step in enumerate(steps):
            action_ids[n, : num_actions[n]] = np.asarray(step.response_ids.memory())
            rollout_logprobs[n, : num_actions[n]] = step.rollout_logprobs
        # A response is contiguous: its first token is predicted at the value position, each next one token later.
        logit_positions = np.where(action_mask, value_positions[:, None] + np.arange(A), 0)

        episode_index = np.repeat(np.arange(len(episodes)), [len(episode.steps) for episode in episodes])
        return StepBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.arange(L).repeat(R, 1),
            attention_mask=torch.from_numpy(np.arange(L) < lengths[:, None]),
            step_of_token=torch.from_numpy(step_of_token),
            action_ids=torch.from_numpy(action_ids),
            action_mask=torch.from_numpy(action_mask),
            logit_positions=torch.from_numpy(logit_positions),
            value_positions=torch.from_numpy(value_positions),
            rollout_logprobs=torch.from_numpy(rollout_logprobs),
            rewards=torch.tensor([step.reward for step in steps], dtype=torch.float32),
            temperatures=torch.tensor([step.temperature for step in steps], dtype=torch.float32),
            policy_versions=torch.tensor([step.policy_version for step in steps]),
            episode_index=torch.from_numpy(episode_index),
            step_index=torch.tensor([step.step_index for step in steps]),
            truncated=torch.tensor([episode.truncated for episode in episodes]),
            bootstrap_positions=torch.tensor(
                [-1 if read is None else read[0] * L + read[1] for read in bootstrap_reads]
            ),
        )


def _check(episodes: Sequence[Episode]) -> None:
    if not episodes:
        raise DataError("there are no episodes to collate")
    seen: set[str] = set()
    for episode in episodes:
        if episode.error is not None:
            raise DataError(f"episode {episode.episode_id!r} failed ({episode.error}); leave it out of the batch")
        if episode.episode_id in seen:
            raise DataError(f"episode {episode.episode_id!r} is in the batch twice")
        seen.add(episode.episode_id)
        indices = [step.step_index for step in episode.steps]
        if indices != list(range(len(indices))):
            raise DataError(
                f"episode {episode.episode_id!r} has the step indices {indices}; they must count 0, 1, 2, ... without "
                "a gap, since a lost or doubled step would silently change every advantage before it"
            )


def num_row_tokens(episode: Episode, *, prefix_sharing: bool) -> int:
    """Tokens that the rows of an episode hold, without padding."""
    rows = share_prefixes(episode.steps) if prefix_sharing else row_per_step(episode.steps)
    return sum(len(row.ids) for row in rows)
