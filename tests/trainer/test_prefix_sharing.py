"""Training on shared prefixes ends where training on one row per step ends."""

from __future__ import annotations

import logging

import pytest
from transformers import MistralConfig, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.trainer.tiny import Endless, distance, make_model, make_trainer, prompt_rows, weights
from trl_steppo import StepPOTrainer
from trl_steppo.models import agreement, attention

UPDATES = 10
SETTINGS = {
    "max_steps": UPDATES,
    "num_generations": 2,
    "advantage_estimator": "step_gae",
    "learning_rate": 1e-3,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "kl_coef": 0.05,
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("recording")
    make_trainer(
        directory / "run", environment_factory=Endless, dump_episodes_dir=str(directory / "episodes"), **SETTINGS
    ).train()
    return str(directory / "episodes")


def replay(tmp_path, recording: str, **settings) -> StepPOTrainer:
    trainer = make_trainer(
        tmp_path, environment_factory=Endless, replay_episodes_dir=recording, **{**SETTINGS, **settings}
    )
    trainer.train()
    return trainer


def test_ten_updates_end_at_the_same_weights(tmp_path, recording):
    shared = replay(tmp_path / "shared", recording)
    apart = replay(tmp_path / "apart", recording, prefix_sharing=False)
    for name in ("model", "value_model"):
        end, other_end = weights(getattr(shared, name)), weights(getattr(apart, name))
        start = weights(make_model()) if name == "model" else {}
        assert distance(end, other_end) <= 1e-4
        assert not start or distance(end, start) >= 5e-3
    assert unique(shared) == unique(apart)
    assert unique(shared) <= forwarded(shared) <= 1.05 * unique(shared), "rows whose members are in two mini-batches"
    assert forwarded(apart) > 1.5 * unique(apart)


def forwarded(trainer: StepPOTrainer) -> float:
    return sum(logs.get("perf/tokens_forwarded", 0.0) for logs in trainer.state.log_history)


def unique(trainer: StepPOTrainer) -> float:
    return sum(logs.get("perf/unique_tokens", 0.0) for logs in trainer.state.log_history)


def test_a_budget_of_tokens_cuts_trees_with_the_same_loss(tmp_path, recording):
    whole = replay(tmp_path / "whole", recording, max_steps=2)
    cut = replay(tmp_path / "cut", recording, max_steps=2, max_tokens_per_micro_batch=40)
    assert distance(weights(whole.model), weights(cut.model)) <= 1e-5
    assert forwarded(cut) > forwarded(whole), "prompts of steps that were cut off are forwarded again"


def test_a_model_with_windows_shares_chains_alone_and_says_so_once(tmp_path, caplog):
    config = make_model().config
    same = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    shape = {name: getattr(config, name) for name in [*same, "num_key_value_heads"]}
    windowed = MistralForCausalLM(MistralConfig(**shape, sliding_window=8))
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path,
            model=windowed,
            train_dataset=prompt_rows(4),
            per_device_train_batch_size=4,
            max_steps=2,
            allow_uncached_sampling=True,
        )
        trainer.train()
    assert trainer.learner.layout == "chains"
    said = [record for record in caplog.records if "only steps that continue one another" in record.getMessage()]
    assert len(said) == 1


def test_a_version_that_ignores_branches_gets_no_tries(tmp_path, caplog, monkeypatch):
    """However it comes that values of a trie are not those of its rows: they are not trained on, and it is said."""
    ignoring = lambda *args, trie_segments=None, **kwargs: attention.segment_attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(agreement, "_known", {})
    attention.register_attention()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa_tree", ignoring)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, train_dataset=prompt_rows(4), per_device_train_batch_size=4, max_steps=1)
    assert trainer.learner.layout == "chains"
    assert len([record for record in caplog.records if "computes other values" in record.getMessage()]) == 1
