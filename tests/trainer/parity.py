"""
Runs of `PPOTrainer`, and of ours on what they drew: rows, responses and mini-batches are taken from a recording, and
everything after them is the trainer's own.
"""

from __future__ import annotations

import copy
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.trainer.tiny import TOKENIZER, distance, make_classifier, make_model, make_ppo_config, weights
from trl_steppo import FixedEngine, PPOConfig, StopReason
from trl_steppo import PPOTrainer as OurPPOTrainer
from trl_steppo.compat.trl import ppo_bases
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.types import TokenIds

_, PPOTrainer = ppo_bases()
"""TRL's; with a TRL that has none, `Trainer`."""
PPO_MODULE: Any = sys.modules[PPOTrainer.__module__]
UPDATES, EPISODES = 3, 16  # of a run, of an update
SAME, MOVED = 1e-5, 5e-3

# `PPOTrainer` takes a sampled padding token for the end of a response. This one is never sampled, since the models'
# vocabulary ends before it: a pad token that was added to the tokenizer alone, as TRL's examples do.
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
PADS_LEFT = copy.deepcopy(TOKENIZER)
PADS_LEFT.padding_side = "left"  # else `PPOTrainer` reads the first token's logits at a padding token

Networks = dict[str, torch.nn.Module]
Weights = dict[str, torch.Tensor]


def make_networks() -> Networks:
    """What both trainers start from; the reference is unlike the policy, so that KL counts from the first update."""
    policy, reference = (make_model(seed, vocab_size=PAD, pad_token_id=None) for seed in (0, 1))
    return {
        "model": policy,
        "ref_model": reference,
        "reward_model": make_classifier(2),
        "value_model": make_classifier(3),
    }


def make_small_networks() -> Networks:
    """Smaller ones, whose weights no version of transformers decides."""
    sizes: dict[str, Any] = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": PAD, "pad_token_id": None}
    networks: Networks = {name: make_model(**sizes) for name in ("model", "ref_model")}
    networks |= {name: make_classifier(**sizes) for name in ("reward_model", "value_model")}
    for network_name, network in networks.items():
        for name, parameter in network.named_parameters():
            drawn = np.random.RandomState(zlib.crc32(f"{network_name} {name}".encode())).standard_normal
            values = torch.from_numpy(0.3 * drawn(tuple(parameter.shape))).float()
            parameter.data = values + 1 if "norm" in name else values
    return networks


class Replay:
    """What a run of `PPOTrainer` drew. It stands in for our rows, our sampler and our split into mini-batches."""

    columns, order, seed = ("input_ids",), None, 0

    def __init__(self, queries: Any = (), responses: Any = (), permutations: Any = ()) -> None:
        self.queries: list[list[int]] = list(queries)  # without padding
        self.responses: list[list[int]] = list(responses)
        self.permutations: list[list[int]] = list(permutations)

    @property
    def num_rows(self) -> int:
        return len(self.queries)

    @property
    def example(self) -> dict[str, list[int]]:
        return self[0]

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


class Recording(Replay):
    """Of the runs of `PPOTrainer` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
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
    args: PPOConfig, networks: Networks, dataset: Dataset, recording: Replay, monkeypatch: pytest.MonkeyPatch
) -> list[Weights]:
    replay = copy.deepcopy(recording)
    with monkeypatch.context() as patch:
        patch.setattr("trl_steppo.trainer.build.make_engine", lambda *args, **more: FixedEngine(replay))
        patch.setattr("trl_steppo.trainer.ppo_trainer.make_rows", lambda dataset, seed: replay)
        trainer = make_trainer(OurPPOTrainer, args, networks, dataset)
        patch.setattr("trl_steppo.learning.learner.mini_batches", replay.mini_batches)
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
