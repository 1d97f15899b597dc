"""What a run's settings do not hold."""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import Dataset

from tests.trainer.tiny import Hash, make_config, make_model
from trl_steppo.learning.estimators import ESTIMATORS, Estimator
from trl_steppo.trainer.description import describe_task, own_functions

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]


def described(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = dict.fromkeys(("eval_dataset", "environment_factory", "tools", "reward_funcs"))
    given |= {"model": None, "train_dataset": ROWS, "reward_model": None, "agent": None, "policy_loss_fn": None}
    given["estimator"] = ESTIMATORS["step_gae"]
    return describe_task(**given | changes)


def score(completions: list[Any]) -> list[float]:
    return [0.0]


def test_a_model_is_where_it_is_from():
    model = make_model()
    assert described(model=model)["model"] == "Qwen2ForCausalLM"
    model.config._name_or_path = "Qwen/Qwen2.5-0.5B"
    assert described(model=model)["model"] == "Qwen/Qwen2.5-0.5B"


def test_rows_are_told_apart_by_their_number_and_their_ends():
    assert described()["data"] == described(train_dataset=Dataset.from_list(ROWS))["data"]
    assert described()["data"].startswith("2 rows, ")
    assert described(train_dataset=ROWS[:1])["data"].startswith("1 rows, ")
    assert described(train_dataset=[ROWS[0], {"prompt": "b", "answer": 3}])["data"] != described()["data"]
    assert (
        described(train_dataset=[{"image": object()}])["data"]
        == described(train_dataset=[{"image": object()}])["data"]
    )


def test_evaluation_data():
    assert described()["evaluation_data"] is None
    assert described(eval_dataset=[])["evaluation_data"] == "0 rows"
    several = described(eval_dataset={"x": ROWS, "y": []})["evaluation_data"]
    assert several == f"x: {described()['data']}; y: 0 rows"


def test_an_environment_with_its_plain_settings():
    made = partial(Hash, object(), top_k=3, state="chat", index=object())
    found = described(environment_factory=made)
    assert (found["environment"], found["environment_top_k"], found["environment_state"]) == ("Hash", 3, "chat")
    assert "environment_index" not in found


def test_own_functions_with_their_plain_settings(tmp_path):
    def n_step(rewards, step_mask, *, gamma, n, seed=0):
        return rewards

    estimator = Estimator.over_steps(partial(n_step, n=2, seed=3))
    found = described(estimator=estimator, policy_loss_fn=partial(score, tau=1.5))
    assert (found["advantage_estimator_n"], found["policy_loss_fn_tau"]) == (2, 1.5)
    assert "advantage_estimator_seed" not in found
    words = own_functions(make_config(tmp_path).with_estimator(estimator), found)
    assert str(words["advantage_estimator"]).startswith("n_step n=2 (")
    assert str(words["policy_loss_fn"]).startswith("score tau=1.5 (")


def test_who_plays_and_who_scores():
    assert described(tools=[score])["environment"] == "score"
    assert described(agent=["python", "agent.py"])["environment"] == "python agent.py"
    assert described(agent="python agent.py")["environment"] == "python agent.py"
    assert described(reward_funcs=[score], reward_model=make_model())["reward"] == "score, Qwen2ForCausalLM"
    assert described()["environment"] is described()["reward"] is None
