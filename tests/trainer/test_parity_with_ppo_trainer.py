"""
One-step episodes under a plain `PPOConfig`: the weights that `PPOTrainer` arrives at.

`PPOTrainer` itself runs, and what it sampled and the permutations it drew are recorded. Ours then takes its rows,
responses and mini-batches from the recording; everything after them is its own.
"""

from __future__ import annotations

import copy
import inspect
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import TOKENIZER, distance, make_classifier, make_model, make_ppo_config, weights
from transformers import Trainer

from trl_steppo import PPOConfig, StepPOTrainer, StopReason
from trl_steppo.compat.trl import ppo_bases
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.types import TokenIds

_, PPOTrainer = ppo_bases()
PPO_MODULE = sys.modules[PPOTrainer.__module__]
pytestmark = pytest.mark.skipif(PPOTrainer is Trainer, reason="this TRL has no `PPOTrainer`")
UPDATES, EPISODES = 3, 16  # of a run, of an update
SAME, MOVED = 1e-5, 5e-3

# `PPOTrainer` takes a sampled padding token for the end of a response. This one is never sampled, since the models'
# vocabulary ends before it: a pad token that was added to the tokenizer alone, as TRL's examples do.
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
PADS_LEFT = copy.deepcopy(TOKENIZER)
PADS_LEFT.padding_side = "left"  # else `PPOTrainer` reads the first token's logits at a padding token

Networks = dict[str, torch.nn.Module]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def networks() -> Networks:
    """What both trainers start from; the reference is unlike the policy, so that KL counts from the first update."""
    policy, reference = (make_model(seed, vocab_size=PAD, pad_token_id=None) for seed in (0, 1))
    return {
        "model": policy,
        "ref_model": reference,
        "reward_model": make_classifier(2),
        "value_model": make_classifier(3),
    }


class Recording:
    """What a run of `PPOTrainer` drew. It stands in for our rows, our sampler and our split into mini-batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queries: list[list[int]] = []  # without padding
        self.responses: list[list[int]] = []
        self.permutations: list[list[int]] = []
        generate, permute = PPO_MODULE.batch_generation, np.random.permutation

        def recorded_generate(model: Any, queries: torch.Tensor, *args: Any) -> Any:
            query_responses, logits = generate(model, queries, *args)
            self.queries += [[token_id for token_id in query if token_id != PAD] for query in queries.tolist()]
            self.responses += query_responses[:, queries.shape[1] :].tolist()
            return query_responses, logits

        def recorded_permute(count: int) -> np.ndarray:
            self.permutations.append(permute(count).tolist())
            return np.array(self.permutations[-1])

        monkeypatch.setattr(PPO_MODULE, "batch_generation", recorded_generate)
        monkeypatch.setattr(np.random, "permutation", recorded_permute)

    @property
    def num_rows(self) -> int:
        return len(self.queries)

    def __getitem__(self, position: int) -> dict[str, list[int]]:
        return {"input_ids": self.queries[position]}

    def row_number(self, position: int) -> int:
        return position

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        assert list(prompt_ids) == self.queries[order[0]]
        ids = self.responses[order[0]]
        stop = next((place for place, token_id in enumerate(ids) if token_id in params.stop_token_ids), None)
        ids = ids if stop is None else ids[: stop + 1]  # `generate` fills up what ended early
        return Sample(TokenIds(ids), (0.0,) * len(ids), StopReason.LENGTH if stop is None else StopReason.STOP, 0)

    def release(self, episode_id: str) -> None:
        pass

    def pace(self, settled: Any) -> None:
        pass

    def mini_batches(self, num_episodes: int, num_mini_batches: int, *, seed: int) -> list[list[int]]:
        order, size = self.permutations.pop(0), num_episodes // num_mini_batches
        return [order[start : start + size] for start in range(0, num_episodes, size)]


def make_rows(count: int = 5 * EPISODES, lengths: Sequence[int] = (6,)) -> Dataset:
    """By default more batches than updates; see what `PPOTrainer` does at the end of its dataset."""
    generator = torch.Generator().manual_seed(0)
    sizes = [lengths[index % len(lengths)] for index in range(count)]
    return Dataset.from_dict({"input_ids": [torch.randint(0, EOS, (n,), generator=generator).tolist() for n in sizes]})


def make_config(output_dir: Path, **settings: Any) -> PPOConfig:
    changed = {
        "per_device_train_batch_size": EPISODES // settings.get("gradient_accumulation_steps", 1),
        "local_rollout_forward_batch_size": 8,
        "total_episodes": UPDATES * EPISODES,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        # Adam divides by the size of a gradient. Where positive and negative parts cancel almost, this is the size of
        # what rounding left over; at 1e-8 a few single weights then differ by up to 4e-5.
        "adam_epsilon": 1e-5,
        "max_grad_norm": 1e9,  # `PPOTrainer` does not clip
        "gamma": 0.97,
        "kl_coef": 0.2,
    }
    return make_ppo_config(output_dir, **{**changed, **settings})


def make_trainer(trainer_class: type, args: PPOConfig, networks: Networks, dataset: Dataset) -> Any:
    """A trainer of copies of the networks."""
    copies: Any = copy.deepcopy(networks)
    return trainer_class(args=args, processing_class=PADS_LEFT, train_dataset=dataset, **copies)


def train_theirs(args: PPOConfig, networks: Networks, dataset: Dataset) -> list[Weights]:
    trainer = make_trainer(PPOTrainer, args, networks, dataset)
    trainer.train()
    return [weights(trainer.policy_model), weights(trainer.value_model)]


def train_ours(
    args: PPOConfig, networks: Networks, dataset: Dataset, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> list[Weights]:
    trainer = make_trainer(StepPOTrainer, args, networks, dataset)
    replay = copy.deepcopy(recording)
    trainer.rows = trainer.player.sampler = replay
    with monkeypatch.context() as patch:
        patch.setattr("trl_steppo.trainer.learner.mini_batches", replay.mini_batches)
        trainer.train()
    assert not replay.permutations, "PPOTrainer made more epochs"
    return [weights(trainer.model), weights(trainer.value_model)]


def assert_same(ours: list[Weights], theirs: list[Weights], networks: Networks) -> None:
    """Policy and critic have the same weights, and moved far from where they started."""
    for name, one, other in zip(("model", "value_model"), ours, theirs, strict=True):
        assert distance(one, weights(networks[name])) > MOVED, name
        assert distance(one, other) < SAME, name


def assert_differ(ours: list[Weights], theirs: list[Weights]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert distance(one, other) > 100 * SAME


@pytest.mark.parametrize(
    ("num_mini_batches", "gradient_accumulation_steps", "kl_estimator", "whiten_rewards"),
    [
        (1, 1, "k1", False),
        (1, 1, "k3", True),
        (1, 2, "k1", True),
        (1, 2, "k3", False),
        (2, 1, "k1", True),
        (2, 1, "k3", False),
    ],
)
def test_weights_equal_those_of_ppo_trainer(
    tmp_path, monkeypatch, networks, num_mini_batches, gradient_accumulation_steps, kl_estimator, whiten_rewards
):
    args = make_config(
        tmp_path,
        num_mini_batches=num_mini_batches,
        gradient_accumulation_steps=gradient_accumulation_steps,
        kl_estimator=kl_estimator,
        whiten_rewards=whiten_rewards,
    )
    recording, dataset = Recording(monkeypatch), make_rows()
    theirs = train_theirs(args, networks, dataset)
    assert_same(train_ours(args, networks, dataset, recording, monkeypatch), theirs, networks)


def test_left_padded_queries_equal_unpadded_rows(tmp_path, monkeypatch, networks):
    args, recording, dataset = make_config(tmp_path), Recording(monkeypatch), make_rows(lengths=(3, 9, 1, 5))
    theirs = train_theirs(args, networks, dataset)
    assert {len(query) for query in recording.queries} == {1, 3, 5, 9}
    assert_same(train_ours(args, networks, dataset, recording, monkeypatch), theirs, networks)


def test_ppo_trainer_accumulates_over_mini_batches(tmp_path, monkeypatch, networks):
    """
    accelerate counts micro-batches, and PPOTrainer leaves it to accelerate when to step: with as many mini-batches as
    accumulated micro-batches it makes one step an epoch, as if there were one mini-batch. Ours makes one for each.
    """
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2}
    recording, dataset = Recording(monkeypatch), make_rows()
    theirs = train_theirs(make_config(tmp_path, num_mini_batches=2, **settings), networks, dataset)
    one, two = (
        train_ours(make_config(tmp_path, num_mini_batches=n, **settings), networks, dataset, recording, monkeypatch)
        for n in (1, 2)
    )
    assert_same(one, theirs, networks)
    assert_differ(two, theirs)


def test_ppo_trainer_makes_more_steps_where_its_dataset_ends(tmp_path, networks):
    """In the last batch of the data loader accelerate lets every micro-batch step; ours has no end of the data."""
    args = make_config(tmp_path, gradient_accumulation_steps=2, num_ppo_epochs=1, total_episodes=4 * EPISODES)
    for trainer_class, expected in ((PPOTrainer, 1 + 2 + 1 + 2), (StepPOTrainer, 4)):
        trainer = make_trainer(trainer_class, args, networks, make_rows(2 * EPISODES))
        trainer.train()
        assert num_steps(trainer.optimizer) == expected


def num_steps(optimizer: Any) -> int:
    """What Adam counts for its bias correction."""
    (count,) = {int(state["step"]) for state in optimizer.state.values()}
    return count


def test_responses_that_end_early_differ_by_one_line_of_ppo_trainer(tmp_path, monkeypatch, networks):
    """
    PPOTrainer pays the score one position after the last token, as if there was one more action: it has a value and a
    return, and a step of `gamma` and `lam` before it. Ours pays it on the last token, as PPOTrainer too does where a
    response has its full length. Without the shift the weights are equal.
    """
    networks["model"].lm_head.weight.data[EOS] *= 4  # some responses end early
    args, dataset = make_config(tmp_path, stop_token="eos"), make_rows()
    recording = Recording(monkeypatch)
    theirs = train_theirs(args, networks, dataset)
    assert 10 < sum(EOS in response[:-1] for response in recording.responses) < len(recording.responses) - 10
    assert_differ(train_ours(args, networks, dataset, recording, monkeypatch), theirs)

    shift, source = "sequence_lengths_p1 = sequence_lengths + 1", inspect.getsource(PPOTrainer.train)
    assert source.count(shift) == 1
    unshifted: dict[str, Any] = {}
    exec(textwrap.dedent(source.replace(shift, shift.removesuffix(" + 1"))), vars(PPO_MODULE), unshifted)
    monkeypatch.setattr(PPOTrainer, "train", unshifted["train"])
    recording = Recording(monkeypatch)
    theirs = train_theirs(args, networks, dataset)
    assert_same(train_ours(args, networks, dataset, recording, monkeypatch), theirs, networks)
