import time

import pytest

from trl_steppo.chat.formats import FORMATS

BEGINNINGS = (
    "",
    "x\n",
    "<|start|>assistant",
    "<|channel|>",
    "<|start|>assistant to=a<|channel|>commentary ",
    "<|start|>assistant to=a",
    '<|tool_call>call:a{<|"|>',
    "<|tool_call>call:a{",
    "<tool_call>\n<function=a>\n<parameter=b>\n",
    "<tool_call>a<arg_key>b</arg_key><arg_value>",
    "<|tool_call_start|>[a(b='",
    "[TOOL_CALLS]a",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a",
)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
def test_white_space_is_read_in_proportion_to_its_length(form):
    """It takes milliseconds; where two parts of a pattern share the white space, it takes seconds."""
    for beginning in BEGINNINGS:
        for space in " \n\t":
            begins_at = time.thread_time()
            form.read(beginning + 60_000 * space + "!", {})
            assert time.thread_time() - begins_at < 0.5, (beginning, space)
