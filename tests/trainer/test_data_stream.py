import json
from importlib.metadata import version

from datasets import Dataset

from tests.trainer.tiny import TOKENIZER
from trl_steppo.chat import ChatFormat
from trl_steppo.trainer.data_stream import RowStream, row_of


def call(**arguments):
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


def schema(name: str, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


MESSAGES = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "", "tool_calls": [call(where="here")]},
    {"role": "tool", "name": "look", "content": "nothing"},
    {"role": "assistant", "content": "", "tool_calls": [call(n=3, deep={"a": [1]})]},
    {"role": "tool", "name": "look", "content": "nothing"},
]
TOOLS = [schema("look", where={"type": "string"}), schema("count", n={"type": "integer"})]


def rows():
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call(other="y")]}]
    return [
        {
            "prompt": MESSAGES,
            "tools": TOOLS,
            "history": {"messages": MESSAGES},
            "facts": {"a": None, "b": 1},
            "note": None,
        },
        {
            "prompt": other,
            "tools": TOOLS[:1],
            "history": {"messages": other},
            "facts": {"a": 2, "b": None},
            "note": "n",
        },
    ]


def test_what_arrow_filled_in_is_not_shown():
    stored = Dataset.from_list(rows())
    assert '"n": null' in json.dumps(stored[0]["prompt"])  # or there is nothing to take out
    for number, row in enumerate(rows()):
        read = row_of(stored, number)
        assert (read["prompt"], read["tools"], read["history"]) == (row["prompt"], row["tools"], row["history"])
        assert (read["facts"], read["note"]) == (row["facts"], row["note"])  # nobody shows them
    chat = ChatFormat(TOKENIZER)
    shown = chat.render(RowStream(stored, seed=0).example["prompt"])
    keeps_order = int(version("datasets").split(".")[0]) >= 5  # of the fields of arguments
    in_order = list if keeps_order else sorted
    assert in_order(shown) == in_order(chat.render(MESSAGES))
    assert "null" not in TOKENIZER.decode(shown)


def test_nulls_that_somebody_wrote_stay():
    prompt = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call(n=None)]}]
    assert row_of([{"prompt": prompt}], 0)["prompt"] == prompt
    stored = Dataset.from_list([{"prompt": [{**prompt[1], "tool_calls": [call(choices=[1, None])]}]}])
    assert row_of(stored, 0)["prompt"] == [
        {"role": "assistant", "content": None, "tool_calls": [call(choices=[1, None])]}
    ]


def test_arguments_as_a_json_string_are_shown_as_the_object_that_they_are():
    def messages(arguments):
        asked = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        return [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [asked]}, MESSAGES[2]]

    chat, arguments = ChatFormat(TOKENIZER), {"where": "x", "n": None}
    row = row_of(Dataset.from_list([{"prompt": messages(json.dumps(arguments))}]), 0)
    assert chat.render(row["prompt"]) == chat.render(messages(arguments))
    assert '{"where": "x", "n": null}' in TOKENIZER.decode(chat.render(row["prompt"]))
    for odd in ("[1]", "not JSON", ""):
        assert json.dumps(odd) in TOKENIZER.decode(chat.render(messages(odd)))
