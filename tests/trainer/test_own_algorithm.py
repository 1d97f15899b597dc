"""A trainer with functions of a user's own: what it learns, writes down and refuses."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import pickle
import re
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from trl import GRPOConfig

from tests.examples.scripts import load_script
from tests.trainer.tiny import TOKENIZER, Hash, make_config, make_model, make_trainer, prompt_rows, same, weights
from tests.warm import run_on_ranks, run_script
from trl_steppo import PPOConfig, StepPOConfig, StepPOTrainer
from trl_steppo.advantages import discounted_returns, step_gae
from trl_steppo.errors import CheckpointError, ConfigurationError
from trl_steppo.learning.estimators import ESTIMATORS, Estimator
from trl_steppo.losses import clipped_policy_loss
from trl_steppo.trainer.sources import source_hash

ROOT = Path(__file__).parents[2]
example = load_script("own_algorithm")
SAVING: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def settings_of(trainer: StepPOTrainer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(str(trainer.args.output_dir), "steppo_config.json").read_text())
    return content


def plain_gae(rewards: Tensor, values: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    return step_gae(rewards, values, mask, **settings)


def plain_loss(ratio: Tensor, advantages: Tensor, mask: Tensor, **settings: Any) -> Any:
    return clipped_policy_loss(ratio, advantages, mask, **settings)


def trained(directory: Path, **arguments: Any) -> StepPOTrainer:
    trainer = make_trainer(directory, **{"max_steps": 2, **arguments})
    trainer.train()
    return trainer


def test_functions_that_do_what_step_ppo_does_learn_what_it_learns(tmp_path):
    common: dict[str, Any] = {"num_mini_batches": 2, "num_ppo_epochs": 2, "per_device_train_batch_size": 4}
    common |= {"gradient_accumulation_steps": 2, "lam": 0.9, "loss_aggregation": "episode"}
    expected = trained(tmp_path / "a", **common)
    found = trained(tmp_path / "b", advantage_estimator=plain_gae, policy_loss_fn=plain_loss, **common)
    assert same(weights(found.model), weights(expected.model))
    assert same(weights(found.value_model), weights(expected.value_model))
    names = [{*logs} for logs in expected.state.log_history]
    assert [{*logs} for logs in found.state.log_history] == names


def test_other_functions_learn_something_else_and_are_written_down(tmp_path):
    expected = trained(tmp_path / "a")
    own: dict[str, Any] = {"advantage_estimator": example.length_adaptive_gae}
    own["policy_loss_fn"] = example.soft_clipped_loss
    found = trained(tmp_path / "b", log_episodes=2, **own)
    assert not same(weights(found.model), weights(expected.model))
    first = found.state.log_history[0]
    assert 0 <= first["policy/faded"] <= 1
    assert "policy/clipfrac_avg" not in first
    settings = settings_of(found)
    assert settings["advantage_estimator"] == "length_adaptive_gae"
    assert settings["policy_loss_fn"] == "soft_clipped_loss"
    assert settings["policy_loss_fn_source"] == source_hash(example.soft_clipped_loss)
    assert re.fullmatch("[0-9a-f]{12}", settings["advantage_estimator_source"])
    assert (settings["trainer"], settings["trainer_source"]) == ("StepPOTrainer", None)
    plain = settings_of(expected)
    assert plain["advantage_estimator_source"] is plain["policy_loss_fn"] is plain["policy_loss_fn_source"] is None


def test_a_subclass_of_the_trainer_is_written_down(tmp_path):
    class Mine(StepPOTrainer):
        def _assign_credit(self, *given: Any) -> Any:
            return super()._assign_credit(*given)

    trainer = Mine(
        args=make_config(tmp_path, max_steps=1),
        processing_class=TOKENIZER,
        model=make_model(),
        train_dataset=prompt_rows(),
        environment_factory=Hash,
    )
    trainer.train()
    settings = settings_of(trainer)
    assert (settings["trainer"], settings["trainer_source"]) == ("Mine", source_hash(Mine))


@pytest.mark.parametrize("given", ["grpo", ESTIMATORS["grpo"]], ids=["name", "entry"])
def test_a_name_or_an_entry_is_as_the_setting(tmp_path, given):
    args = make_config(tmp_path, num_generations=2)
    trainer = make_trainer(tmp_path, args=args, advantage_estimator=given, value_model=None)
    if isinstance(given, str):  # which `make_trainer` takes for a setting
        trainer = make_trainer(tmp_path, num_generations=2, advantage_estimator=given)
    assert trainer.args.advantage_estimator == "grpo"
    assert trainer.value_model is None
    assert args.advantage_estimator == "step_gae", "the user's own settings stay as they are"


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    """The others would wait for it: for ever, or until its connection closes."""
    script = Path(__file__).with_name("own_functions_on_ranks.py")
    for rank in run_on_ranks(script, tmp_path, timeout=60, CUDA_VISIBLE_DEVICES=""):
        assert rank.returncode == 0, rank.stderr[-3000:]


def test_it_works_without_a_critic_and_with_adapters(tmp_path):
    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trained(tmp_path, advantage_estimator=discounted_returns, peft_config=peft_config)
    assert trainer.value_model is None
    assert "loss/value_avg" not in trainer.state.log_history[0]


def test_settings_with_a_function_are_copied_pickled_and_tried(tmp_path):
    args = make_config(tmp_path).with_estimator(lambda rewards, mask, *, gamma: rewards)
    assert copy.copy(args).estimator is copy.deepcopy(args).estimator is args.estimator
    assert not args.for_trial().uses_critic
    again = pickle.loads(pickle.dumps(args))
    assert again.advantage_estimator == "<lambda>"
    with pytest.raises(ConfigurationError, match="`advantage_estimator`='<lambda>' was given to the trainer"):
        again.estimator  # noqa: B018


def test_a_checkpoint_of_other_functions_is_refused(tmp_path):
    own: dict[str, Any] = {"advantage_estimator": plain_gae, "policy_loss_fn": plain_loss}
    trained(tmp_path, **{**SAVING, "max_steps": 1}, **own)

    def refused(**arguments: Any) -> str:
        with pytest.raises(CheckpointError) as found:
            make_trainer(tmp_path, **SAVING, **arguments).train(resume_from_checkpoint=True)
        return str(found.value)

    message = refused(policy_loss_fn=plain_loss)
    assert re.search(r"with `advantage_estimator`=plain_gae \(\w{12}\), and this run has none; pass", message)
    message = refused(advantage_estimator=plain_gae, policy_loss_fn=example.soft_clipped_loss)
    assert re.search(r"`policy_loss_fn`=plain_loss \(\w{12}\), and this run has soft_clipped_loss \(\w{12}\)", message)
    assert "start a new run from its weights" in message
    resumed = make_trainer(tmp_path, **SAVING, **own)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_a_run_without_functions_cannot_be_resumed_with_one(tmp_path):
    trained(tmp_path, **{**SAVING, "max_steps": 1})
    trainer = make_trainer(tmp_path, **SAVING, advantage_estimator=plain_gae)
    with pytest.raises(CheckpointError, match="was written without `advantage_estimator`, and this run has plain_gae"):
        trainer.train(resume_from_checkpoint=True)


def test_the_estimator_of_a_conversion_or_of_another_trainer_is_replaced(tmp_path):
    ppo = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    grpo = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    given = [StepPOConfig.of(ppo), StepPOConfig.from_grpo_config(grpo), make_config(tmp_path)]
    own = [args.with_estimator(plain_gae) for args in given]
    assert {args.advantage_estimator for args in own} == {"plain_gae"}
    copied = [dataclasses.replace(args, seed=3) for args in (*given, *own)]
    assert all(args.with_estimator(discounted_returns).estimator.values is None for args in copied)
    assert dataclasses.replace(own[0], seed=3).estimator is own[0].estimator
    assert dataclasses.replace(own[0], advantage_estimator="token_gae").estimator is ESTIMATORS["token_gae"]
    with pytest.raises(ConfigurationError, match="given twice: 'rloo' in `args`"):
        StepPOConfig.from_grpo_config(grpo, advantage_estimator="rloo").with_estimator(plain_gae)


def test_the_trainer_overrides_a_plain_ppo_config(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = make_trainer(tmp_path, args=args, advantage_estimator=plain_gae)
    assert trainer.args.advantage_estimator == "plain_gae"


def test_an_estimator_is_own_whenever_it_was_registered(monkeypatch):
    """The trainer is imported when it is asked for, maybe after a user's entries stand in the table."""
    built_in = list(ESTIMATORS.values())
    own = Estimator.over_steps(lambda rewards, mask, *, gamma: rewards)
    monkeypatch.setitem(ESTIMATORS, "mine", own)
    monkeypatch.setitem(ESTIMATORS, "grpo", own)
    spec = importlib.util.find_spec("trl_steppo.trainer.description")
    assert spec is not None
    assert spec.loader is not None
    description = importlib.util.module_from_spec(spec)  # as it is where it is imported now
    spec.loader.exec_module(description)
    assert description._estimator_source(own) == source_hash(own) is not None
    assert [description._estimator_source(entry) for entry in built_in] == [None] * len(built_in)


def test_the_estimator_is_given_once(tmp_path):
    args = make_config(tmp_path, advantage_estimator="token_gae")
    with pytest.raises(ConfigurationError, match="given twice: 'token_gae' in `args`"):
        make_trainer(tmp_path, args=args, advantage_estimator=plain_gae)


# -- hashes of sources ------------------------------------------------------------------------------------------------


def helper(x: float) -> float:
    return 2 * x


def uses_helper(x: float) -> float:
    return helper(x)


def made(alpha: float, seed: int = 0) -> Any:
    def function(x: float) -> float:
        return alpha * x + 0 * seed

    return function


class Scored:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, x: float) -> float:
        return self.weight * x


class MoreScored(Scored):
    """The same, by another name."""


def defined(body: str, directory: Path) -> Any:
    """A function out of a file of its own."""
    file = directory / f"code_{abs(hash(body))}.py"
    file.write_text(body)
    space: dict[str, Any] = {"__name__": "code"}
    exec(compile(body, str(file), "exec"), space)
    return space["f"]


def test_a_hash_is_that_of_what_the_code_does(tmp_path):
    plain = "def f(x):\n    return x + 1\n"
    noted = 'def f(x):\n    """Adds."""\n    # one\n    return (x +\n            1)\n'
    other = "def f(x):\n    return x + 2\n"
    hashes = [source_hash(defined(body, tmp_path)) for body in (plain, noted, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert None not in hashes


def test_a_hash_covers_what_a_function_uses():
    assert source_hash(uses_helper) != source_hash(helper)
    assert source_hash(made(0.1)) == source_hash(made(0.1)) != source_hash(made(0.2))
    assert source_hash(made(0.1, seed=1)) == source_hash(made(0.1, seed=2)), "which repetitions of a run differ in"
    assert source_hash(partial(helper, x=1.0)) != source_hash(partial(helper, x=2.0))
    assert source_hash(Scored(1.0)) != source_hash(Scored(2.0))
    assert source_hash(Scored) != source_hash(MoreScored)
    assert source_hash(Scored(1.0).__call__) is not None
    estimators = [Estimator.over_steps(plain_gae, whitens=whitens) for whitens in (True, False)]
    assert source_hash(estimators[0]) != source_hash(estimators[1])


def with_space(**space: object) -> Any:
    """A function that reads values of its module."""

    def function(x: float) -> list[float]:
        return [LAM * x for _ in range(2)]  # type: ignore[name-defined]  # noqa: F821

    return FunctionType(function.__code__, {"__name__": "code", **space})


def with_default(value: object) -> Any:
    def function(x: float, value: object = value) -> object:
        return x

    return function


def takes(x: float, value: object) -> float:
    return x


class Reads:
    def step(self, action: str) -> int:
        return LIMIT


LIMIT = 1
CALLS: list[int] = []


def counts(x: float) -> float:
    CALLS.append(1)
    return x


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.5, 0.9),
        ([1, 2], [1, 3]),
        ((1, (2, "x")), (1, (2, "y"))),
        ({"a": [1]}, {"a": [2]}),
        ({"a"}, {"b"}),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
        (torch.ones((), dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)),
        (np.zeros(2), np.ones(2)),
        (partial(helper, 1.0), partial(helper, 2.0)),
    ],
    ids=["number", "list", "tuple", "dict", "set", "tensor", "shape", "array", "partial"],
)
@pytest.mark.parametrize(
    "made",
    [lambda value: with_space(LAM=value), made, with_default, lambda value: partial(takes, value=value), Scored],
    ids=["global", "closure", "default", "partial", "attribute"],
)
def test_a_hash_covers_values_wherever_code_reads_them(made, a, b):
    assert source_hash(made(copy.deepcopy(a))) == source_hash(made(a)) != source_hash(made(b))


def test_a_hash_covers_what_methods_read(monkeypatch):
    first = source_hash(Reads)
    monkeypatch.setattr(f"{__name__}.LIMIT", 2)
    assert source_hash(Reads) != first
    assert source_hash(Reads()) == source_hash(Reads) is not None


def test_a_hash_has_no_state_and_no_seed():
    first = source_hash(counts)
    counts(1.0)
    assert source_hash(counts) == first
    assert source_hash(Scored({"seed": 1})) == source_hash(Scored({"seed": 2}))  # type: ignore[arg-type]
    trained = torch.nn.Parameter(torch.zeros(1))
    assert source_hash(Scored(trained)) == source_hash(Scored(trained + 1))  # type: ignore[arg-type]
    endless: list[Any] = []
    endless.append(endless)
    assert source_hash(Scored(endless)) is not None  # type: ignore[arg-type]


def test_what_is_installed_or_built_in_has_no_hash():
    assert source_hash(step_gae, torch.sum, len, LoraConfig, json.dumps, partial(step_gae)) is None
    assert source_hash() is source_hash(print) is None


def test_a_command_is_known_by_its_scripts(tmp_path):
    script = tmp_path / "agent.py"
    script.write_text("print(1)")
    first = source_hash(f"python {script} --fast")
    assert first == source_hash(["python", str(script)]) is not None
    script.write_text("print(2)")
    assert source_hash(f"python {script}") != first
    assert source_hash("my-agent --fast") is None


# -- the example ------------------------------------------------------------------------------------------------------


def test_the_example_trains_with_both_functions(tmp_path):
    flags = ["--total_episodes", "8", "--per_device_train_batch_size", "4", "--num_mini_batches", "2"]
    flags += ["--critic_warmup_updates", "0"]
    own = ["--alpha", "0.5", "--soft_clip", "true", "--eval_on_start", "false", "--eval_strategy", "no"]
    script = ROOT / "examples" / "own_algorithm.py"
    done = run_script(
        script, *flags, *own, "--output_dir", str(tmp_path), cwd=ROOT, timeout=240, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [logs["episode"] for logs in history if "episode" in logs] == [4, 8]
    assert all(logs["policy/faded"] >= 0 for logs in history if "episode" in logs)
    settings = json.loads((tmp_path / "steppo_config.json").read_text())
    assert settings["advantage_estimator"] == "length_adaptive_gae"
