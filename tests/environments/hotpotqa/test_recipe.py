"""A recipe makes the parts of a training run."""

from __future__ import annotations

import pytest

from trl_steppo.environments.hotpotqa import (
    BM25Retriever,
    EnvironmentArguments,
    HotpotQAEnvironment,
    HotpotQARecipe,
    Passage,
    valid_calls,
)

RETRIEVER = BM25Retriever([Passage("Ada", "A poet born in Ashton."), Passage("Ashton", "A city of poets.")])
ROW = {"question": "Where was the poet born?", "answer": "Ashton", "prompt": "Where was the poet born?"}


def recipe(**settings) -> HotpotQARecipe:
    return HotpotQARecipe(model_name_or_path="mini_wiki", **settings)


def test_the_environment_is_as_the_arguments_say():
    for arguments in (
        EnvironmentArguments(num_passages=1, state="rewritten"),
        recipe(num_passages=1, state="rewritten"),
    ):
        environment = arguments.environment_factory(RETRIEVER)()
        assert isinstance(environment, HotpotQAEnvironment)
        environment.reset(**ROW)
        assert environment.search("poet").count("\n") == 0
        assert "Searches so far:\npoet" in environment.state_prompt("")[-1]["content"]


@pytest.mark.parametrize(("reward", "paid"), [("exact_match", 0.0), ("f1", pytest.approx(2 / 3))])
def test_the_recipe_decides_what_is_paid(reward, paid):
    environment = recipe(reward=reward).environment_factory(RETRIEVER)()
    environment.reset(**ROW)
    environment.answer("Ashton city")
    assert environment.get_reward() == paid


def test_valid_calls_are_paid_where_they_have_a_weight():
    assert recipe().reward_functions() is None
    assert recipe(valid_call_reward=0.2).reward_functions() == [valid_calls]


def test_an_adapter_is_made_where_one_is_asked_for():
    assert recipe().peft_config() is None
    adapter = recipe(use_peft=True, lora_r=8, lora_alpha=4).peft_config()
    assert (adapter.r, adapter.lora_alpha, adapter.target_modules) == (8, 4, "all-linear")


def test_the_data_are_those_that_are_named():
    data = recipe(system_prompt="Look it up.").data()
    assert data.train_dataset[0]["prompt"][0] == {"role": "system", "content": "Look it up."}
    assert len(data.eval_dataset) == 300
