"""What models write, for every template of TRL that can be used with tools, and what is made of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.chat.formats.call_writers import (
    HARMONY_OF_TEMPLATE,
    OPEN_THOUGHT,
    WRITERS,
    Glm,
    Harmony,
    Hermes,
    Llama,
    Pythonic,
    PythonicEscaped,
    Writer,
    Xml,
    make_chat,
)
from trl_steppo.environments import Response, ToolPlayable

USER = {"role": "user", "content": "Do it."}
Arguments = dict[str, Any]

called: list[tuple[str, Arguments]] = []


async def act(
    text: str,
    count: int = 0,
    ratio: float = 0.0,
    sure: bool = False,
    tags: list[str] | None = None,
    options: dict | None = None,
    note: str | None = None,
) -> str:
    """
    Act.

    Args:
        text: What.
        count: How often.
        ratio: How much.
        sure: Whether.
        tags: Names.
        options: More.
        note: A note.
    """
    given = {
        "text": text,
        "count": count,
        "ratio": ratio,
        "sure": sure,
        "tags": tags,
        "options": options,
        "note": note,
    }
    called.append(("act", given))
    return "done"


async def look(query: str) -> str:
    """
    Look.

    Args:
        query: For what.
    """
    called.append(("look", {"query": query}))
    return "seen"


TOOLS = (act, look)
DEFAULTS: Arguments = {
    "count": 0,
    "ratio": 0.0,
    "sure": False,
    "tags": None,
    "options": None,
    "note": None,
}


@dataclass(frozen=True)
class Case:
    """
    A response, and what is to be made of it.

    Args:
        name (`str`):
            Says what is odd about it.
        response (`str`):
            As the model wrote it, to the last token. Of each `é` only the first half is there if `is_halved`.
        calls (`tuple`, *optional*):
            The calls that the tools must get, with exactly these values.
        malformed (`int`, *optional*):
            How many calls cannot be read.
        mistake (`str`, *optional*):
            The counter of another mistake, of one.
        answer (`str`, *optional*):
            Its `content`; `None`: not looked at.
        thought (`str`, *optional*):
            Its `reasoning_content`; `None`: not looked at.
        is_halved (`bool`, *optional*):
            Whether a character is cut in two.
    """

    name: str
    response: str
    calls: tuple[tuple[str, Arguments], ...] = ()
    malformed: int = 0
    mistake: str | None = None
    answer: str | None = None
    thought: str | None = None
    is_halved: bool = False


TEXTS = {
    "digits": "2024",
    "leading zero": "02134",
    "exponent": "1e5",
    "too large": "1e999",
    "null": "null",
    "None": "None",
    "true": "true",
    "False": "False",
    "NaN": "NaN",
    "object": '{"a": 1}',
    "list": "[1, 2]",
    "quoted": '"x"',
    "empty": "",
    "spaces": "  two  ",
    "lines": "one\ntwo\n",
    "begins with a line": "\n x",
    "quotes": 'say "hi", it\'s <b>',
    "escapes": 'back\\slash \\n \\" \\u0041',
    "braces": "}}] {{[",
    "unicode": "é ü 漢字 🎉 \u200b",
}
VALUES: dict[str, Arguments] = {
    "integer": {"count": 3},
    "negative": {"count": -7},
    "large": {"count": 12345678901234567890},
    "float": {"ratio": 1.5},
    "small": {"ratio": 1e-05},
    "integer as float": {"ratio": 2},
    "true": {"sure": True},
    "false": {"sure": False},
    "texts": {"tags": ["a", "1", "null", "it's", 'x"y']},
    "no texts": {"tags": []},
    "nested": {"options": {"k": 'v"q', "n": None, "deep": {"x": [1, 2.5, False, "</think>"]}}},
    "no options": {"options": {}},
    "nothing": {"note": None},
    "all": {"count": 1, "ratio": 0.5, "sure": True, "tags": ["x"], "options": {"a": "1"}, "note": "7"},
}


def acting(text: str = "x", **more: Any) -> tuple[str, str, Arguments]:
    return ("call", "act", {"text": text, **more})


def acted(text: str = "x", **more: Any) -> tuple[str, Arguments]:
    return ("act", {"text": text, **DEFAULTS, **more})


NO_OBJECT: dict[str, Any] = {"mistake": "wrong_arguments"}
LOOK = ("call", "look", {"query": "y"})
LOOKED = ("look", {"query": "y"})


def string_cases(w: Writer) -> Iterator[Case]:
    """What is a string to the schema stays one, to the letter."""
    for name, text in TEXTS.items():
        yield Case(f"text: {name}", w.turn([acting(text)]), (acted(text),))
        yield Case(f"query: {name}", w.turn([("call", "look", {"query": text})]), (("look", {"query": text}),))
    for text in w.delimiters:
        yield Case(f"is a delimiter: {text!r}", w.turn([acting(text)]), (acted(text),))
        within = f"a{text}b"
        yield Case(f"has a delimiter: {text!r}", w.turn([acting(within, count=2)]), (acted(within, count=2),))
    # Written as JSON, it is more than half a character: its escape is whole.
    if "\\u00e9" not in w.call("act", {"text": "é"}):
        yield Case("half a character", w.turn([acting("café")]), (acted("caf\ufffd"),), is_halved=True)


def value_cases(w: Writer) -> Iterator[Case]:
    """What is something else to the schema is that, or is refused."""
    for name, value in VALUES.items():
        yield Case(f"value: {name}", w.turn([acting(**value)]), (acted(**value),))
    wrong: dict[str, Arguments] = {
        "text for an integer": {"count": "three"},
        "float for an integer": {"count": 1.5},
        "null for an integer": {"count": None},
        "text for a boolean": {"sure": "yes"},
        "integer for a boolean": {"sure": 1},
        "text for a list": {"tags": "a, b"},
        "object for a list": {"tags": {"a": 1}},
        "list for an object": {"options": [1]},
        "an argument too many": {"more": "y"},
    }
    for name, value in wrong.items():
        yield Case(name, w.turn([acting(**value)]), mistake="wrong_arguments")
    yield Case("missing argument", w.turn([("call", "act", {"count": 3})]), mistake="wrong_arguments")
    yield Case("no arguments", w.turn([("call", "look", {})]), mistake="wrong_arguments")
    yield Case("misspelt argument", w.turn([("call", "look", {"qeury": "y"})]), mistake="wrong_arguments")
    yield Case("unknown tool", w.turn([("call", "fly", {"text": "x"})]), mistake="unknown_tools")
    yield Case("unknown tool without arguments", w.turn([("call", "fly", {})]), mistake="unknown_tools")
    yield Case("not a number", w.turn([acting(ratio=float("nan"))]), malformed=1)
    yield Case("infinite", w.turn([acting(ratio=float("inf"))]), malformed=1)
    yield Case("more than a float holds", w.turn([acting(ratio=0.25)]).replace("0.25", "1e999"), malformed=1)
    deep = w.turn([acting(options={"a": [float("-inf")]})])
    yield Case("infinite in an object", deep, **NO_OBJECT if w.has_plain_values else {"malformed": 1})


def order_cases(w: Writer) -> Iterator[Case]:
    """Texts, thoughts and calls before and behind each other."""
    act_x, acted_x = acting(), acted()
    yield Case("call", w.turn([act_x]), (acted_x,), answer="")
    yield Case("text before", w.turn([("text", "Let me see."), act_x]), (acted_x,), answer="Let me see.")
    yield Case("two texts before", w.turn([("text", "One, two."), ("text", "Three."), act_x]), (acted_x,))
    if w.has_text_behind:
        yield Case("text behind", w.turn([act_x, ("text", "Yes.")]), (acted_x,), answer="Yes.")
        yield Case("text between", w.turn([act_x, ("text", "and"), LOOK]), (acted_x, LOOKED), answer="and")
        yield Case("text all around", w.turn([("text", "A "), act_x, ("text", " B")]), (acted_x,), answer="A\nB")
    if w.has_more_calls:
        yield Case("two calls", w.turn([acting("1"), LOOK]), (acted("1"), LOOKED))
        yield Case("two calls of one tool", w.turn([acting("a"), acting("b")]), (acted("a"), acted("b")))
        half = w.call("look", {"query": "y"})[: w.begins + 3]
        yield Case("the second of two is cut", w.turn([acting("a"), ("raw", half)]), (acted("a"),), malformed=1)
    thought, half = w.call("look", {"query": "z"}), w.call("act", {"text": "x"})[: w.begins + 6]
    yield Case("thought, call", w.turn([("think", "Act?"), act_x]), (acted_x,), answer="", thought="Act?")
    yield Case("thought, answer", w.turn([("think", "Hm, <b>."), ("text", "Yes.")]), answer="Yes.", thought="Hm, <b>.")
    yield Case("thought call, answer", w.turn([("think", thought), ("text", "No.")]), answer="No.")
    yield Case("thought call, call", w.turn([("think", thought), act_x]), (acted_x,), answer="")
    yield Case("half a thought call, answer", w.turn([("think", half), ("text", "No.")]), answer="No.")
    yield Case("half a thought call, call", w.turn([("think", half), act_x]), (acted_x,), answer="")
    yield Case(
        "thought delimiters", w.turn([("think", "<tool_call> or <|tool_call>"), ("text", "Yes.")]), answer="Yes."
    )
    begun = w.think(f"I could\n{thought}\nbut")
    yield Case("a thought that never ends", begun[: begun.rindex("but")], answer="")
    yield Case("a thought that never ends, ended", begun[: begun.rindex("but")] + w.end, answer="")


def answer_cases(w: Writer) -> Iterator[Case]:
    """What is no call, and no beginning of one."""
    answers = ("In Paris.", "漢字 🎉 é", "Write </think> here.", "Write <think> here.", '{"city": "Paris", "name": 3}')
    for text in (*answers, "<b>x</b> <a", "[1, 2]", "act(text='x')", "call:act{}", "to=act"):
        yield Case(f"answer: {text}", w.turn([("text", text)]), answer=text)
    yield Case("answer, cut", w.answer("In Par"), answer="In Par")
    yield Case("answer, cut in a character", w.answer("café"), answer="caf\ufffd", is_halved=True)
    yield Case("nothing", w.end, answer="")
    yield Case("space", w.turn([("text", " \n ")]), answer="")


def broken_cases(w: Writer) -> Iterator[Case]:
    """What begins as a call and is none."""
    for index, turn in enumerate(w.malformed):
        yield Case(f"malformed {index}: {turn[:30]!r}", turn + w.end, malformed=1)
        yield Case(f"malformed {index}, cut", turn, malformed=1)
    for turn in w.malformed_if_ended:
        yield Case(f"ends as a call: {turn!r}", turn, malformed=1)
    if w.call_end != w.end:
        yield Case("answer that ends as a call", w.answer("Hm.") + w.call_end, malformed=1)
    whole = w.call("act", {"text": "one two three", "count": 3, "tags": ["a"]})
    for length in range(10, len(whole), 10):
        yield Case(f"cut after {length} characters", whole[:length], malformed=int(length >= w.begins))
    quoted = w.call("act", {"text": w.call("look", {"query": "y"}) + " and then more", "count": 1})
    yield Case("cut behind a call in a string", quoted[: quoted.index("and then") + 3], malformed=1)


def hermes_cases(w: Writer) -> Iterator[Case]:
    def said(call: str) -> str:
        return f"<tool_call>\n{call}\n</tool_call>{w.end}"

    yield Case("no lines", '<tool_call>{"name":"look","arguments":{"query":"y"}}</tool_call>' + w.end, (LOOKED,))
    yield Case("order of keys", said('{"arguments": {"query": "y"}, "name": "look"}'), (LOOKED,))
    half = said('{"name": "look", "arguments": {"query": "a\\ud83c"}}')
    yield Case("half a surrogate pair", half, (("look", {"query": "a\ufffd"}),))
    whole = said('{"name": "look", "arguments": {"query": "\\ud83c\\udf89"}}')
    yield Case("a surrogate pair", whole, (("look", {"query": "🎉"}),))
    deep = '{"a":' * 100 + "1" + "}" * 100
    yield Case("deep", said(f'{{"name": "act", "arguments": {{"text": "x", "options": {deep}}}}}'), malformed=1)
    long = f'{{"name": "act", "arguments": {{"text": "x", "count": {"9" * 5000}}}}}'
    yield Case("thousands of digits", said(long), malformed=1)
    yield Case("good behind bad", "<tool_call>{</tool_call>\n" + w.turn([LOOK]), (LOOKED,), malformed=1)


def xml_cases(w: Writer) -> Iterator[Case]:
    yield Case("True", w.turn([acting(sure=True)]).replace("\ntrue\n", "\nTrue\n"), (acted(sure=True),))
    yield Case("False", w.turn([acting(sure=False)]).replace("\nfalse\n", "\nFalse\n"), (acted(sure=False),))
    yield Case("None", w.turn([acting(note=None)]).replace("\nnull\n", "\nNone\n"), (acted(note=None),))
    inline = "<parameter=text>02134</parameter><parameter=count>3</parameter>"
    inline = f"<tool_call><function=act>{inline}</function></tool_call>{w.end}"
    yield Case("inline", inline, (acted("02134", count=3),))
    yield Case("leading zero for an integer", w.turn([acting(count="007")]), mistake="wrong_arguments")
    yield Case("list as Python writes it", w.turn([acting(tags="['a']")]), mistake="wrong_arguments")


def glm_cases(w: Writer) -> Iterator[Case]:
    yield Case("True", w.turn([acting(sure=True)]).replace(">true<", ">True<"), (acted(sure=True),))
    line = "<tool_call>look<arg_key>query</arg_key><arg_value>y</arg_value></tool_call>"
    yield Case("on one line", line + w.call_end, (LOOKED,))


def llama_cases(w: Writer) -> Iterator[Case]:
    a, look = w.call("act", {"text": "a"}), w.call("look", {"query": "y"})
    yield Case("behind the tag", "<|python_tag|>" + w.turn([acting()]), (acted(),))
    yield Case("with a type", '{"type": "function", "name": "look", "parameters": {"query": "y"}}' + w.end, (LOOKED,))
    yield Case("under another name", '{"name": "look", "arguments": {"query": "y"}}' + w.end, (LOOKED,))
    yield Case("two with a semicolon", f"{a}; {look}{w.end}", (acted("a"), LOOKED))
    yield Case("two on two lines", f"{a}\n{look}{w.end}", (acted("a"), LOOKED))
    yield Case("one and half a one", a + '\n{"name": "look", "param', (acted("a"),), malformed=1)
    for text in ('{"name": "Paris", "country": "France"}', f"You write {a} then."):
        yield Case(f"answer: {text}", text + w.end, answer=text)


def harmony_cases(w: Writer) -> Iterator[Case]:
    t = HARMONY_OF_TEMPLATE
    yield Case("recipient in front", t.turn([acting()]), (acted(),))
    yield Case("recipient in front, thought", t.turn([("think", "Hm."), acting()]), (acted(),), thought="Hm.")
    front = ' to=functions.look<|channel|>commentary<|constrain|>json<|message|>{"query": "y"}<|call|>'
    yield Case("recipient in front, constraint", front, (LOOKED,))
    yield Case("no space", w.turn([acting()]).replace(" <|constrain|>", "<|constrain|>"), (acted(),))
    yield Case("no constraint", w.turn([acting()]).replace("<|constrain|>json", ""), (acted(),))
    yield Case("Python", "<|channel|>analysis to=python code<|message|>print(1)<|call|>", malformed=1)
    browser = '<|channel|>analysis to=browser.search code<|message|>{"query": "x"}<|call|>'
    yield Case("a tool that is not there", browser, mistake="unknown_tools")
    yield Case("no header", "Hello.<|return|>", answer="Hello.")
    half = '<|channel|>commentary to=functions.act <|constrain|>json<|message|>{"text<|end|><|start|>assistant'
    yield Case("half a call, answer", half + w.turn([("text", "Well.")]), malformed=1)
    whole = t.call("act", {"text": "x", "count": 1})
    for length in range(6, len(whole), 6):
        yield Case(f"recipient in front, cut after {length} characters", whole[:length], malformed=1)


def pythonic_cases(w: Pythonic) -> Iterator[Case]:
    two = f"{w.one('act', {'text': 'a'})}, {w.one('look', {'query': 'y'})}"
    yield Case("two in one list", f"<|tool_call_start|>[{two}]<|tool_call_end|>{w.end}", (acted("a"), LOOKED))
    words = "<|tool_call_start|>[act(text='x', sure=true, note=null)]<|tool_call_end|>" + w.end
    yield Case("words of JSON", words, (acted(sure=True),))
    double = '<|tool_call_start|>[look(query="it\'s")]<|tool_call_end|>' + w.end
    yield Case("double quotes", double, (("look", {"query": "it's"}),))


def cases_of(w: Writer) -> list[Case]:
    """All responses of one form."""
    own = {
        Hermes: hermes_cases,
        Xml: xml_cases,
        Glm: glm_cases,
        Llama: llama_cases,
        Harmony: harmony_cases,
        Pythonic: pythonic_cases,
        PythonicEscaped: pythonic_cases,
    }
    groups = (string_cases, value_cases, order_cases, answer_cases, broken_cases, own.get(type(w), lambda _: ()))
    return [case for group in groups for case in group(w)]  # type: ignore[operator]


@pytest.mark.parametrize("template", WRITERS)
def test_responses_are_read_as_the_table_says(template: str) -> None:
    async def judge_all() -> dict[str, str]:
        problems = {case.name: await judge(template, case) for case in cases_of(WRITERS[template])}
        return {name: problem for name, problem in problems.items() if problem}

    assert asyncio.run(judge_all()) == {}


async def judge(template: str, case: Case) -> str | None:
    """Let the rollout's own loop answer the response; what is wrong with it, if anything is."""
    chat, response = make_chat(template, TOOLS), case.response
    if template in OPEN_THOUGHT:  # the prompt has begun a thought; it is the response's own, or ends at once
        begins = response.startswith("<think>\n")
        response = response.removeprefix("<think>\n") if begins else WRITERS[template].opened() + response
    ids = chat.encode_text(response, add_special_tokens=False)
    if case.is_halved:
        ids.remove(chat.encode_text("é", add_special_tokens=False)[1])
    parsed = chat.parse(ids, chat.render([USER]))
    called.clear()
    outcome = await ToolPlayable(tools=TOOLS).step(Response(chat.decode(ids), parsed.message, parsed.malformed))
    mistakes = {name for name, count in outcome.metrics.items() if count and name != "tool_calls"}
    expected = {case.mistake} if case.mistake else set()
    expected |= {"malformed_tool_calls"} if case.malformed else set()
    message = parsed.message
    holds = (
        repr(called) == repr(list(case.calls))  # `repr` tells 1 from 1.0 and from True
        and len(parsed.malformed) == case.malformed
        and mistakes == expected
        and outcome.done == (not case.calls and not mistakes)
        and case.answer in (None, message["content"])
        and case.thought in (None, message.get("reasoning_content"))
        # Reward functions see the raw text of a malformed call.
        and (not case.malformed or bool(message["content"]))
    )
    return None if holds else f"{response!r} is read as {parsed}; called: {called}, mistakes: {mistakes}"


def test_the_table_is_as_large_as_it_says() -> None:
    sizes = {template: len({case.name for case in cases_of(writer)}) for template, writer in WRITERS.items()}
    assert sum(sizes.values()) >= 5_000
    assert min(sizes.values()) >= 100
