from dataclasses import replace

import pytest

from trl_steppo.episodes import EpisodeSpec, step_seed
from trl_steppo.inference.base import SamplingParams
from trl_steppo.types import EpisodeLimits, StopReason

SAMPLING = SamplingParams(max_new_tokens=10, temperature=0.5)


def spec(sampling: SamplingParams = SAMPLING, **limits) -> EpisodeSpec:
    return EpisodeSpec(EpisodeLimits(**limits), sampling, run_seed=3, stream_position=5, generation_index=1)


@pytest.mark.parametrize(
    ("num_steps", "prompt_length", "budget"),
    [
        (0, 7, None),
        (1, 7, None),
        (2, 7, StopReason.MAX_INTERACTION_STEPS),
        (2, 99, StopReason.MAX_INTERACTION_STEPS),
        (0, 8, StopReason.MAX_PROMPT_LENGTH),
        (0, 99, StopReason.MAX_PROMPT_LENGTH),
    ],
)
def test_the_first_budget_that_a_step_exceeds_is_named(num_steps, prompt_length, budget):
    limited = spec(max_interaction_steps=2, max_prompt_length=7, max_episode_tokens=9)
    assert limited.exceeded_budget(num_steps, prompt_length) is budget


def test_a_prompt_that_leaves_no_room_for_a_response_exceeds_the_episodes_tokens():
    limited = spec(max_episode_tokens=9)
    assert limited.exceeded_token_budget(8) is None
    assert limited.exceeded_token_budget(9) is StopReason.MAX_EPISODE_TOKENS


def test_without_limits_nothing_is_exceeded():
    assert spec(max_interaction_steps=None).exceeded_budget(10**6, 10**6) is None


def test_a_response_gets_what_all_budgets_leave():
    limited = spec(max_episode_tokens=30)
    lengths = [limited.params(0, length).max_new_tokens for length in (5, 20, 21, 29)]
    assert lengths == [10, 10, 9, 1]
    assert limited.params(0, 5, max_tokens=4).max_new_tokens == 4
    assert limited.params(0, 5, max_tokens=99).max_new_tokens == 10
    assert limited.params(0, 5, context=12).max_new_tokens == 7


def test_params_keep_all_else_and_have_a_seed_of_their_own():
    params = spec().params(2, 5, stop_token_ids=(7,))
    assert params == replace(SAMPLING, stop_token_ids=(7,), seed=step_seed(3, 5, 1, 2))
    own = replace(SAMPLING, stop_token_ids=(8, 9))
    assert spec(own).params(0, 5, stop_token_ids=(7,)).stop_token_ids == (8, 9)


@pytest.mark.parametrize(
    ("prompt_length", "options", "is_cut"),
    [
        (21, {}, True),  # 9 tokens are left, and a response may have 10
        (20, {}, False),  # both budgets end at once: its own cut it
        (21, {"max_tokens": 9}, False),  # it was to have no more
        (21, {"context": 25}, False),  # the model's context cut it
        (21, {"context": 30}, True),
    ],
)
def test_a_response_is_cut_by_the_episode_where_its_own_budget_had_room(prompt_length, options, is_cut):
    limited = spec(max_episode_tokens=30)
    params = limited.params(0, prompt_length, **options)
    assert limited.is_cut(params, prompt_length, max_tokens=options.get("max_tokens")) is is_cut


def test_an_episode_without_a_budget_of_tokens_cuts_nothing():
    assert not spec().is_cut(replace(SAMPLING, max_new_tokens=1), 99)


def test_why_no_step_fits_names_the_budget_and_its_value():
    text = spec(max_prompt_length=7).why_no_step_fits(StopReason.MAX_PROMPT_LENGTH, 8)
    assert text == "the first prompt has 8 tokens; `max_prompt_length` is 7, and no step fits"


def test_the_old_name_of_the_position_still_works():
    with pytest.warns(DeprecationWarning, match="`row_index` is now called `stream_position`"):
        old = EpisodeSpec(row_index=7)
    assert (old.stream_position, old.name, old.order(2)) == (7, "7-0", (7, 0, 2))


def test_the_old_name_of_the_settings_still_works():
    with pytest.warns(DeprecationWarning, match="`SessionSpec` is now called `EpisodeSpec`"):
        from trl_steppo.gateway import SessionSpec
    assert SessionSpec is EpisodeSpec
