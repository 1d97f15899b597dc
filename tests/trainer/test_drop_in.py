"""What arguments of `PPOTrainer` and a plain `PPOConfig` do; `docs/get_started/from_ppo_trainer.md` has a table."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, OPTConfig, OPTForCausalLM, TrainingArguments, get_scheduler

from tests.trainer.tiny import (
    TOKENIZER,
    Endless,
    distance,
    id_rows,
    make_classifier,
    make_config,
    make_model,
    make_ppo_config,
    make_trainer,
    same,
    weights,
)
from trl_steppo import PPOConfig, PPOTrainer, StepPOTrainer
from trl_steppo.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "get_started" / "from_ppo_trainer.md"
DEFAULTS: dict[str, Any] = {"lr_scheduler_type": "linear", "gradient_checkpointing": True, "logging_steps": 10}
"""Where `PPOConfig` differs from the settings of other tests."""


def drop_in(directory: Path, **arguments: Any) -> StepPOTrainer:
    """Exactly what `PPOTrainer` takes."""
    settings = arguments.pop("settings", {})
    given: dict[str, Any] = {
        "model": make_model(),
        "ref_model": None,
        "reward_model": make_classifier(3),
        "value_model": make_classifier(),
        "train_dataset": id_rows(),
        **arguments,
    }
    return StepPOTrainer(
        args=make_ppo_config(directory, **{"lr_scheduler_type": "linear", **settings}),
        processing_class=TOKENIZER,
        **given,
    )


# -- the table --------------------------------------------------------------------------------------------------------


def rows_of_the_table() -> dict[str, tuple[str, str]]:
    """Argument or field: (what it does here, the test that shows it)."""
    lines = re.findall(r"^\| `([a-z_0-9]+)` \| (.+?) \| `(.+?)` \|$", TABLE.read_text(), flags=re.MULTILINE)
    return {name: (effect, test) for name, effect, test in lines}


def test_the_table_has_every_argument_and_field():
    arguments = set(inspect.signature(PPOTrainer.__init__).parameters) - {"self"}
    own_fields = {f.name for f in fields(PPOConfig)} - {f.name for f in fields(TrainingArguments)}
    redefined = {"learning_rate", "bf16", "gradient_checkpointing", "logging_steps", "max_grad_norm"}
    assert set(rows_of_the_table()) == arguments | own_fields | redefined


@pytest.mark.parametrize("name", sorted(rows_of_the_table()))
def test_the_test_that_the_table_names_exists(name):
    file, _, test = rows_of_the_table()[name][1].partition("::")
    source = (ROOT / "tests" / file).read_text()
    function, _, case = test.partition("[")
    assert f"def {function}(" in source
    assert not case or f'"{case.removesuffix("]")}"' in source


# -- PPOTrainer itself ------------------------------------------------------------------------------------------------


def ppo_trainer(directory: Path, **arguments: Any) -> PPOTrainer:
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    given: dict[str, Any] = {
        "model": make_model(),
        "ref_model": None,
        "reward_model": make_classifier(3),
        "value_model": make_classifier(),
        "train_dataset": id_rows(),
        "eval_dataset": id_rows(2),
        **arguments,
    }
    return PPOTrainer(make_ppo_config(directory, **settings), TOKENIZER, **given)


def test_ppo_trainer_trains_evaluates_saves_resumes_and_shows(tmp_path, capsys):
    whole, rest = ppo_trainer(tmp_path / "a"), ppo_trainer(tmp_path / "b")
    before = weights(whole.model)
    whole.train()
    assert distance(weights(whole.model), before) > 1e-3
    assert [logs["step"] for logs in whole.state.log_history if "eval_reward" in logs] == [1, 2]
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    same_config = drop_in(tmp_path / "c", settings={"lr_scheduler_type": "constant"})
    same_config.train()
    for trainer in (rest, same_config):
        assert same(weights(trainer.model), weights(whole.model))
        assert same(weights(trainer.value_model), weights(whole.value_model))
    whole.generate_completions()
    assert capsys.readouterr().out.count("shown/") == 2
    whole.save_model()
    saved = type(whole.model).from_pretrained(tmp_path / "a")
    assert same(weights(saved), weights(whole.model))
    assert (tmp_path / "a" / "critic" / "config.json").is_file()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "- ppo\n- trl\n" in card
    assert "steppo" not in card.partition("---\n\n")[0]
    assert "Proximal Policy Optimization Algorithms" in card


def test_ppo_trainer_with_an_adapter_and_a_critic_that_is_built(tmp_path):
    trainer = ppo_trainer(tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"), value_model=None)
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_what_ppo_trainer_refuses(tmp_path):
    with pytest.raises(ConfigurationError, match="`args` is a StepPOConfig, which `StepPOTrainer` takes"):
        PPOTrainer(make_config(tmp_path), TOKENIZER, make_model(), None, make_classifier(), id_rows(), None)
    with pytest.raises(ConfigurationError, match=r"`reward_model` is None.*or use `StepPOTrainer`"):
        ppo_trainer(tmp_path, reward_model=None)
    with pytest.raises(ConfigurationError, match="`args` is"):
        PPOTrainer(None, TOKENIZER, make_model(), None, make_classifier(), id_rows(), None)


# -- constructor arguments --------------------------------------------------------------------------------------------


def test_a_plain_config_and_all_models(tmp_path):
    trainer = drop_in(tmp_path)
    assert trainer.args.advantage_estimator == "token_gae"
    assert trainer.args.importance_sampling_level == trainer.args.aggregation == "token"
    policy, critic, reward = (weights(m) for m in (trainer.model, trainer.value_model, trainer.player.rewards.model))
    reference = weights(trainer.ref_model)
    trainer.train()
    assert distance(weights(trainer.model), policy) > 1e-3
    assert distance(weights(trainer.value_model), critic) > 1e-3
    assert same(weights(trainer.ref_model), reference)
    assert same(weights(trainer.player.rewards.model), reward)
    logs = trainer.state.log_history[-2]
    assert {  # as `PPOTrainer` logs them
        *("eps", "episode", "lr", "objective/kl", "objective/entropy", "objective/non_score_reward"),
        *("objective/rlhf_reward", "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg"),
        *("loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "policy/entropy_avg", "val/ratio"),
        *("val/ratio_var", "val/num_eos_tokens"),
    } <= set(logs)


def test_derived_fields_are_filled_in_as_there(tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 4}
    args = drop_in(tmp_path, settings={**settings, "total_episodes": 17, "world_size": 99}).args
    assert args.world_size == 1
    assert args.num_total_batches == 3
    assert (args.batch_size, args.local_batch_size, args.micro_batch_size) == (8, 8, 4)
    assert (args.mini_batch_size, args.local_mini_batch_size) == (2, 2)


def joint_optimizer(policy: Any, critic: Any, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=rate, weight_decay=0.0)


def test_one_optimizer_over_both_networks(tmp_path):
    """The same training as with one each; the schedule moves once an update."""
    settings: dict[str, Any] = {"optim": "adamw_torch", "weight_decay": 0.0}
    settings |= {"num_mini_batches": 2, "lr_scheduler_type": "linear", "total_episodes": 32}
    apart = drop_in(tmp_path / "a", settings=settings)
    apart.train()
    policy, critic = make_model(), make_classifier()
    optimizer = joint_optimizer(policy, critic)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    joint = drop_in(
        tmp_path / "b", model=policy, value_model=critic, optimizers=(optimizer, scheduler), settings=settings
    )
    joint.train()
    assert same(weights(joint.model), weights(apart.model))
    assert same(weights(joint.value_model), weights(apart.value_model))
    rates = [logs["lr"] for logs in joint.state.log_history if "lr" in logs]
    assert rates == [logs["lr"] for logs in apart.state.log_history if "lr" in logs]
    assert scheduler.last_epoch == 4


def test_one_optimizer_without_a_scheduler_follows_the_settings(tmp_path):
    policy, critic = make_model(), make_classifier()
    optimizer = joint_optimizer(policy, critic)
    trainer = drop_in(tmp_path, model=policy, value_model=critic, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == 0.0  # `lr_scheduler_type` is linear


def test_one_optimizer_leaves_a_network_alone_that_is_not_trained(tmp_path):
    policy, critic = make_model(), make_classifier()
    before = weights(policy)
    trainer = make_trainer(
        tmp_path,
        model=policy,
        value_model=critic,
        environment_factory=Endless,
        optimizers=(joint_optimizer(policy, critic), None),
        critic_warmup_updates=1,
    )
    trainer.learner.args.max_steps = 1
    trainer.args.num_total_batches = 1
    trainer.train()
    assert same(weights(policy), before)
    assert not any(id(p) in {id(q) for q in policy.parameters()} for p in trainer.optimizer.optimizer.state)


def test_one_optimizer_resumes(tmp_path):
    def make(name: str) -> StepPOTrainer:
        policy, critic = make_model(), make_classifier()
        settings = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 24}
        optimizers = (joint_optimizer(policy, critic), None)
        return drop_in(tmp_path / name, model=policy, value_model=critic, optimizers=optimizers, settings=settings)

    whole, rest = make("a"), make("b")
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert not (tmp_path / "a" / "checkpoint-1" / "critic" / "optimizer.pt").exists()
    assert same(weights(rest.model), weights(whole.model))
    assert same(weights(rest.value_model), weights(whole.value_model))


def test_optimizers_that_cannot_work(tmp_path):
    policy, critic = make_model(), make_classifier()
    optimizer = joint_optimizer(policy, critic)
    scheduler = get_scheduler("constant", optimizer)
    for given, words in [
        ({"optimizers": (None, scheduler)}, "a scheduler without an optimizer"),
        (
            {"optimizers": (optimizer, None), "critic_learning_rate": 1e-3},
            "`critic_learning_rate`=0.001 has no effect",
        ),
        ({"optimizers": (optimizer, None), "value_model": None}, "no parameter of `value_model`"),
        ({"optimizers": (optimizer, None), "model": make_model()}, "no parameter of `model`"),
        ({"optimizers": (3, None)}, "`optimizers` has a int"),
        ({"optimizers": (optimizer, None), "peft_config": LoraConfig(task_type="CAUSAL_LM")}, "a `PeftModel` instead"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            make_trainer(tmp_path, **{"model": policy, "value_model": critic, **given})


def text_rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"query": f"row {index}"} for index in range(count)]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_data_collator(tmp_path, padding_side):
    """Its padding is taken away again; what it makes of the rows is what is trained on."""
    plain = drop_in(tmp_path / "plain")
    plain.train()
    calls: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        calls.append(len(rows))
        return TOKENIZER([row["query"] for row in rows], padding=True, padding_side=padding_side, return_tensors="pt")

    collated = drop_in(tmp_path / "collated", data_collator=collate, train_dataset=text_rows())
    collated.train()
    assert calls == [1, 8, 8]  # a try at construction, then all rows of an update at once
    assert same(weights(collated.model), weights(plain.model))
    theirs = drop_in(tmp_path / "theirs", data_collator=DataCollatorWithPadding(TOKENIZER))
    theirs.train()
    assert same(weights(theirs.model), weights(plain.model))


def with_opt() -> Any:
    """An architecture whose layers keep the probability themselves."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=len(TOKENIZER), word_embed_proj_dim=32, pad_token_id=257, dropout=0.5, **sizes)
    return OPTForCausalLM(config)


@pytest.mark.parametrize("make", [lambda: make_model(attention_dropout=0.5), with_opt], ids=["Qwen2", "OPT"])
def test_dropout_is_off(tmp_path, make):
    """As in `PPOTrainer`: importance ratios are 1 before anything has moved."""
    trainer = drop_in(tmp_path, model=make(), settings={"num_ppo_epochs": 1})
    trainer.train()
    assert trainer.state.log_history[0]["val/ratio"] == pytest.approx(1.0, abs=1e-6)


def test_a_reward_model_with_an_adapter(tmp_path):
    torch.manual_seed(0)
    reward_model = get_peft_model(make_classifier(3), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    merged = copy.deepcopy(reward_model).merge_and_unload()
    one, other = (drop_in(tmp_path / str(n), reward_model=m) for n, m in enumerate((reward_model, merged)))
    for trainer in (one, other):
        trainer.train()
    scores = [[logs["objective/scores"] for logs in t.state.log_history if "episode" in logs] for t in (one, other)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_generate_completions(tmp_path, capsys):
    trainer = drop_in(tmp_path, eval_dataset=id_rows(6))
    trainer.generate_completions(sampling=True)
    assert capsys.readouterr().out.count("shown/") == 3
    trainer.generate_completions()
    assert capsys.readouterr().out.count("shown/") == 6
    drop_in(tmp_path).generate_completions()
    assert capsys.readouterr().out == ""


def test_num_sample_generations_shows_the_evaluation_set(tmp_path, capsys):
    """As in `PPOTrainer`: after the first update, and then `num_sample_generations` times over the run."""
    settings = {"num_sample_generations": 2, "total_episodes": 32}
    drop_in(tmp_path, eval_dataset=id_rows(2), settings=settings).train()
    assert capsys.readouterr().out.count("played greedily") == 2


def test_missing_eos_penalty(tmp_path):
    """A response that stopped at another token than EOS lacks it, as in `PPOTrainer`."""
    settings = {"response_length": 100, "stop_token_id": 65, "num_ppo_epochs": 1, "total_episodes": 8}
    without = drop_in(tmp_path / "a", settings=settings)
    roll_out, episodes = without._roll_out, []
    without._roll_out = lambda *args: episodes.extend(roll_out(*args)) or episodes  # type: ignore[method-assign]
    without.train()
    with_it = drop_in(tmp_path / "b", settings={**settings, "missing_eos_penalty": 5.0})
    with_it.train()
    lacking = [TOKENIZER.eos_token_id not in episode.steps[0].response_ids for episode in episodes]
    assert any(lacking)
    assert any(
        episode.steps[0].stop_reason == "stop" and lacks for episode, lacks in zip(episodes, lacking, strict=True)
    )
    a, b = (trainer.state.log_history[0]["objective/scores"] for trainer in (without, with_it))
    assert a - b == pytest.approx(5 * sum(lacking) / 8, abs=1e-5)


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bf16_trains_on_a_cpu(tmp_path, kind):
    """Log-probabilities and values are float32 all the same."""
    dtype = torch.bfloat16 if kind == "weights" else torch.float32
    models = {"model": make_model().to(dtype), "value_model": make_classifier().to(dtype)}
    trainer = make_trainer(tmp_path, bf16=kind == "autocast", environment_factory=Endless, num_ppo_epochs=2, **models)
    seen: list[torch.dtype] = []
    for network in (trainer.learner.policy, trainer.learner.critic):
        network.module.register_forward_hook(
            lambda module, args, output: seen.append((output[0] if isinstance(output, tuple) else output).dtype)
        )
    inside: set[torch.dtype] = set()
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: inside.add(output.dtype))
    before = weights(trainer.model)
    trainer.train()
    assert inside == {torch.bfloat16}  # in rollouts, scoring and training
    assert set(seen) == {torch.float32}
    assert distance(weights(trainer.model), before) > 1e-3
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    logs = trainer.state.log_history[-2]
    assert logs["policy/skipped_steps"] == 0
    assert abs(logs["rollout/mismatch_kl"]) < 1e-2


# -- what there is no place for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha`=5.0 cannot be used"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`=0.1 cannot be used"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size`=True cannot be used"),
        ({"enable_jit_checkpoint": True}, "`enable_jit_checkpoint`=True cannot be used"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "choose a schedule over updates"),
        ({"kl_estimator": "k2"}, "`kl_estimator` is 'k2'"),
        ({"stop_token": "eos", "stop_token_id": 3}, "both set"),
        ({"num_mini_batches": 9}, "`num_mini_batches`=9 exceeds"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        drop_in(tmp_path, eval_dataset=id_rows(2), settings=settings)


@pytest.mark.parametrize(
    ("engine", "words"),
    [("FSDP", "FSDP in its version 1; set `fsdp_version: 2`"), ("MEGATRON_LM", "launched with MEGATRON_LM")],
)
def test_engines_that_this_version_does_not_know(tmp_path, monkeypatch, engine, words):
    trainer = drop_in(tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType[engine])
    with pytest.raises(ConfigurationError, match=words):
        drop_in(tmp_path)


def test_arguments_that_cannot_work(tmp_path):
    model = make_model()
    with pytest.raises(ConfigurationError, match="`ref_model` is the policy itself"):
        drop_in(tmp_path, model=model, ref_model=model)
    reward = make_classifier()
    with pytest.raises(ConfigurationError, match="`value_model` is the `reward_model` itself"):
        drop_in(tmp_path, reward_model=reward, value_model=reward)
    with pytest.raises(ConfigurationError, match="nothing pays a reward"):
        drop_in(tmp_path, reward_model=None)
    with pytest.raises(ConfigurationError, match="`evaluate"):
        drop_in(tmp_path).predict(id_rows())
