"""Random tool calls, written by the templates themselves, come back exactly."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.chat.formats.call_writers import OPEN_THOUGHT, WRITERS, make_chat, make_tokenizer
from tests.chat.formats.test_model_outputs import TOOLS

TEXTS = (
    *("", "x", "2024", "02134", "1e5", "null", "true", '{"a": 1}', "[1]", '"', "'", "\\", "\\n", "a b", " x ", "\n"),
    *("</think>", "<tool_call>", "</tool_call>", "é", "漢字", "🎉", "}}", "<b>", "a, b", "a=b", "key:", "\t", "```"),
)
CALLS_OF_A_TEMPLATE = 40


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(TEXTS) for _ in range(rng.randrange(4)))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 2 else 5)
    if kind == 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return {f"k{index}": random_value(rng, depth + 1) for index in range(rng.randrange(3))}
    return (random_text(rng), rng.randrange(-100, 10**12), rng.random() - 0.5, rng.random() < 0.5, None)[kind]


def random_arguments(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {
        "text": random_text(rng),
        "count": rng.randrange(-(10**12), 10**12),
        "ratio": rng.choice([0.5, -2.25, 1e-07, 1e22, 3.0]),
        "sure": rng.random() < 0.5,
        "tags": [random_text(rng) for _ in range(rng.randrange(4))],
        "options": {f"k{index}": random_value(rng) for index in range(rng.randrange(4))},
    }
    arguments = {name: value for name, value in given.items() if name == "text" or rng.random() < 0.6}
    return arguments | ({"note": None} if rng.random() < 0.3 else {})


def in_order(value: Any) -> Any:
    """Gemma's template sorts the keys of every object."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("template", WRITERS)
def test_calls_that_a_template_writes_are_read_back_exactly(template: str) -> None:
    rng = random.Random(template)
    chat, tokenizer, writer = make_chat(template, TOOLS), make_tokenizer(template), WRITERS[template]
    user = {"role": "user", "content": "Do it."}
    prompt = chat.render([user])
    answer = {"role": "tool", "name": "act", "content": "done"}
    for _ in range(CALLS_OF_A_TEMPLATE):
        arguments = random_arguments(rng)
        if template.startswith("deepseek") and "</think>" in repr(arguments):
            continue  # told in text, it cuts its own call there
        call = {"type": "function", "function": {"name": "act", "arguments": arguments}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        written = chat.render([user, turn, answer])
        pairs = enumerate(zip(prompt, written, strict=False))
        common = next((index for index, (a, b) in pairs if a != b), len(prompt))
        response = tokenizer.decode(written[common:]).partition(writer.call_end)[0] + writer.call_end
        if template in OPEN_THOUGHT and "</think>" not in response[:12]:  # the template leaves out what was thought
            response = writer.opened() + response
        parsed = chat.parse(tokenizer.encode(response, add_special_tokens=False), prompt)
        read = [one["function"] for one in parsed.message.get("tool_calls", ())]
        assert repr(in_order(read)) == repr(in_order([call["function"]])), (response, parsed)
