"""`examples/warm_start.py` teaches a model the form of a tool call."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.examples.scripts import load_script
from trl_steppo.assets import MINI_WIKI_POLICY


def test_only_responses_are_imitated() -> None:
    script = load_script("warm_start")
    tokenizer = AutoTokenizer.from_pretrained(MINI_WIKI_POLICY)
    (example,) = script.demonstrations(tokenizer, "Search, then answer.", count=1, seed=0)
    imitated = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    text = tokenizer.decode(imitated)
    assert text.startswith('<tool_call>\n{"name": "search"')
    assert text.endswith("</tool_call><|im_end|>")
    assert "Search, then answer." in tokenizer.decode(example["input_ids"])
    assert "Search, then answer." not in text
    assert "[1]" not in text


def test_saves_a_model_that_was_trained(tmp_path) -> None:
    script = load_script("warm_start")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("system_prompt: Search, then answer.\n")
    output_dir = tmp_path / "warm"
    script.main(script.Arguments(MINI_WIKI_POLICY, str(output_dir), str(recipe), num_steps=1, batch_size=2))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (MINI_WIKI_POLICY, output_dir))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(output_dir).chat_template
