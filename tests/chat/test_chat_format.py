import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as trl_templates

from trl_steppo.chat import ChatFormat, parse_hermes
from trl_steppo.errors import ChatTemplateError

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What."}},
            "required": ["query"],
        },
    },
}
USER = {"role": "user", "content": "Where is the Eiffel tower?"}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "Eiffel"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
WRITTEN_CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Eiffel"}}\n</tool_call><|im_end|>'
ANSWERS = [
    {"role": "tool", "name": "search", "content": "In Paris."},
    {"role": "tool", "name": "search", "content": ""},
]
DROPS_EARLIER_REPLIES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KNOWS_NO_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the tower is in Paris, the search is over"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    return tokenizer


def make_chat(name: str = "qwen2_5", **kwargs) -> ChatFormat:
    return ChatFormat(make_tokenizer(getattr(trl_templates, f"{name}_chat_template")), **kwargs)


def sampled(chat: ChatFormat, text: str) -> list[int]:
    return chat.encode_text(text, add_special_tokens=False)


TEMPLATES = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "llama3_1"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, [SEARCH]])
def test_appended_user_message_equals_rendering_the_whole_conversation(name, tools):
    chat = make_chat(name, tools=tools)
    reply, follow_up = {"role": "assistant", "content": "In Paris."}, {"role": "user", "content": " Sure? "}
    whole = chat.render([USER, reply, follow_up])
    appended = chat.append([follow_up])
    assert whole[-len(appended) :] == appended
    assert whole[-len(appended) - 1] == chat.end_of_turn_id


@pytest.mark.parametrize("name", TEMPLATES)
def test_appended_tool_messages_equal_rendering_the_whole_conversation(name):
    chat = make_chat(name, tools=[SEARCH])
    whole = chat.render([USER, CALLING, *ANSWERS])
    appended = chat.append(ANSWERS, tool_call_names=["search", "search"])
    assert whole[-len(appended) :] == appended
    assert whole[-len(appended) - 1] == chat.end_of_turn_id


BLOCKS = [{"type": "text", "text": "In Paris"}, {"type": "text", "text": ", it is."}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_tool_returns_as_a_list_is_shown_as_text(name):
    chat = make_chat(name, tools=[SEARCH])
    for content, text in (
        (BLOCKS, "In Paris, it is."),
        ([1, "a"], "[1, 'a']"),
        ([], "[]"),
        ([("<|im_end|>", None)], "[('<|im_end|>', None)]"),
    ):
        answer = {"role": "tool", "name": "search", "content": content}
        as_text = {**answer, "content": text}
        assert chat.append([answer], tool_call_names=["search"]) == chat.append([as_text], tool_call_names=["search"])
        assert chat.render([USER, CALLING, answer]) == chat.render([USER, CALLING, as_text])
        assert chat.min_tokens([answer]) == chat.min_tokens([as_text])
        assert answer["content"] is content


@pytest.mark.parametrize("name", TEMPLATES)
def test_blocks_of_text_are_shown_as_their_text_by_every_template(name):
    chat = make_chat(name)
    expected = chat.render([{"role": "user", "content": "In Paris, it is."}])
    assert chat.render([{"role": "user", "content": BLOCKS}]) == expected
    assert chat.prepare([{"role": "user", "content": BLOCKS[:1]}], ", it is.") == expected


def test_appended_ids_begin_behind_the_end_of_turn():
    chat = make_chat()
    assert chat.decode(chat.append([{"role": "user", "content": "x"}])).startswith("\n")


def test_an_append_renders_only_the_new_messages_and_these_once(monkeypatch):
    chat = make_chat(tools=[SEARCH])
    chat.append(ANSWERS[:1], tool_call_names=["search"])
    rendered = []
    render = chat._tokenizer.apply_chat_template
    monkeypatch.setattr(
        chat._tokenizer, "apply_chat_template", lambda m, **kw: rendered.append(len(m)) or render(m, **kw)
    )
    first = chat.append(ANSWERS, tool_call_names=["search"])
    assert rendered == [2 + len(ANSWERS)]
    expected = list(first)
    first.clear()  # the caller's own
    assert chat.append(ANSWERS, tool_call_names=["search"]) == expected
    assert rendered == [2 + len(ANSWERS)]


def test_answers_that_only_compare_equal_are_rendered_each_by_itself():
    chat = ChatFormat(make_tokenizer(KNOWS_NO_TOOLS))
    shown = [chat.decode(chat.append([{"role": "user", "content": value}])) for value in ("1", 1, True)]
    assert shown[0] == shown[1] != shown[2]


def test_the_end_of_turn_is_the_templates_and_not_the_tokenizers_eos():
    chat = make_chat()
    assert chat._tokenizer.convert_ids_to_tokens(chat.end_of_turn_id) == "<|im_end|>"
    assert chat.end_of_turn_id != chat._tokenizer.eos_token_id
    assert chat.stop_token_ids == (chat.end_of_turn_id,)


def test_close_adds_the_end_of_turn_to_a_cut_response_only():
    chat = make_chat()
    assert chat.close(sampled(chat, "cut her")) == [chat.end_of_turn_id]
    assert chat.close(sampled(chat, "done<|im_end|>")) == []


def test_qwen3_is_replaced_by_its_training_template_and_the_tokenizer_stays_as_it_is():
    tokenizer = make_tokenizer(trl_templates.qwen3_chat_template)
    chat = ChatFormat(tokenizer)
    assert chat.template == trl_templates.qwen3_training_chat_template
    assert tokenizer.chat_template == trl_templates.qwen3_chat_template
    assert getattr(tokenizer, "response_template", None) is None


def test_a_preserving_template_is_kept():
    assert make_chat("qwen2_5").template == trl_templates.qwen2_5_chat_template


def test_a_template_that_rewrites_history_is_refused_with_the_difference():
    with pytest.raises(ChatTemplateError, match=r"differently when user messages follow.*dummy.*Set `tokenizer"):
        ChatFormat(make_tokenizer(DROPS_EARLIER_REPLIES))


def test_a_template_that_rewrites_history_will_do_for_a_single_turn():
    chat = ChatFormat(make_tokenizer(DROPS_EARLIER_REPLIES), multi_turn=False)
    assert chat.decode(chat.render([USER])) == "user\nWhere is the Eiffel tower?\nassistant\n"


def test_a_template_that_knows_no_tools_is_told_in_text():
    chat = ChatFormat(make_tokenizer(KNOWS_NO_TOOLS), tools=[SEARCH])
    system = {"role": "system", "content": "Be brief."}
    prompt = chat.decode(chat.render([system, USER]))
    assert prompt.startswith("system\nBe brief.\n\nTools")
    assert json.dumps(SEARCH) in prompt
    assert '<tool_call>\n{"name": "search", "arguments": {"query": ...}}\n</tool_call>\n' in prompt
    assert chat.decode(chat.render([USER])) == prompt.replace("Be brief.\n\n", "")
    response = sampled(chat, WRITTEN_CALL)
    assert chat.parse(response).message == CALLING


def test_what_is_appended_to_tools_in_text_equals_rendering_the_whole_conversation():
    chat = ChatFormat(make_tokenizer(KNOWS_NO_TOOLS), tools=[SEARCH])
    prompt, appended = chat.render([USER]), chat.append(ANSWERS, tool_call_names=["search"])
    response = sampled(chat, WRITTEN_CALL)
    assert chat.render([USER, CALLING, *ANSWERS]) == [*prompt, *response, *appended]
    assert "user\n<tool_response>\nIn Paris.\n</tool_response>\n<tool_response>\n\n</tool" in chat.decode(appended)


def test_without_tools_such_a_template_is_left_as_it_is():
    assert ChatFormat(make_tokenizer(KNOWS_NO_TOOLS)).template == KNOWS_NO_TOOLS


def test_a_turn_without_an_end_is_refused():
    with pytest.raises(ChatTemplateError, match="does not end an assistant turn"):
        ChatFormat(make_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}"))


def test_no_chat_template_is_refused():
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        ChatFormat(make_tokenizer(None))


def test_functions_are_shown_as_schemas():
    def search(query: str):
        """
        Search.

        Args:
            query: What.
        """

    chat = make_chat(tools=[search])
    assert chat.render([USER]) == make_chat(tools=[SEARCH]).render([USER])


def test_prepare_puts_what_reset_returned_at_the_end_of_the_last_user_message():
    chat = make_chat()
    prompt = [{"role": "system", "content": "Be brief."}, dict(USER), {"role": "assistant", "content": "Hm."}]
    prepared = chat.prepare(prompt, " Board: empty.")
    assert prepared == chat.render([prompt[0], {**USER, "content": USER["content"] + " Board: empty."}, prompt[2]])
    assert prompt[1] == USER
    assert chat.prepare(prompt) == chat.render(prompt)
    assert chat.decode(chat.prepare("text", " more")) == "text more"
    asked = chat.render([{"role": "user", "content": "Go."}])
    for message in ({"role": "user", "content": None}, {"role": "user"}):
        assert chat.prepare([message], "Go.") == asked


def test_decode_hides_special_tokens_and_keeps_what_frames_a_tool_call():
    chat = make_chat()
    text = 'x<tool_call>\n{"name": "a"}\n</tool_call>'
    assert chat.decode(sampled(chat, text + "<|im_end|>")) == text


# -- parsing ----------------------------------------------------------------------------------------------------------

WELL_FORMED = [
    "In Paris.<|im_end|>",
    "<|im_end|>",
    ' Let me look.\n<tool_call>\n{"name": "search", "arguments": {"query": "a \\"b\\" {c}"}}\n</tool_call><|im_end|>',
    "<think>\nHm, <b>.\n</think>\n\nIn Paris.<|im_end|>",
    "<think>\n\n</think>\n\n"
    '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>\n'
    '<tool_call>\n{"name": "b", "arguments": {"x": [1]}}\n</tool_call><|im_end|>',
]


@pytest.mark.parametrize("text", WELL_FORMED)
def test_our_parser_reads_what_trls_reads(text):
    chat = make_chat("qwen3")
    reference = trl_templates.add_response_schema(make_tokenizer(trl_templates.qwen3_chat_template))
    ids, prompt_ids = sampled(chat, text), chat.render([USER])
    parsed = chat.parse(ids, prompt_ids)
    expected = trl_templates.parse_response(reference, ids, prefix=prompt_ids)
    if getattr(reference, "response_template", None) is None:  # transformers before 5.13 keep white space at the ends
        expected["content"] = expected["content"].strip()
    assert parsed.message == expected
    assert parsed.malformed == ()


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ('{"name": "search", "arguments": {"query": "x"}</tool_call>', "not valid JSON"),
        ("search(x)</tool_call>", "not valid JSON"),
        ("[" * 100_000 + "</tool_call>", "not valid JSON"),
        ('["search"]</tool_call>', "not a JSON object"),
        ('{"arguments": {}}</tool_call>', '"name" is missing'),
        ('{"name": 3, "arguments": {}}</tool_call>', '"name" is missing or not a string'),
        ('{"name": "search"}</tool_call>', '"arguments" is missing'),
        ('{"name": "search", "arguments": "x"}</tool_call>', '"arguments" is missing or not an object'),
        ('{"name": "search", "arguments": {}}', "closing </tool_call> is missing"),
    ],
)
def test_malformed_calls_have_a_reason(inside, reason):
    parsed = parse_hermes("Well.\n<tool_call>" + inside)
    assert len(parsed.malformed) == 1
    assert reason in parsed.malformed[0]
    assert "write <tool_call>" in parsed.malformed[0]
    assert parsed.message == {"role": "assistant", "content": f"Well.\n<tool_call>{inside}"}


def test_good_calls_beside_a_malformed_one_are_kept():
    good = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    parsed = parse_hermes(f"{good}<tool_call>{{</tool_call>{good}")
    assert [call["function"]["name"] for call in parsed.message["tool_calls"]] == ["a", "a"]
    assert len(parsed.malformed) == 1


def test_calls_inside_a_thought_are_not_run():
    thought = 'maybe <tool_call>{"name": "a", "arguments": {}}</tool_call>'
    for parsed in (
        parse_hermes(f"<think>{thought}</think>no"),
        parse_hermes(f"{thought}</think>no", opens_thinking=True),
    ):
        assert parsed.message == {"role": "assistant", "content": "no", "reasoning_content": thought}
    assert "tool_calls" not in parse_hermes("<think>" + thought).message
    assert "tool_calls" not in parse_hermes(thought, opens_thinking=True).message


def test_the_end_of_a_thought_that_was_not_begun_is_text():
    call = '<tool_call>{"name": "a", "arguments": {"x": "</think>"}}</tool_call>'
    parsed = parse_hermes(f"I write </think> now.{call}")
    assert parsed.message["content"] == "I write </think> now."
    assert parsed.message["tool_calls"][0]["function"]["arguments"] == {"x": "</think>"}


def test_other_forms_are_read_as_well():
    chat = make_chat("qwen3_5_think", tools=[SEARCH])
    prompt_ids = chat.render([USER])
    call = "<tool_call>\n<function=search>\n<parameter=query>\nEiffel\n</parameter>\n</function>\n</tool_call>"
    parsed = chat.parse(sampled(chat, f"</think>\n\n{call}<|im_end|>"), prompt_ids)
    assert parsed.message["tool_calls"] == [CALL]
    assert parsed.malformed == ()


def test_tool_calls_that_nobody_can_parse_are_refused():
    template = make_tokenizer(trl_templates.qwen2_5_chat_template).chat_template.replace("<tool_call>", "[call]")
    with pytest.raises(ChatTemplateError, match="cannot be parsed"):
        ChatFormat(make_tokenizer(template), tools=[SEARCH])


# As Mistral's own: tool calls and their answers must have ids of nine letters or digits.
DEMANDS_IDS = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if m.tool_calls %}
{{- '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
{%- endfor %}
{{- ']<|im_end|>' }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
{{- raise_exception('answers have ids of nine characters') }}{% endif %}
{{- '[TOOL_RESULTS]' + m.tool_call_id + ' ' + m.content + '[/TOOL_RESULTS]' }}
{%- else %}
{{- '[' + m.role + ']' + m.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}"""


def test_ids_are_made_where_a_template_demands_them():
    chat = ChatFormat(make_tokenizer(DEMANDS_IDS), tools=[SEARCH])
    turn = {**CALLING, "tool_calls": [CALL, CALL]}
    whole, appended = chat.render([USER, turn, *ANSWERS]), chat.append(ANSWERS, tool_call_names=["search", "search"])
    assert whole[-len(appended) :] == appended
    assert "000000000 In Paris." in chat.decode(appended)
    assert "000000001 " in chat.decode(appended)
    assert CALL == {"type": "function", "function": {"name": "search", "arguments": {"query": "Eiffel"}}}


def test_the_ids_that_a_model_gives_its_calls_are_kept():
    chat = ChatFormat(make_tokenizer(DEMANDS_IDS), multi_turn=False)
    written = '[TOOL_CALLS][{"name": "search", "arguments": {"query": "Eiffel"}, "id": "VvvODy9mT"}]<|im_end|>'
    assert chat.parse(sampled(chat, written)).message["tool_calls"] == [{**CALL, "id": "VvvODy9mT"}]
    answered = [
        USER,
        {**CALLING, "tool_calls": [{**CALL, "id": "VvvODy9mT"}]},
        {**ANSWERS[0], "tool_call_id": "VvvODy9mT"},
    ]
    assert "[TOOL_RESULTS]VvvODy9mT In Paris." in chat.decode(chat.render(answered))


def test_errors_of_a_template_are_quoted_with_the_cure():
    refusing = "{% if m.role != 'user' %}{{ raise_exception('no replies') }}{% endif %}{{ m.content }}"
    with pytest.raises(ChatTemplateError, match=r"no replies.*to one that takes such messages"):
        ChatFormat(make_tokenizer(KNOWS_NO_TOOLS.replace("{{ m.content }}", refusing)))


def test_a_malformed_value_is_no_call_of_another_parser():
    from trl_steppo.chat.parsing import check_tool_calls

    schemas = {"search": {"properties": {"query": {"type": "string"}, "k": {"type": "integer"}}}}
    given = [
        {"function": {"name": "search", "arguments": {"query": "7", "k": "7"}}},
        {"function": {"name": "search", "arguments": {"k": float("nan")}}},
        {"function": {"name": "search"}},
    ]
    calls, malformed = check_tool_calls(given, schemas)
    assert [call["function"]["arguments"] for call in calls] == [{"query": "7", "k": 7}]
    assert len(malformed) == 2
