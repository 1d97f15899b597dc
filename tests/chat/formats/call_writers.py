"""How the chat templates that TRL ships write a turn: a writer for each form of tool calls, and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_steppo.chat import ChatFormat

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
Part = tuple[str, ...] | tuple[str, str, Mapping[str, Any]]
"""`("think", text)`, `("text", text)`, `("raw", text)` or `("call", name, arguments)`."""


@dataclass(frozen=True)
class Writer:
    """
    One form of tool calls.

    Args:
        special (`str`):
            The special tokens of its templates, between spaces.
        added (`str`):
            Tokens that are whole but not special.
        begins (`int`):
            How many characters make the beginning of a call: fewer are text.
        end, call_end (`str`):
            What ends a turn; a turn of calls.
        malformed (`tuple[str, ...]`):
            Turns that begin a call and hold none, with or without the end of a turn.
        malformed_if_ended (`tuple[str, ...]`):
            Turns that hold no call and end as one.
        delimiters (`tuple[str, ...]`):
            What may stand in a string although it is a delimiter elsewhere.
        has_text_behind (`bool`), has_more_calls (`bool`), has_plain_values (`bool`):
            Whether text may follow a call; whether the form writes several; whether it writes texts without quotes.
        eos (`str`):
            The tokenizer's own end token, where it is not `end`.
    """

    special: str
    added: str = "<tool_call> </tool_call> <think> </think>"
    begins: int = len("<tool_call>")
    end: str = "<|im_end|>"
    call_end: str = "<|im_end|>"
    malformed: tuple[str, ...] = ()
    malformed_if_ended: tuple[str, ...] = ()
    delimiters: tuple[str, ...] = ("</think>", "<think>", "\n<think>\n", "<tool_call>", "</tool_call>")
    has_text_behind: bool = True
    has_more_calls: bool = True
    has_plain_values: bool = False
    eos: str = ""

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def think(self, text: str) -> str:
        return f"<think>\n{text}\n</think>\n\n"

    def text(self, text: str) -> str:
        return text

    def answer(self, text: str) -> str:
        """Text that ends the turn."""
        return self.text(text)

    def opened(self, thought: str = "") -> str:
        """The end of a thought that the prompt has begun."""
        return f"{thought}\n</think>\n\n"

    def turn(self, parts: Sequence[Part]) -> str:
        """A whole turn; the last part says how it ends."""
        written = ""
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            if part[0] == "call":
                written += self.call(part[1], part[2]) + ("" if is_last else self.between())  # type: ignore[arg-type]
            elif part[0] == "think":
                written += self.think(part[1])
            elif part[0] == "text":
                written += self.answer(part[1]) if is_last else self.text(part[1])
            else:
                written += part[1]
        return written + (self.call_end if parts and parts[-1][0] == "call" else self.end)

    def between(self) -> str:
        return "\n"


class Hermes(Writer):
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n</tool_call>'


class Xml(Writer):
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        lines = [f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in arguments.items()]
        return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


class Glm(Writer):
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        lines = [
            f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n" for key, value in arguments.items()
        ]
        return f"<tool_call>{name}\n{''.join(lines)}</tool_call>"


class Llama(Writer):
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f'{{"name": {json.dumps(name)}, "parameters": {json.dumps(arguments)}}}'

    def text(self, text: str) -> str:
        return text + "\n"

    def answer(self, text: str) -> str:
        return text


class Harmony(Writer):
    """As gpt-oss writes calls: the recipient behind the channel."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        head = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        return head + json.dumps(arguments)

    def think(self, text: str) -> str:
        return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"

    def text(self, text: str) -> str:
        return f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant"

    def answer(self, text: str) -> str:
        return f"<|channel|>final<|message|>{text}"

    def between(self) -> str:
        return "<|call|><|start|>assistant"


class HarmonyOfTemplate(Harmony):
    """As gpt-oss's template writes calls: the recipient in front of the channel."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f" to=functions.{name}<|channel|>commentary json<|message|>" + json.dumps(arguments)


class Gemma(Writer):
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"<|tool_call>call:{name}{_gemma(arguments)}<tool_call|>"

    def think(self, text: str) -> str:
        return f"<|channel>thought\n{text}\n<channel|>"


class Pythonic(Writer):
    """As LFM2.5's text template writes calls: strings as they are."""

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"<|tool_call_start|>[{self.one(name, arguments)}]<|tool_call_end|>"

    def one(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={self.value(value)}' for key, value in arguments.items())})"

    def value(self, value: Any) -> str:
        if isinstance(value, str):
            return f"'{value}'"
        return json.dumps(value) if isinstance(value, dict) else str(value)


class PythonicEscaped(Pythonic):
    """As LFM2.5-VL's template writes calls: strings with escapes."""

    def value(self, value: Any) -> str:
        if isinstance(value, str):
            escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
            return f"'{escaped}'"
        return json.dumps(value) if isinstance(value, dict | list) else str(value)


class Muse(Writer):
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        lines = [
            f'<atem:parameter name="{key}">{_plain(value)}</atem:parameter>\n' for key, value in arguments.items()
        ]
        invoke = f'<atem:invoke name="{name}">\n{"".join(lines)}</atem:invoke>\n'
        return f" to={name}<|message|><atem:function_calls>\n{invoke}</atem:function_calls>"

    def think(self, text: str) -> str:
        return f" to=self<|message|>{text}<|eom|><|start|>assistant"

    def text(self, text: str) -> str:
        return f" to=user<|message|>{text}<|eom|><|start|>assistant"

    def answer(self, text: str) -> str:
        return f" to=user<|message|>{text}"

    def between(self) -> str:
        return "<|eom|><|start|>assistant"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_gemma(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_gemma, value)) + "]"
    return json.dumps(value)


_CHATML = "<|im_start|> <|im_end|> <|endoftext|>"

HERMES = Hermes(
    _CHATML,
    malformed=(
        "<tool_call>",
        '<tool_call>\n{"name": "act", "arguments": {"text": "x"}}',
        '<tool_call>\n{"name": "act", "arguments": {"text": "x"}}}\n</tool_call>',
        '<tool_call>\n{"name": "act", "arguments": {"text": "x"}\n</tool_call>',
        '<tool_call>\n{"name": "act", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": "act"}\n</tool_call>',
        '<tool_call>\n{"arguments": {"text": "x"}}\n</tool_call>',
        "<tool_call>\nact(text='x')\n</tool_call>",
        '<tool_call>\n["act", {}]\n</tool_call>',
        '<tool_call>\n{"name": "act", "arguments": {"text": "say "hi""}}\n</tool_call>',
    ),
    delimiters=(
        *Writer.delimiters,
        '<tool_call>\n{"name": "look", "arguments": {"query": "x"}}\n</tool_call>',
        '"}}\n</tool_call>',
    ),
)
XML = Xml(
    _CHATML,
    malformed=(
        "<tool_call>",
        "<tool_call>\n<function=act>\n<parameter=text>\nx\n</parameter>\n</function>\n",
        "<tool_call>\n<function=act>\n<parameter=text>\nx\n</parameter>\n</tool_call>",
        "<tool_call>\n<function=act>\n<parameter=text>\nx\n</function>\n</tool_call>",
        "<tool_call>\n<function=act>\n<parameter=text>\nx\n</parameter>\n<parameter=text>\ny\n</parameter>\n"
        "</function>\n</tool_call>",
        '<tool_call>\n{"name": "act", "arguments": {"text": "x"}}\n</tool_call>',
        "<tool_call>\n<function=act>\ntext: x\n</function>\n</tool_call>",
    ),
    delimiters=(
        *Writer.delimiters,
        "a </parameter> b",
        "</parameter></function></tool_call>",
        "x</parameter>\n<parameter=count>\n3",
        "<parameter=count>",
        "</function>",
        "<tool_call>\n<function=look>\n<parameter=query>x</parameter>\n</function>\n</tool_call>",
    ),
    has_plain_values=True,
)
GLM = Glm(
    "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>",
    "<tool_call> </tool_call> <think> </think> <arg_key> </arg_key> <arg_value> </arg_value>",
    end="<|user|>",
    call_end="<|observation|>",
    malformed=(
        "<tool_call>",
        "<tool_call>act\n<arg_key>text</arg_key>\n<arg_value>x</arg_value>\n",
        "<tool_call>act\n<arg_key>text</arg_key>\n<arg_value>x\n</tool_call>",
        "<tool_call>act\n<arg_key>text</arg_key>\n</tool_call>",
        "<tool_call>act\ntext: x\n</tool_call>",
        "<tool_call>act\n<arg_key>text</arg_key>\n<arg_value>x</arg_value>\n<arg_key>text</arg_key>\n"
        "<arg_value>y</arg_value>\n</tool_call>",
    ),
    delimiters=(*Writer.delimiters, "a </arg_value> b", "<arg_key>", "<tool_call>look\n</tool_call>"),
    has_plain_values=True,
)
LLAMA = Llama(
    "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>",
    begins=1,
    end="<|eot_id|>",
    call_end="<|eot_id|>",
    malformed=(
        '{"name": "act", "parameters": {"text": "x"',
        '{"name": "act"}',
        '{"name": "act", "parameters": "x"}',
        '{"name": "act", "parameters": {"text": "say "hi""}}',
        '{"type": "function", "name": "act", "para',
        '<|python_tag|>act.call(text="x")',
        "<|python_tag|>",
    ),
    delimiters=(
        *Writer.delimiters,
        "<|python_tag|>",
        '{"name": "look", "parameters": {"query": "x"}}',
        '"}}; {"name":',
    ),
    has_text_behind=False,
    has_more_calls=False,
)
_HARMONY: dict[str, Any] = {
    "special": "<|startoftext|> <|start|> <|end|> <|message|> <|channel|> <|constrain|> <|return|> <|call|>",
    "added": "",
    "end": "<|return|>",
    "call_end": "<|call|>",
    "malformed": (
        '<|channel|>commentary to=functions.act <|constrain|>json<|message|>{"text": "x"}<|return|>',
        '<|channel|>commentary to=functions.act <|constrain|>json<|message|>{"text": "x"<|call|>',
        '<|channel|>commentary to=functions.act <|constrain|>json<|message|>"x"<|call|>',
        "<|channel|>commentary to=functions.act <|constrain|>json",
        " to=functions.act<|channel|>commentary json<|message|>text: x<|call|>",
    ),
    "malformed_if_ended": (
        '<|channel|>commentary<|message|>{"text": "x"}<|call|>',
        "<|channel|>analysis<|message|>I call act.<|call|>",
        "<|call|>",
    ),
    "delimiters": (
        *Writer.delimiters,
        "<|end|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>x",
        '<|call|><|start|>assistant to=functions.look<|channel|>commentary json<|message|>{"query": "x"}<|call|>',
    ),
    "has_text_behind": False,
}
HARMONY = Harmony(begins=len("<|channel|>commentary to=f"), **_HARMONY)
HARMONY_OF_TEMPLATE = HarmonyOfTemplate(begins=len(" to=f"), **_HARMONY)
GEMMA = Gemma(
    '<bos> <eos> <|turn> <turn|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|> '
    "<|channel> <channel|> <|think|>",
    "",
    begins=len("<|tool_call>"),
    end="<turn|>",
    call_end="<|tool_response>",
    malformed=(
        "<|tool_call>",
        '<|tool_call>call:act{text:<|"|>x<|"|>}',
        '<|tool_call>call:act{text:<|"|>x<|"|><tool_call|>',
        "<|tool_call>call:act{text:x}<tool_call|>",
        '<|tool_call>call:act{text:<|"|>x}<tool_call|>',
        '<|tool_call>act{text:<|"|>x<|"|>}<tool_call|>',
        '<|tool_call>call:act{text:<|"|>x<|"|>,text:<|"|>y<|"|>}<tool_call|>',
    ),
    delimiters=(
        *Writer.delimiters,
        "<tool_call|>",
        'a <|"|> b',
        "}<tool_call|>",
        "<channel|>",
        "<|channel>thought\n",
    ),
)
_PYTHONIC_MALFORMED = (
    "<|tool_call_start|>",
    "<|tool_call_start|>[act(text='x')]",
    "<|tool_call_start|>[act(text='x'<|tool_call_end|>",
    "<|tool_call_start|>act(text='x')<|tool_call_end|>",
    "<|tool_call_start|>[act('x')]<|tool_call_end|>",
    "<|tool_call_start|>[act(text=x)]<|tool_call_end|>",
    "<|tool_call_start|>[act(text='x', text='y')]<|tool_call_end|>",
    "<|tool_call_start|>[act(text='x'), look(query=<|tool_call_end|>",
)
_PYTHONIC_DELIMITERS = (
    *Writer.delimiters,
    "<|tool_call_end|>",
    ")]<|tool_call_end|>",
    "<|tool_call_start|>[",
    "a, b)",
)
_PYTHONIC_SPECIAL = (
    f"<|startoftext|> {_CHATML} <|tool_call_start|> <|tool_call_end|> <|tool_list_start|> <|tool_list_end|>"
)
PYTHONIC = Pythonic(
    _PYTHONIC_SPECIAL,
    "<think> </think>",
    begins=len("<|tool_call_start|>"),
    malformed=_PYTHONIC_MALFORMED,
    delimiters=_PYTHONIC_DELIMITERS,
)
PYTHONIC_ESCAPED = PythonicEscaped(
    _PYTHONIC_SPECIAL,
    "<think> </think>",
    begins=len("<|tool_call_start|>"),
    malformed=_PYTHONIC_MALFORMED,
    delimiters=(*_PYTHONIC_DELIMITERS, "', count=3, note='", "')]<|tool_call_end|>"),
)
MUSE = Muse(
    "<|start|> <|message|> <|eot|> <|eom|> <|begin_of_text|>",
    "",
    begins=len(" to=a"),
    end="<|eot|>",
    call_end="<|eot|>",
    malformed=(
        " to=act<|message|>",
        " to=act<|message|>text: x",
        ' to=act<|message|><atem:function_calls>\n<atem:invoke name="act">\n</atem:invoke>\n',
        ' to=act<|message|><atem:function_calls>\n<atem:invoke name="act">\n<atem:parameter name="text">x\n'
        "</atem:invoke>\n</atem:function_calls>",
        " to=act<|message|><atem:function_calls>\n</atem:function_calls>",
    ),
    delimiters=(
        *Writer.delimiters,
        "a </atem:parameter> b",
        '<atem:parameter name="count">',
        "</atem:invoke>",
        "</atem:function_calls>",
        "<|eom|>",
        "<|eom|><|start|>assistant to=user<|message|>x",
    ),
    has_text_behind=False,
    has_plain_values=True,
)
_DEEPSEEK = Hermes(
    "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁call▁begin｜> "
    "<｜tool▁sep｜> <｜tool▁call▁end｜> <｜tool▁calls▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> "
    "<｜tool▁output▁begin｜> <｜tool▁output▁end｜>",
    end="<｜end▁of▁sentence｜>",
    call_end="<｜end▁of▁sentence｜>",
    malformed=HERMES.malformed,
    delimiters=HERMES.delimiters,
)
_PHI = Hermes(
    "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>",
    end="<|end|>",
    call_end="<|end|>",
    eos="<|endoftext|>",
    malformed=HERMES.malformed,
    delimiters=HERMES.delimiters,
)


def _both(*names: str) -> list[str]:
    return [name + suffix for name in names for suffix in ("", "_training")]


WRITERS: dict[str, Writer] = {
    **dict.fromkeys(_both("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"), HERMES),
    **dict.fromkeys(_both("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"), XML),
    **dict.fromkeys(_both("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"), XML),
    **dict.fromkeys(_both("glm4moe"), GLM),
    **dict.fromkeys(("llama3_1", "llama3_2"), LLAMA),
    **dict.fromkeys(_both("gptoss"), HARMONY),
    **dict.fromkeys(("gemma4", *_both("diffusion_gemma")), GEMMA),
    "lfm2_2_5": PYTHONIC,
    "lfm2_2_5_vl": PYTHONIC_ESCAPED,
    **dict.fromkeys(_both("muse_glimmer"), MUSE),
    # These show no tools; they are told in text, and calls are written as Hermes writes them.
    **dict.fromkeys(_both("deepseekv3"), _DEEPSEEK),
    **dict.fromkeys(_both("phi3", "phi3_5"), _PHI),
}
OPEN_THOUGHT = {
    *_both("qwen3_5_think", "qwen3_6", "qwen3_8", "deepseekv3"),
    *_both("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"),
}
"""Templates whose prompt begins a thought."""


@cache
def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A token a byte, and the tokens of the template."""
    file = TEMPLATES / f"{template}.jinja"
    if not file.exists():
        pytest.skip(f"the template is of a later TRL than {version('trl')}")
    writer = WRITERS[template]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    special = writer.special.split()
    tokenizer.add_special_tokens({"eos_token": writer.eos or writer.end, "bos_token": special[0]})
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.add_tokens(writer.added.split())
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


@cache
def make_chat(template: str, tools: tuple[Any, ...] = ()) -> ChatFormat:
    """The chat format of a template with these tools (functions)."""
    return ChatFormat(make_tokenizer(template), tools=tools)
