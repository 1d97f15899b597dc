"""What the model cannot read is neither sampled nor trained on."""

from __future__ import annotations

import pytest

from tests.trainer.tiny import Endless, id_rows, make_classifier, make_model, make_trainer, prompt_rows
from trl_steppo.errors import ConfigurationError, RolloutError
from trl_steppo.rollout import EpisodeRequest
from trl_steppo.types import Episode, StopReason

CONTEXT = 64


def run_episodes(trainer) -> list[Episode]:
    requests = [EpisodeRequest(row, index) for index, row in enumerate(prompt_rows(4))]
    with trainer.engine.running(0), trainer.engine.sampling():
        return trainer.player.play(requests)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"response_length": 64}, "`response_length` is 64, and the model's context has 64 tokens"),
        ({"response_length": 8, "max_prompt_length": 57}, "set `max_prompt_length` to 56 or less"),
    ],
)
def test_budgets_that_do_not_fit_are_refused_at_construction(tmp_path, settings, problem):
    model = make_model(max_position_embeddings=CONTEXT)
    with pytest.raises(ConfigurationError, match=problem):
        make_trainer(tmp_path, model=model, **settings)


def test_the_shortest_context_of_all_that_read_an_episode_counts(tmp_path):
    reward_model = make_classifier(max_position_embeddings=CONTEXT)
    trainer = make_trainer(tmp_path, reward_model=reward_model, response_length=8)
    assert trainer.player.limits.max_prompt_length == CONTEXT - 8


@pytest.mark.parametrize("longest", [None, 4])
def test_without_a_setting_a_state_has_what_the_context_leaves(tmp_path, longest):
    model = make_model(max_position_embeddings=CONTEXT)
    trainer = make_trainer(tmp_path, model=model, response_length=8, max_prompt_length=longest)
    assert trainer.player.limits.max_prompt_length == (longest or CONTEXT - 8)


def test_servers_that_take_less_than_the_model_bound_a_state(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(max_position_embeddings=CONTEXT), response_length=8)
    trainer.sampler.context = 32
    assert trainer.player.limits.max_prompt_length == 24
    trainer.sampler.context = 8
    with pytest.raises(ConfigurationError, match="--max-model-len"):
        _ = trainer.player.limits


def test_an_episode_that_grows_beyond_the_context_is_truncated_there(tmp_path):
    model = make_model(max_position_embeddings=CONTEXT)
    trainer = make_trainer(
        tmp_path, model=model, environment_factory=Endless, response_length=8, max_interaction_steps=50
    )
    for episode in run_episodes(trainer):
        assert episode.stop_reason is StopReason.MAX_PROMPT_LENGTH
        assert episode.truncated
        assert all(len(step.prompt_ids) + len(step.response_ids) <= CONTEXT for step in episode.steps)
        assert len(episode.final_prompt_ids) <= CONTEXT  # a critic reads it


class LongWinded(Endless):
    """Answers with more than fits."""

    def step(self, response):
        return "word " * CONTEXT, 0.5, False


def test_a_final_state_that_no_critic_can_read_ends_with_the_response(tmp_path):
    model = make_model(max_position_embeddings=CONTEXT)
    trainer = make_trainer(
        tmp_path, model=model, environment_factory=LongWinded, response_length=8, bootstrap_truncated=True
    )
    for episode in run_episodes(trainer):
        (step,) = episode.steps
        assert episode.truncated
        assert episode.final_prompt_ids == [*step.prompt_ids, *step.response_ids]


@pytest.mark.parametrize("rows", [prompt_rows, id_rows])
def test_a_first_prompt_beyond_the_context_fails_its_episode(tmp_path, rows):
    model = make_model(max_position_embeddings=10)
    trainer = make_trainer(tmp_path, model=model, train_dataset=rows(), response_length=8, max_failed_updates=1)
    with pytest.raises(RolloutError, match=r"the first prompt has \d+ tokens; `max_prompt_length` is 2"):
        trainer.train()
