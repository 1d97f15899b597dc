"""Every token that ends a response ends it, and the template's own end follows where it was another one."""

import pytest
from transformers import GenerationConfig

from tests.chat.trl_templates import make_tokenizer
from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.chat import ChatFormat
from trl_steppo.gateway.tokens import ChatFormats
from trl_steppo.models import end_token_ids, stored_end_token_ids

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}


@pytest.mark.parametrize(("eos", "expected"), [(None, ()), (7, (7,)), ([7], (7,)), ([7, 9], (7, 9))])
def test_the_ends_of_a_model_are_those_of_its_generation_configuration(eos, expected, tmp_path):
    config = GenerationConfig(eos_token_id=eos)
    assert end_token_ids(config) == expected
    config.save_pretrained(tmp_path)
    assert stored_end_token_ids(str(tmp_path)) == expected
    assert end_token_ids(None) == ()


def test_a_model_without_a_generation_configuration_has_those_of_its_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "eos_token_id": [5, 6]}')
    assert stored_end_token_ids(str(tmp_path)) == (5, 6)
    assert stored_end_token_ids(MINI_WIKI_POLICY) == (2,)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_5_think", "llama3_1", "gptoss"])
@pytest.mark.parametrize("end", ["<|endoftext|>", "a"])
def test_another_end_stops_a_response_and_is_seen_by_nobody_but_the_next_prompt(name, end):
    tokenizer = make_tokenizer(name)
    other = tokenizer.convert_tokens_to_ids(end)
    plain = ChatFormat(tokenizer, tools=[SEARCH])
    chat = ChatFormat(tokenizer, tools=[SEARCH], end_token_ids=[other, plain.end_of_turn_id])
    assert chat.stop_token_ids == (*plain.stop_token_ids, other)
    said = tokenizer.encode("In Pris", add_special_tokens=False)
    ended = [*said, other]
    assert chat.close(ended) == [chat.end_of_turn_id]
    assert chat.close([*said, chat.end_of_turn_id]) == []
    assert chat.close(said) == [chat.end_of_turn_id]
    assert chat.decode(ended) == "In Pris"
    assert chat.parse(ended) == plain.parse(said)
    messages = [{"role": "tool", "name": "search", "content": "x"}]
    assert chat.append(messages, tool_call_names=["search"]) == plain.append(messages, tool_call_names=["search"])


def test_the_gateways_formats_stop_at_them_too():
    tokenizer = make_tokenizer("qwen2_5")
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for tools in ([], [SEARCH]):
        chat = ChatFormats(tokenizer, end_token_ids=[other]).of(tools)
        assert chat.stop_token_ids == (chat.end_of_turn_id, other)
