"""LoRA on policy and critic: what trains, what is the reference, what is in memory, and what is saved."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn

from tests.trainer.tiny import TOKENIZER, make_classifier, make_model, make_trainer, prompt_rows, same, weights
from trl_steppo import StepPOTrainer
from trl_steppo.errors import CheckpointError, ConfigurationError
from trl_steppo.models import plain_model

KL: dict[str, Any] = {"kl_coef": 0.1}


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


def trained(directory: Path, **arguments: Any) -> StepPOTrainer:
    arguments.setdefault("peft_config", lora())
    trainer = make_trainer(directory, **arguments)
    trainer.train()
    return trainer


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    after = weights(module)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("critic_shares_base", [False, True])
def test_adapters_and_the_value_head_train_and_nothing_else(tmp_path, gradient_checkpointing, critic_shares_base):
    trainer = make_trainer(
        tmp_path,
        peft_config=lora(),
        critic_shares_base=critic_shares_base,
        gradient_checkpointing=gradient_checkpointing,
        num_mini_batches=2,
        **KL,
    )
    policy, critic = weights(trainer.model), weights(trainer.value_model)
    trainer.train()
    assert moved(policy, trainer.model) == {name for name in policy if "lora_" in name}
    assert moved(critic, trainer.value_model) == {n for n in critic if "lora_" in n or "modules_to_save" in n}
    assert trainer.state.log_history[0]["objective/kl"] == 0  # the reference is the base, and so is the first policy
    assert trainer.state.log_history[1]["objective/kl"] > 0


def test_checkpointing_changes_nothing(tmp_path):
    a, b = (make_trainer(tmp_path / str(on), peft_config=lora(), gradient_checkpointing=on) for on in (False, True))
    forwards: dict[StepPOTrainer, int] = {a: 0, b: 0}
    for trainer in (a, b):
        layer = plain_model(trainer.model).model.layers[0].mlp

        def count(*args: Any, trainer: StepPOTrainer = trainer) -> None:
            forwards[trainer] += torch.is_grad_enabled()

        layer.register_forward_pre_hook(count)  # a recomputation may stop before the end
        trainer.train()
    assert forwards[b] == 2 * forwards[a]  # once more in every backward pass
    assert same(weights(a.model), weights(b.model))


def test_a_shared_base_is_one_copy_and_the_same_training(tmp_path):
    apart, shared = (trained(tmp_path / str(on), critic_shares_base=on, **KL) for on in (False, True))
    assert same(weights(apart.model), weights(shared.model))
    assert same(weights(apart.value_model), weights(shared.value_model))

    def storages(module: nn.Module) -> set[int]:
        return {parameter.data_ptr() for parameter in module.parameters()}

    def numbers(trainer: StepPOTrainer) -> int:
        found = {p.data_ptr(): p.numel() for m in (trainer.model, trainer.value_model) for p in m.parameters()}
        return sum(found.values())

    base = dict(make_model().model.named_parameters())
    assert not storages(apart.model) & storages(apart.value_model)
    assert len(storages(shared.model) & storages(shared.value_model)) == len(base)
    assert numbers(apart) - numbers(shared) == sum(p.numel() for p in base.values())


def test_the_base_without_its_adapter_is_the_reference(tmp_path):
    """As with a `ref_model` that is a copy of the base."""
    within = trained(tmp_path / "within", kl_coef=0.1, kl_loss_coef=0.5, num_ppo_epochs=2)
    beside = trained(tmp_path / "beside", kl_coef=0.1, kl_loss_coef=0.5, num_ppo_epochs=2, ref_model=make_model())
    assert within.ref_model is None
    assert same(weights(within.model), weights(beside.model))


def two_adapters() -> Any:
    """A policy with a trained adapter `start` as the reference, and a copy of it, `policy`, to train."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), lora(init_lora_weights=False), adapter_name="start")
    model.add_adapter("policy", lora())
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if ".start." in name:
                parameters[name.replace(".start.", ".policy.")].copy_(parameter)
    return model


def test_model_adapter_name_and_ref_adapter_name(tmp_path):
    names = {"model_adapter_name": "policy", "ref_adapter_name": "start"}
    trainer = make_trainer(tmp_path, model=two_adapters(), **names, **KL)
    before = weights(trainer.model)
    trainer.train()
    assert moved(before, trainer.model) == {n for n in before if ".policy." in n}
    first, second = (logs["objective/kl"] for logs in trainer.state.log_history if "objective/kl" in logs)
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-3
    with trainer.null_ref_context():
        assert trainer.model.active_adapter == "start"
    assert trainer.model.active_adapter == "policy"
    trainer.save_model()
    assert (tmp_path / "policy" / "adapter_model.safetensors").is_file()


def test_a_policy_that_has_its_adapter_already(tmp_path):
    torch.manual_seed(42)
    wrapped = get_peft_model(make_model(), lora())
    given = make_trainer(tmp_path / "a", model=wrapped)
    assert given.policy_adapter == "default"
    given.train()
    assert {name for name, p in given.model.named_parameters() if p.requires_grad} == {
        name for name, _ in given.model.named_parameters() if "lora_" in name
    }
    critic = dict(given.value_model.named_parameters())  # has an adapter of its own
    assert any("lora_" in name for name in critic)


def test_a_given_critic_trains_in_full_and_one_with_lora_its_adapter(tmp_path):
    full = make_trainer(tmp_path / "full", peft_config=lora(), value_model=make_classifier())
    before = weights(full.value_model)
    full.train()
    assert len(moved(before, full.value_model)) > 10
    critic = get_peft_model(make_classifier(), lora(task_type="SEQ_CLS", modules_to_save=["score"]))
    own = make_trainer(tmp_path / "own", value_model=critic)
    before = weights(own.value_model)
    own.train()
    assert moved(before, own.value_model) == {n for n in before if "lora_" in n or "modules_to_save" in n}


def test_resuming(tmp_path):
    settings: dict[str, Any] = {"total_episodes": 24, "save_strategy": "steps", "save_steps": 1, **KL}
    whole = trained(tmp_path / "whole", critic_shares_base=True, **settings)
    rest = make_trainer(tmp_path / "rest", peft_config=lora(), critic_shares_base=True, **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(rest.model), weights(whole.model))
    assert same(weights(rest.value_model), weights(whole.value_model))


# -- saving -----------------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
base, adapter, merged, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(merged)
ids = tokenizer(question, return_tensors="pt").input_ids
models = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)]
models += [AutoModelForCausalLM.from_pretrained(directory) for directory in (merged, base)]
for model in models:
    print(model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0].tolist())
critic = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
critic = PeftModel.from_pretrained(critic, adapter + "/critic").eval()
print(critic(input_ids=ids).logits.item())
"""


@pytest.mark.parametrize("critic_shares_base", [False, True])
def test_saved_adapters_load_elsewhere(tmp_path, critic_shares_base):
    """By plain transformers and peft, in another process: the same greedy output, and the same value."""
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    trainer = trained(tmp_path / "run", model=model, critic_shares_base=critic_shares_base, learning_rate=0.1)
    trainer.save_model()
    before = weights(trainer.model)
    trainer.save_merged_model(str(tmp_path / "merged"))
    assert same(weights(trainer.model), before)  # saving leaves no rounding errors behind
    arguments = [str(tmp_path / "base"), str(tmp_path / "run"), str(tmp_path / "merged"), "row 3"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    adapter, merged, base, value = done.stdout.strip().splitlines()[-4:]
    ids = TOKENIZER("row 3", return_tensors="pt").input_ids
    own = trainer.model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0].tolist()
    assert adapter == merged == str(own)
    assert base != adapter
    assert float(value) == pytest.approx(trainer.value_model.eval()(input_ids=ids).logits.item(), abs=1e-5)
    sizes = [
        (tmp_path / d / f).stat().st_size
        for d, f in (("run", "adapter_model.safetensors"), ("merged", "model.safetensors"))
    ]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert sizes[0] < sizes[1]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"peft_config": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}, "virtual tokens"),
        ({"peft_config": lora(), "model": get_peft_model(make_model(), lora())}, "carries an adapter already"),
        ({"critic_shares_base": True}, "`critic_shares_base`=True has no effect"),
        ({"ref_adapter_name": "start"}, "`ref_adapter_name`='start' has no effect"),
        ({"ref_adapter_name": "x", "peft_config": lora(), **KL}, r"`ref_adapter_name` is 'x'.*\['default'\]"),
        ({"model_adapter_name": "x", "model": get_peft_model(make_model(), lora())}, "`model_adapter_name` is 'x'"),
        ({"critic_shares_base": True, "peft_config": lora(), "value_model": make_classifier()}, "remove one"),
        ({"critic_shares_base": True, "peft_config": lora(bias="all")}, "leave one out"),
        ({"critic_shares_base": True, "peft_config": lora(modules_to_save=["embed_tokens"])}, "leave one out"),
        ({"peft_config": lora(init_lora_weights="pissa")}, "no `value_model` as it was loaded"),
        ({"peft_config": lora(bias="all"), **KL}, "no `ref_model` as it was loaded"),
        (
            {"model": two_adapters(), "ref_adapter_name": "start", **KL},
            "`ref_adapter_name` is 'start', which is trained",
        ),
    ],
)
def test_mistakes_are_found_at_construction(tmp_path, arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(tmp_path, **copy.deepcopy(arguments))


def test_an_adapter_that_was_loaded_for_inference(tmp_path):
    model = get_peft_model(make_model(), lora())
    model.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="`is_trainable=True`"):
        make_trainer(tmp_path, model=model)


def test_a_reference_that_is_the_policy_s_own_base(tmp_path):
    base = make_model()
    with pytest.raises(ConfigurationError, match="`ref_model` is the policy itself"):
        make_trainer(tmp_path, model=get_peft_model(base, lora()), ref_model=base, **KL)


def test_a_critic_on_the_policy_s_own_trunk(tmp_path):
    policy, critic = make_model(), make_classifier()
    critic.model = policy.model
    with pytest.raises(ConfigurationError, match="both train model"):
        make_trainer(tmp_path, model=policy, value_model=critic)


def test_what_is_trained_beside_the_adapter(tmp_path):
    """No checkpoint of the adapter would hold it."""
    model = get_peft_model(make_model(), lora())
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"`model` trains .*lm_head.* besides its adapter"):
        make_trainer(tmp_path, model=model)


def test_rollouts_are_sampled_with_the_adapter(tmp_path):
    trainer = trained(tmp_path, eval_dataset=prompt_rows(4), num_ppo_epochs=2)
    assert trainer.sampler.model is plain_model(trainer.model)
    assert all(abs(logs["rollout/mismatch_kl"]) < 1e-9 for logs in trainer.state.log_history if "episode" in logs)


# -- an adapter that was trained before -------------------------------------------------------------------------------


def make_trained(adapter: str = "default", **changes: Any) -> Any:
    """A policy with an adapter that changes it."""
    torch.manual_seed(1)
    return get_peft_model(make_model(), lora(init_lora_weights=False, **changes), adapter_name=adapter)


def kl_of(trainer: StepPOTrainer) -> list[float]:
    return [logs["objective/kl"] for logs in trainer.state.log_history if "episode" in logs]


@pytest.mark.parametrize("adapter", ["default", "policy"])
@pytest.mark.parametrize("setting", ["kl_coef", "kl_loss_coef"])
def test_an_adapter_trained_before_is_its_own_reference(tmp_path, adapter, setting, caplog):
    """As with a `ref_model` that has a copy of it; the base model is another policy."""
    caplog.set_level(logging.WARNING, logger="trl_steppo")
    within = make_trainer(tmp_path / "within", model=make_trained(adapter), **{setting: 0.1})
    assert f"the adapter '{adapter}' of `model` was trained before" in caplog.text
    before = weights(within.model)
    within.train()
    beside = trained(
        tmp_path / "beside", model=make_trained(adapter), ref_model=make_trained(), peft_config=None, **{setting: 0.1}
    )
    assert within.ref_model is None
    assert kl_of(within)[0] == pytest.approx(0, abs=1e-6)
    assert kl_of(within)[1] > 1e-3
    assert kl_of(within) == pytest.approx(kl_of(beside), abs=1e-6)
    assert moved(before, within.model) == {n for n in before if f".{adapter}." in n}  # the copy stays as it is
    with within.null_ref_context():
        assert within.model.active_adapter == "reference"
    assert within.model.active_adapter == adapter


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_the_base_is_the_reference_of_a_new_adapter(tmp_path, changes, caplog):
    caplog.set_level(logging.WARNING, logger="trl_steppo")
    trainer = make_trainer(tmp_path, peft_config=lora(**changes), **KL)
    assert list(trainer.model.peft_config) == ["default"]
    assert "reference" not in caplog.text


def test_the_base_can_be_asked_for(tmp_path):
    """By a new adapter, which changes nothing."""
    model = make_trained()
    model.add_adapter("base", lora())
    trainer = trained(tmp_path, model=model, ref_adapter_name="base", peft_config=None, **KL)
    assert kl_of(trainer)[0] > 0.1


def test_no_copy_is_made_where_there_is_no_reference(tmp_path):
    assert list(make_trainer(tmp_path, model=make_trained()).model.peft_config) == ["default"]


def test_a_copy_of_an_adapter_is_sent_to_no_worker_and_saved_beside(tmp_path):
    trainer = trained(tmp_path, model=make_trained(), use_rollout_worker=True, peft_config=None, **KL)
    assert not any("reference" in name for name in trainer.sampler._trained)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "reference" / "adapter_model.safetensors").is_file()


def loaded(directory: Path) -> Any:
    return PeftModel.from_pretrained(make_model(), directory, is_trainable=True)


@pytest.mark.parametrize("begins", ["new", "trained"])
@pytest.mark.parametrize("goes_on", ["as it began", "from the checkpoint's adapter"])
def test_a_run_that_goes_on_has_the_reference_that_it_began_with(tmp_path, begins, goes_on):
    settings: dict[str, Any] = {"total_episodes": 24, "save_strategy": "steps", "save_steps": 1, **KL}

    def given() -> dict[str, Any]:
        return {"peft_config": lora()} if begins == "new" else {"model": make_trained(), "peft_config": None}

    whole = trained(tmp_path / "whole", **given(), **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"

    def start() -> dict[str, Any]:
        return given() if goes_on == "as it began" else {"model": loaded(checkpoint)}

    rest = make_trainer(tmp_path / "rest", **start(), **settings)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert kl_of(rest) == kl_of(whole)
    assert same(weights_of(rest, "default"), weights_of(whole, "default"))
    again = make_trainer(tmp_path / "again", **start(), **settings)  # from a checkpoint of the run that went on
    again.train(resume_from_checkpoint=str(tmp_path / "rest" / "checkpoint-3"))
    assert again._adapters.reference == whole._adapters.reference


def weights_of(trainer: StepPOTrainer, adapter: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(trainer.model).items() if adapter in name.split(".")}


def test_a_run_that_began_with_a_trained_adapter_does_not_go_on_with_a_new_one(tmp_path):
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, **KL}
    trained(tmp_path, model=make_trained(), peft_config=None, **settings)
    rest = make_trainer(tmp_path, peft_config=lora(), **settings)
    with pytest.raises(CheckpointError, match="`model` has a new one; load that adapter"):
        rest.train(resume_from_checkpoint=True)
