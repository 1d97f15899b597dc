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


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_run_name_that_was_given_is_the_methods(tmp_path):
    """Without its seed; transformers may set it to the directory."""
    paths = [write_run(tmp_path / f"a{seed}", seed=seed, run_name=f"long memory_s{seed}") for seed in (1, 2)]
    other = write_run(tmp_path / "b", run_name=str(tmp_path / "b"))
    assert grouped(*paths, other) == {"long memory": ["a1", "a2"], "StepPO": ["b"]}


def test_one_run_name_for_other_settings_is_told_apart_by_them(tmp_path):
    paths = [write_run(tmp_path / str(gamma), gamma=gamma, run_name="mine") for gamma in (0.99, 1.0)]
    assert list(grouped(*paths)) == ["mine, gamma=0.99", "mine, gamma=1.0"]


def test_another_trainer_estimator_or_loss_is_another_method(tmp_path):
    given: dict[str, dict[str, str]] = {
        "plain": {"trainer": "StepPOTrainer"},
        "subclass": {"trainer": "MyTrainer", "trainer_source": "aaaa"},
        "own": {"advantage_estimator": "length_adaptive_gae", "advantage_estimator_source": "bbbb"},
        "loss": {"policy_loss_fn": "soft_clipped_loss", "policy_loss_fn_source": "cccc"},
    }
    paths = [write_run(tmp_path / name, **settings) for name, settings in given.items()]
    assert list(grouped(*paths)) == ["StepPO", "StepPO, MyTrainer", "length_adaptive_gae", "StepPO, soft_clipped_loss"]


@pytest.mark.parametrize("name", ["trainer", "environment", "advantage_estimator", "policy_loss_fn", "reward"])
def test_two_codes_of_one_name_are_two_methods(tmp_path, name):
    paths = [
        write_run(tmp_path / f"{code}_s{seed}", seed=seed, **{name: "agent", f"{name}_source": code * 12})
        for code in "ab"
        for seed in (1, 2)
    ]
    found = grouped(*paths)
    assert [method.rsplit(", ", 1)[1] for method in found] == [f"{name} aaaaaa", f"{name} bbbbbb"]
    assert list(found.values()) == [["a_s1", "a_s2"], ["b_s1", "b_s2"]]


def test_values_of_own_functions_are_named_before_their_hashes(tmp_path):
    paths = [
        write_run(
            tmp_path / f"n{n}",
            advantage_estimator="n_step",
            advantage_estimator_n=n,
            advantage_estimator_source=f"{n}" * 12,
        )
        for n in (2, 3)
    ]
    assert list(grouped(*paths)) == ["n_step, n=2", "n_step, n=3"]


def test_names_have_the_few_settings_that_matter(tmp_path):
    """Ten fields differ: one is enough. A grid of three takes three; what is derived, or is a budget, is no name."""
    many: dict[str, float] = {f"option_{number}": 1 for number in range(10)}
    paths = [
        write_run(tmp_path / "a", learning_rate=1e-5, max_steps=10, **many),
        write_run(tmp_path / "b", learning_rate=1e-6, max_steps=20, **dict.fromkeys(many, 2)),
    ]
    assert list(grouped(*paths)) == ["StepPO, learning_rate=1e-05", "StepPO, learning_rate=1e-06"]
    grid = [
        write_run(tmp_path / f"{rate}_{gamma}_{extra}", learning_rate=rate, gamma=gamma, extra=extra)
        for rate in (1, 2)
        for gamma in (0.5, 1.0)
        for extra in (1, 2)
    ]
    assert "StepPO, learning_rate=2, gamma=0.5, extra=1" in grouped(*grid)
    lengths = [write_run(tmp_path / f"long{steps}", max_steps=steps) for steps in (10, 20)]
    assert list(grouped(*lengths)) == ["StepPO, max_steps=10", "StepPO, max_steps=20"], "there is nothing else"


def test_how_an_update_is_divided_is_no_setting(tmp_path):
    common = {"batch_size": 16, "mini_batch_size": 8}
    one = write_run(tmp_path / "a", seed=1, world_size=1, per_device_train_batch_size=16, **common)
    two = write_run(tmp_path / "b", seed=2, world_size=2, per_device_train_batch_size=8, **common)
    larger = write_run(tmp_path / "c", world_size=2, per_device_train_batch_size=16, batch_size=32)
    assert grouped(one, two, larger) == {"StepPO, batch_size=16": ["a", "b"], "StepPO, batch_size=32": ["c"]}


def test_versions_and_tracing_are_no_settings(tmp_path):
    paths = [write_run(tmp_path / "a", seed=1, versions={"torch": "2.12"})]
    paths += [write_run(tmp_path / "b", seed=2, versions={"torch": "2.13"}, tracing=True)]
    assert grouped(*paths) == {"StepPO": ["a", "b"]}


@pytest.mark.parametrize(
    "pattern", ["run_s{}", "run-s{}", "run_seed{}", "run seed {}", "run/{}", "run/seed_{}", "s{}_run"]
)
def test_seeds_in_the_names_of_directories(tmp_path, pattern):
    paths = [write_run(tmp_path / pattern.format(seed), seed=seed, without_settings=True) for seed in (1, 2)]
    assert list(grouped(*paths)) == ["run"]
    others = [write_run(tmp_path / "other" / pattern.format(seed), seed=seed) for seed in (3, 4)]
    again = [write_run(tmp_path / "more" / pattern.format(seed), seed=seed) for seed in (3, 4)]
    assert list(grouped(*others, *again)) == ["StepPO, other/run", "StepPO, more/run"]


def test_a_number_that_is_not_the_seed_stays(tmp_path):
    paths = [write_run(tmp_path / name, seed=7) for name in ("model_s3", "model_s7")]
    assert list(grouped(*paths)) == ["StepPO, model_s3", "StepPO, model"]


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
