"""Which runs are taken together, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.synthetic import TOKEN_PPO, write_run
from trl_steppo.learning.estimators import ESTIMATORS
from trl_steppo.report.methods import ALGORITHMS, differing_settings, group_runs
from trl_steppo.report.runs import load_runs


def grouped(*paths: Path) -> dict[str, list[str]]:
    return {method.name: [run.name for run in method.runs] for method in group_runs(load_runs(paths))}


def test_seeds_of_equal_settings_are_one_method(tmp_path):
    paths = [write_run(tmp_path / f"a{seed}", seed=seed, logging_steps=seed) for seed in (2, 1)]
    other = write_run(tmp_path / "b", **TOKEN_PPO)
    assert grouped(*paths, other) == {"StepPO": ["a1", "a2"], "token PPO": ["b"]}


def test_what_tells_methods_of_one_algorithm_apart_is_in_their_names(tmp_path):
    paths = [write_run(tmp_path / str(gamma), gamma=gamma) for gamma in (0.99, 1.0)]
    assert list(grouped(*paths)) == ["StepPO, gamma=0.99", "StepPO, gamma=1.0"]
    methods = group_runs(load_runs(paths))
    assert differing_settings(methods) == {"gamma": [0.99, 1.0]}


@pytest.mark.parametrize(
    ("estimator", "level", "name"),
    [
        ("step_gae", "token", "StepPO, token ratio"),
        ("token_gae", "step", "token PPO, step ratio"),
        ("grpo", "token", "GRPO"),
        ("reinforce_plus_plus", "step", "REINFORCE++"),
        ("mine", "step", "mine"),  # of the user's own
    ],
)
def test_the_names_of_methods_are_short_and_different(tmp_path, estimator, level, name):
    path = write_run(tmp_path / "a", advantage_estimator=estimator, importance_sampling_level=level)
    assert list(grouped(path)) == [name]


def test_a_seed_twice_means_that_something_else_differs(tmp_path):
    """The model, for one, in runs that did not write it: then the directories' names tell."""
    paths = [write_run(tmp_path / f"{model}_seed{seed}", seed=seed) for seed in (1, 2) for model in ("small", "large")]
    assert grouped(*paths) == {
        "StepPO, small": ["small_seed1", "small_seed2"],
        "StepPO, large": ["large_seed1", "large_seed2"],
    }


def test_runs_without_settings_are_named_after_their_directories(tmp_path):
    paths = [write_run(tmp_path / f"old-seed-{seed}", seed=seed, without_settings=True) for seed in (1, 2)]
    assert grouped(*paths) == {"old": ["old-seed-1", "old-seed-2"]}


def test_runs_of_other_models_are_no_repetitions(tmp_path):
    """Whatever their seeds and their directories are called."""
    models = {1: "Qwen/Qwen2.5-0.5B", 2: "meta-llama/Llama-3.2-1B"}
    paths = [write_run(tmp_path / f"run_seed{seed}", seed=seed, model=model) for seed, model in models.items()]
    assert grouped(*paths) == {
        "StepPO, model=Qwen2.5-0.5B": ["run_seed1"],
        "StepPO, model=Llama-3.2-1B": ["run_seed2"],
    }


@pytest.mark.parametrize("name", ["data", "evaluation_data", "environment", "environment_state", "reward"])
def test_runs_on_other_data_or_in_other_environments_are_no_repetitions(tmp_path, name):
    paths = [write_run(tmp_path / f"run_seed{seed}", seed=seed, **{name: f"the {seed}."}) for seed in (1, 2)]
    assert list(grouped(*paths)) == [f"StepPO, {name}=the 1.", f"StepPO, {name}=the 2."]


def test_models_made_for_each_seed_are_one(tmp_path):
    paths = [write_run(tmp_path / f"r{seed}", seed=seed, model=f"models/warm_seed{seed}") for seed in (1, 2)]
    paths += [write_run(tmp_path / f"o{seed}", seed=seed, model=f"others/warm_seed{seed}") for seed in (1, 2)]
    assert grouped(*paths) == {
        "StepPO, model=models/warm": ["r1", "r2"],
        "StepPO, model=others/warm": ["o1", "o2"],
    }


def test_algorithms_are_those_of_the_table_of_estimators():
    assert {name: (ESTIMATORS[name].title, ESTIMATORS[name].usual_ratio) for name in ALGORITHMS} == ALGORITHMS


def test_methods_are_named_by_hand(tmp_path):
    """Also runs that their settings would tell apart, or would not."""
    paths = [write_run(tmp_path / name, seed=seed, gamma=1.0 / seed) for name, seed in (("a", 2), ("b", 1), ("c", 2))]
    names = {paths[0]: "mine", paths[1]: "mine"}
    methods = group_runs(load_runs(paths), names)
    assert {method.name: [run.name for run in method.runs] for method in methods} == {
        "mine": ["b", "a"],
        "StepPO": ["c"],
    }
