"""`PPOConfig` and `PPOTrainer`: what TRL's classes of these names had in 1.12, with any TRL."""

from __future__ import annotations

import inspect
import typing
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from trl import TrlParser

from tests.trainer.record_configs import DIRECTORY
from tests.trainer.tiny import TOKENIZER, id_rows, make_classifier, make_model
from trl_steppo import PPOConfig, PPOTrainer, StepPOConfig, StepPOTrainer
from trl_steppo.compat.trl import ppo_bases

THEIR_CONFIG, THEIR_TRAINER = ppo_bases()
IS_THEIRS_THERE = THEIR_TRAINER is not Trainer

# As TRL 1.12 has them.
REQUIRED = inspect.Parameter.empty
ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("args", "processing_class", "model", "ref_model", "reward_model"), REQUIRED),
    **dict.fromkeys(("train_dataset", "value_model"), REQUIRED),
    "data_collator": None,
    "eval_dataset": None,
    "optimizers": (None, None),
    "callbacks": None,
    "peft_config": None,
}
FIELDS: dict[str, tuple[Any, Any]] = {
    "learning_rate": (float, 3e-6),
    "dataset_num_proc": (int | None, None),
    "num_mini_batches": (int, 1),
    "total_episodes": (int | None, None),
    "local_rollout_forward_batch_size": (int, 64),
    "num_sample_generations": (int, 10),
    "response_length": (int, 53),
    "stop_token": (Literal["eos"] | None, None),
    "stop_token_id": (int | None, None),
    "temperature": (float, 0.7),
    "missing_eos_penalty": (float | None, None),
    "sft_model_path": (str, "EleutherAI/pythia-160m"),
    "world_size": (int | None, None),
    "num_total_batches": (int | None, None),
    "micro_batch_size": (int | None, None),
    "local_batch_size": (int | None, None),
    "batch_size": (int | None, None),
    "local_mini_batch_size": (int | None, None),
    "mini_batch_size": (int | None, None),
    "push_to_hub": (bool, False),
    "reward_model_path": (str, "EleutherAI/pythia-160m"),
    "model_adapter_name": (str | None, None),
    "ref_adapter_name": (str | None, None),
    "num_ppo_epochs": (int, 4),
    "whiten_rewards": (bool, False),
    "kl_coef": (float, 0.05),
    "kl_estimator": (Literal["k1", "k3"], "k1"),
    "cliprange": (float, 0.2),
    "vf_coef": (float, 0.1),
    "cliprange_value": (float, 0.2),
    "gamma": (float, 1.0),
    "lam": (float, 0.95),
    "ds3_gather_for_generation": (bool, True),
}
REDEFINED: dict[str, tuple[Any, Any]] = {  # of the base of all of TRL's configurations
    "logging_steps": (float, 10),
    "gradient_checkpointing": (bool, True),
    "bf16": (bool | None, None),
}


def signature(trainer: type) -> dict[str, Any]:
    parameters = inspect.signature(trainer).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def typed_defaults(config: Any) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(config)
    return {f.name: (hints[f.name], f.default) for f in fields(config)}


# -- names, order, types, defaults ------------------------------------------------------------------------------------


def test_the_trainers_have_the_arguments_of_ppo_trainer():
    assert list(signature(PPOTrainer).items()) == list(ARGUMENTS.items())
    assert list(signature(StepPOTrainer)) == list(ARGUMENTS)
    optional = {name: default for name, default in ARGUMENTS.items() if default is not REQUIRED}
    assert signature(StepPOTrainer) == dict.fromkeys(ARGUMENTS) | optional


def test_the_configuration_has_the_fields_of_trls():
    found = typed_defaults(PPOConfig)
    assert {name: found[name] for name in (*FIELDS, *REDEFINED)} == FIELDS | REDEFINED
    inherited = {f.name for f in fields(TrainingArguments)}
    assert [name for name in found if name not in inherited] == [name for name in FIELDS if name not in inherited]
    others = set(found) - set(FIELDS) - set(REDEFINED)
    assert others == inherited - set(FIELDS) - set(REDEFINED)


@pytest.mark.skipif(not IS_THEIRS_THERE, reason="this TRL has no `PPOTrainer`")
def test_what_is_recorded_is_what_trl_has():
    assert list(signature(THEIR_TRAINER).items()) == list(ARGUMENTS.items())
    found = typed_defaults(THEIR_CONFIG)
    assert list(found) == list(typed_defaults(PPOConfig))
    assert {name: found[name] for name in (*FIELDS, *REDEFINED)} == FIELDS | REDEFINED
    assert [name for name in THEIR_CONFIG.__annotations__ if name in FIELDS] == list(FIELDS)


def test_nothing_that_trl_inherits_reaches_a_run():
    """A run is the same under every TRL: what ours does not replace is never called, or is of `Trainer` itself."""
    never_called = {"_send_telemetry", "_template_file"}
    of_trl = [base for base in PPOTrainer.__mro__[1:] if base.__module__.startswith("trl.")]
    inherited = {name for base in of_trl for name in vars(base) if not name.startswith("__")}
    ours = {name for base in PPOTrainer.__mro__ if base.__module__.startswith("trl_steppo.") for name in vars(base)}
    assert inherited - ours - never_called == set()
    of_trl = [base for base in PPOConfig.__mro__[1:] if base.__module__.startswith("trl.")]
    inherited = {name for base in of_trl for name in vars(base) if not name.startswith("__")}
    assert inherited - set(vars(PPOConfig)) <= {f.name for f in fields(TrainingArguments)}


def test_no_telemetry_is_sent(tmp_path, monkeypatch):
    sent: list[Any] = []
    monkeypatch.setattr(PPOTrainer, "_send_telemetry", sent.append, raising=False)
    make_trainer(PPOTrainer, PPOConfig(**SMALL, output_dir=str(tmp_path)))
    assert not sent


# -- classes ----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"use_cpu": True, "report_to": "none", "total_episodes": 8, "gradient_checkpointing": False}


def make_trainer(trainer: type, args: Any) -> Any:
    return trainer(args, TOKENIZER, make_model(), None, make_classifier(3), id_rows(), None)


@pytest.mark.parametrize("trainer_class", [PPOTrainer, StepPOTrainer])
def test_trainers_and_configurations_are_instances_of_trls(tmp_path, trainer_class):
    """TRL's own configuration is taken, too, where there is one."""
    config = THEIR_CONFIG if IS_THEIRS_THERE else PPOConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's own default has an older name
        args = config(**SMALL, output_dir=str(tmp_path), kl_coef=0.0, lam=0.9)
    trainer = make_trainer(trainer_class, args)
    assert isinstance(trainer, PPOTrainer)
    assert isinstance(trainer, THEIR_TRAINER)
    assert isinstance(trainer.args, PPOConfig)
    assert isinstance(trainer.args, THEIR_CONFIG)
    assert (trainer.args.advantage_estimator, trainer.args.kl_coef, trainer.args.lam) == ("token_gae", 0.0, 0.9)


# -- command line, pickles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_every_field_is_a_flag(tmp_path, parser_class):
    parser = parser_class(PPOConfig)
    words = " ".join(parser.format_help().split())
    assert all(f"--{name}" in words for name in FIELDS)
    options = ["--output_dir", str(tmp_path), "--use_cpu", "--kl_coef", "0.1", "--stop_token", "eos"]
    options += ["--total_episodes", "9", "--whiten_rewards", "--bf16", "false", "--model_adapter_name", "a"]
    (args,) = parser.parse_args_into_dataclasses(options)
    assert (args.kl_coef, args.stop_token, args.total_episodes, args.whiten_rewards) == (0.1, "eos", 9, True)
    assert (args.bf16, args.model_adapter_name, args.lam) == (False, "a", 0.95)


@pytest.mark.parametrize("file", sorted(DIRECTORY.glob("configs_trl_*.bin")), ids=lambda file: file.stem)
def test_a_configuration_of_another_trl_loads(tmp_path, file):
    found = torch.load(file, weights_only=False)
    ppo, steppo = found["ppo"], found["steppo"]
    assert (type(ppo), type(steppo)) == (PPOConfig, StepPOConfig)
    assert (ppo.seed, ppo.kl_coef, ppo.stop_token, ppo.lam, ppo.bf16) == (7, 0.2, "eos", 0.95, False)
    assert (steppo.seed, steppo.num_generations, steppo.uses_critic) == (8, 4, False)
    assert ppo.to_dict()["stop_token"] == "eos"
    again = StepPOConfig.from_ppo_config(ppo)
    assert (again.advantage_estimator, again.seed) == ("token_gae", 7)
    args: Any = ppo
    args.output_dir, args.gradient_checkpointing = str(tmp_path), False
    assert make_trainer(PPOTrainer, args).args.kl_coef == 0.2


def test_a_checkpoint_keeps_the_configuration(tmp_path):
    trainer = make_trainer(PPOTrainer, PPOConfig(**SMALL, output_dir=str(tmp_path), lam=0.8))
    trainer.save_model()
    args = torch.load(Path(tmp_path, "training_args.bin"), weights_only=False)
    assert (type(args), args.lam, args.advantage_estimator) == (StepPOConfig, 0.8, "token_gae")
