"""TRL's PPO example with our class: in full, with LoRA, and resumed, on a model of another family."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
)

from tests.trainer.tiny import make_tokenizer

SCRIPT = str(Path(__file__).parents[2] / "examples" / "ppo_dropin.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A policy and a reward model of the family that the example names, and prompts."""
    root = tmp_path_factory.mktemp("ppo")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer) + 1, eos_token_id=tokenizer.eos_token_id, num_labels=1, **settings
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(root / "sft")
    GPTNeoXForSequenceClassification(config).save_pretrained(root / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(root / name)
    rows = [json.dumps({"prompt": f"a story about the number {index}"}) for index in range(40)]
    (root / "prompts.jsonl").write_text("\n".join(rows))
    return root


def run(monkeypatch, files: Path, output: Path, *flags: str) -> None:
    arguments = ["--dataset_name", files / "prompts.jsonl", "--output_dir", output]
    arguments += ["--sft_model_path", files / "sft", "--reward_model_path", files / "reward"]
    arguments += ["--per_device_train_batch_size", 4, "--total_episodes", 8, "--response_length", 6]
    arguments += ["--missing_eos_penalty", 1.0, "--learning_rate", 1e-3, "--use_cpu", "--report_to", "none"]
    arguments += ["--logging_steps", 1, "--eval_strategy", "epoch", *flags]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")


def test_trains_evaluates_saves_and_shows(monkeypatch, files, tmp_path, capsys):
    run(monkeypatch, files, tmp_path, "--save_strategy", "steps", "--save_steps", "1")
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [logs["episode"] for logs in history if "episode" in logs] == [4, 8]
    assert any("eval_reward" in logs for logs in history)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    start = AutoModelForCausalLM.from_pretrained(files / "sft")
    assert not torch.equal(trained.get_output_embeddings().weight, start.get_output_embeddings().weight)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").config.num_labels == 1
    assert "played greedily" in capsys.readouterr().out
    before = (tmp_path / "model.safetensors").read_bytes()
    run(monkeypatch, files, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    again = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert again[0] == history[0]  # the first update was not played again: its speed is logged, too
    assert again[-1]["train_steps_per_second"] == pytest.approx(1 / again[-1]["train_runtime"], rel=0.05)


def test_ppo_dropin_trains_with_lora(monkeypatch, files, tmp_path):
    run(monkeypatch, files, tmp_path, "--use_peft", "--lora_target_modules", "all-linear")
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
