"""Agents written with real SDKs, unchanged but for address and key, train on the mini wiki."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import get_json_schema

from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.chat import ChatFormat
from trl_steppo.environments.hotpotqa import HotpotQAEnvironment, hotpotqa_dataset
from trl_steppo.environments.hotpotqa.data import SYSTEM_PROMPT
from trl_steppo.rollout import load_episodes

Received = tuple[str, list[tuple[str, Any]]]  # what a client got by one call: text, and tool calls

_BUDGET = 3


class Task:
    """One row as an agent sees it: a question, tools, and in the end a score."""

    def __init__(self, row: dict[str, Any], retriever: Any, log: list[Received]) -> None:
        self.question = row["question"]
        self.environment = HotpotQAEnvironment(retriever, top_k=1)
        self.environment.reset(**row)
        self.log = log
        self.schemas = [get_json_schema(self.environment.search), get_json_schema(self.environment.answer)]

    def run(self, name: str, arguments: Any) -> str:
        try:
            return str(getattr(self.environment, name)(**arguments))
        except (AttributeError, TypeError) as error:
            return f"Error: {error}"

    @property
    def done(self) -> bool:
        return self.environment.done

    def reward(self) -> float:
        """Differs from row to row, so that there is something to learn from two episodes."""
        return self.environment.get_reward() + len(self.question) % 7

    def got(self, text: str | None, calls: list[tuple[str, Any]]) -> None:
        self.log.append((text or "", calls))


def expect_the_end(error: Exception) -> None:
    """An episode's last request is refused; nothing else may be."""
    if "episode is over" not in str(error):
        raise error


def with_openai(sdk: ModuleType, task: Task, base_url: str, api_key: str, *, stream: bool) -> None:
    """Chat completions."""
    messages: list[Any] = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": task.question}]
    with sdk.OpenAI(base_url=base_url, api_key=api_key) as client:
        while not task.done:
            try:
                if stream:
                    with client.chat.completions.stream(model="gpt", messages=messages, tools=task.schemas) as events:
                        for _ in events:
                            pass
                        message = events.get_final_completion().choices[0].message
                else:
                    completion = client.chat.completions.create(model="gpt", messages=messages, tools=task.schemas)
                    message = completion.choices[0].message
            except sdk.BadRequestError as error:
                expect_the_end(error)
                return
            calls = [(c, json.loads(c.function.arguments)) for c in message.tool_calls or ()]
            task.got(message.content, [(c.function.name, arguments) for c, arguments in calls])
            messages.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
            for c, arguments in calls:
                answer = task.run(c.function.name, arguments)
                messages.append({"role": "tool", "tool_call_id": c.id, "content": answer})
            if not calls:
                return


def with_openai_responses(sdk: ModuleType, task: Task, base_url: str, api_key: str, *, stream: bool) -> None:
    """Responses."""
    tools = [{"type": "function", "strict": False, **schema["function"]} for schema in task.schemas]
    for tool in tools:
        tool.pop("return", None)
    items: list[Any] = [{"role": "user", "content": task.question}]
    with sdk.OpenAI(base_url=base_url, api_key=api_key) as client:
        while not task.done:
            asked = {"model": "gpt", "input": items, "tools": tools, "instructions": SYSTEM_PROMPT}
            try:
                if stream:
                    with client.responses.stream(**asked) as events:
                        for _ in events:
                            pass
                        response = events.get_final_response()
                else:
                    response = client.responses.create(**asked)
            except sdk.BadRequestError as error:
                expect_the_end(error)
                return
            calls = [item for item in response.output if item.type == "function_call"]
            task.got(response.output_text, [(c.name, json.loads(c.arguments)) for c in calls])
            items += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output]
            for item in items:
                for part in item.get("content", ()) if isinstance(item.get("content"), list) else ():
                    part.pop("parsed", None)
            for c in calls:
                answer = task.run(c.name, json.loads(c.arguments))
                items.append({"type": "function_call_output", "call_id": c.call_id, "output": answer})
            if not calls:
                return


def with_anthropic(sdk: ModuleType, task: Task, base_url: str, api_key: str, *, stream: bool) -> None:
    """Messages."""
    tools = [
        {
            "name": schema["function"]["name"],
            "description": schema["function"]["description"],
            "input_schema": schema["function"]["parameters"],
        }
        for schema in task.schemas
    ]
    messages: list[Any] = [{"role": "user", "content": task.question}]
    with sdk.Anthropic(base_url=base_url.removesuffix("/v1"), api_key=api_key) as client:
        while not task.done:
            asked = {"model": "claude", "max_tokens": 30, "system": SYSTEM_PROMPT, "tools": tools}
            try:
                if stream:
                    with client.messages.stream(**asked, messages=messages) as events:
                        message = events.get_final_message()
                else:
                    message = client.messages.create(**asked, messages=messages)
            except sdk.BadRequestError as error:
                expect_the_end(error)
                return
            uses = [block for block in message.content if block.type == "tool_use"]
            text = "".join(block.text for block in message.content if block.type == "text")
            task.got(text, [(use.name, use.input) for use in uses])
            messages.append(
                {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in message.content]}
            )
            results = [
                {"type": "tool_result", "tool_use_id": use.id, "content": task.run(use.name, use.input)}
                for use in uses
            ]
            if not results:
                return
            messages.append({"role": "user", "content": results})


def with_langchain(sdk: ModuleType, task: Task, base_url: str, api_key: str) -> None:
    import openai
    from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage

    model = sdk.ChatOpenAI(model="gpt", base_url=base_url, api_key=api_key).bind_tools(task.schemas)
    messages: list[Any] = [SystemMessage(SYSTEM_PROMPT), HumanMessage(task.question)]
    while not task.done:
        try:
            reply = model.invoke(messages)
        except openai.BadRequestError as error:
            expect_the_end(error)
            return
        task.got(reply.content, [(c["name"], c["args"]) for c in reply.tool_calls])
        messages.append(reply)
        for c in reply.tool_calls:
            messages.append(ToolMessage(task.run(c["name"], c["args"]), tool_call_id=c["id"]))
        if not reply.tool_calls:
            return


def with_openai_agents(sdk: ModuleType, task: Task, base_url: str, api_key: str, *, responses: bool) -> None:
    import asyncio

    import openai

    sdk.set_tracing_disabled(True)

    class Hooks(sdk.AgentHooks):  # type: ignore[name-defined,misc]
        async def on_llm_end(self, context: Any, agent: Any, response: Any) -> None:
            calls = [item for item in response.output if item.type == "function_call"]
            texts = [p.text for item in response.output if item.type == "message" for p in item.content]
            task.got("".join(texts), [(c.name, json.loads(c.arguments)) for c in calls])

    @sdk.function_tool
    def search(query: str) -> str:
        """Search the wiki.

        Args:
            query: What to look up.
        """
        return task.run("search", {"query": query})

    @sdk.function_tool
    def answer(text: str) -> str:
        """Give the final answer.

        Args:
            text: The answer alone, as short as possible.
        """
        return task.run("answer", {"text": text})

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            kind = sdk.OpenAIResponsesModel if responses else sdk.OpenAIChatCompletionsModel
            agent = sdk.Agent(
                name="wiki",
                instructions=SYSTEM_PROMPT,
                tools=[search, answer],
                model=kind(model="gpt", openai_client=client),
                tool_use_behavior=sdk.StopAtTools(stop_at_tool_names=["answer"]),
                hooks=Hooks(),
            )
            try:
                await sdk.Runner.run(agent, task.question, max_turns=10)
            except openai.BadRequestError as error:
                expect_the_end(error)
            except sdk.exceptions.ModelBehaviorError:
                pass  # a tool that does not exist

    asyncio.run(run())


def with_smolagents(sdk: ModuleType, task: Task, base_url: str, api_key: str) -> None:
    @sdk.tool
    def search(query: str) -> str:
        """Search the wiki.

        Args:
            query: What to look up.
        """
        return task.run("search", {"query": query})

    @sdk.tool
    def answer(text: str) -> str:
        """Give the final answer.

        Args:
            text: The answer alone.
        """
        return task.run("answer", {"text": text})

    model = sdk.OpenAIModel(model_id="gpt", api_base=base_url, api_key=api_key)
    agent = sdk.ToolCallingAgent(tools=[search, answer], model=model, max_steps=10, verbosity_level=-1)
    agent.prompt_templates["system_prompt"] = SYSTEM_PROMPT
    try:
        agent.run(task.question)
    except sdk.utils.AgentError as error:
        expect_the_end(error)
    for step in agent.memory.steps:
        message = getattr(step, "model_output_message", None)
        if message is not None:
            calls = message.raw.choices[0].message.tool_calls or ()
            content = message.raw.choices[0].message.content
            task.got(content, [(c.function.name, json.loads(c.function.arguments)) for c in calls])


AGENTS: dict[str, tuple[str, Callable[..., None], dict[str, Any]]] = {
    "openai": ("openai", with_openai, {"stream": False}),
    "openai, streamed": ("openai", with_openai, {"stream": True}),
    "openai responses": ("openai", with_openai_responses, {"stream": False}),
    "openai responses, streamed": ("openai", with_openai_responses, {"stream": True}),
    "openai-agents": ("agents", with_openai_agents, {"responses": True}),
    "openai-agents, chat": ("agents", with_openai_agents, {"responses": False}),
    "smolagents": ("smolagents", with_smolagents, {}),
    "langchain-openai": ("langchain_openai", with_langchain, {}),
    "anthropic": ("anthropic", with_anthropic, {"stream": False}),
    "anthropic, streamed": ("anthropic", with_anthropic, {"stream": True}),
}


def train(name: str, directory: Path, *, updates: int, episodes: int) -> None:
    """A run with this agent; what was recorded must be what its client received."""
    module, play, settings = AGENTS[name]
    sdk = pytest.importorskip(module, reason="needs the extra `agents`")
    data = hotpotqa_dataset("mini_wiki")
    received: dict[str, list[Received]] = defaultdict(list)

    def agent(row: dict[str, Any], *, base_url: str, api_key: str) -> float:
        task = Task(row, data.retriever, received[row["id"]])
        play(sdk, task, base_url, api_key, **settings)
        return task.reward()

    tokenizer = AutoTokenizer.from_pretrained(MINI_WIKI_POLICY)
    config = StepPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=episodes,
        max_steps=updates,
        response_length=40,
        max_interaction_steps=_BUDGET,
        learning_rate=1e-4,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        num_sample_generations=0,
        log_episodes=0,
        dump_episodes_dir=str(directory / "episodes"),
    )
    trainer = StepPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(MINI_WIKI_POLICY),
        train_dataset=data.train_dataset,
        agent=agent,
    )
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any(not value.equal(before[key]) for key, value in trainer.model.state_dict().items())
    chat = ChatFormat(tokenizer)
    files = sorted((directory / "episodes").iterdir())
    assert len(files) == updates
    played = [episode for file in files for episode in load_episodes(file)]
    assert [episode.error for episode in played] == [None] * (updates * episodes)
    for episode in played:
        recorded = [read(chat, step.response_ids) for step in episode.steps]
        assert stripped(recorded) == stripped(received[trainer.rows[episode.stream_position]["id"]])


def stripped(read: list[Received]) -> list[Received]:
    """Without the white space around texts, which some clients take away."""
    return [(text.strip(), calls) for text, calls in read]


def read(chat: ChatFormat, ids: Any) -> Received:
    parsed = chat.parse(ids)
    if parsed.malformed:
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in parsed.message.get("tool_calls", ())]
        return chat.decode(ids), calls
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in parsed.message.get("tool_calls", ())]
    return parsed.message["content"], calls


@pytest.mark.parametrize("name", AGENTS)
def test_a_real_client_trains(name, tmp_path):
    train(name, tmp_path, updates=1, episodes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_a_real_client_trains_three_updates(name, tmp_path):
    train(name, tmp_path, updates=3, episodes=8)
