"""
Greedy exact match, F1, steps and tool errors of a model on sets of HotpotQA rows.

    python examples/evaluate_hotpotqa.py --model_name_or_path runs/mini_wiki --datasets mini_wiki --output_dir runs/e

It evaluates a base model, a trained one, or a model behind an OpenAI-compatible server (this needs
`pip install -e ".[openai]"`; the key is read from OPENAI_API_KEY):

    python examples/evaluate_hotpotqa.py --base_url URL --model_name_or_path NAME --datasets ROWS.jsonl --output_dir D

Every question's scores are a line of `D/ROWS.jsonl`, written as soon as its batch is played: an interrupted evaluation
continues where it stopped. The table is also written to `D/scores.json`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steppo import StepPOParser
from trl_steppo.assets import locate_model
from trl_steppo.chat import ChatFormat, parse_hermes
from trl_steppo.environments import make_playable
from trl_steppo.environments.base import MISTAKES, Playable, Response
from trl_steppo.environments.hotpotqa import EnvironmentArguments, HotpotQAData, hotpotqa_dataset
from trl_steppo.episodes import EpisodeSpec, as_messages
from trl_steppo.extras import install_command
from trl_steppo.inference.base import SamplingParams
from trl_steppo.inference.local import LocalSampler
from trl_steppo.models import end_token_ids
from trl_steppo.rollout import EnvironmentPlayer, EpisodeLimits, EpisodeRequest, Stage, play_episodes
from trl_steppo.types import JsonObject, Message, Row, TextOrMessages

SCORES = ("exact_match", "f1", "answered", "steps", "tool_errors")
SETTINGS_WITHOUT_EFFECT = ("output_dir", "datasets", "max_questions", "batch_size")  # on any score


@dataclass(kw_only=True)
class Arguments(EnvironmentArguments):
    """What to evaluate on what."""

    model_name_or_path: str = field(
        metadata={"help": "`mini_wiki` (built in), a directory, a name on the hub, or the server's name for it."}
    )
    datasets: list[str] = field(metadata={"help": "`mini_wiki`, files of rows, prepared directories."})
    output_dir: str = field(metadata={"help": "Where the scores go."})
    base_url: str | None = field(default=None, metadata={"help": "An OpenAI-compatible server. None: in-process."})
    dtype: str = field(default="float32", metadata={"help": "The weights' type: float32, bfloat16, or auto."})
    allow_uncached_sampling: bool = field(
        default=False,
        metadata={"help": "Sample a model that no cache can be used for all the same, many times slower, in-process."},
    )
    max_questions: int | None = field(default=None, metadata={"help": "Only the first ones of each data set."})
    batch_size: int = field(default=32, metadata={"help": "Questions played at a time."})
    max_interaction_steps: int = field(default=5, metadata={"help": "Maximum number of steps of an episode."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens of a state, in-process."}
    )
    response_length: int = field(default=1024, metadata={"help": "Maximum number of tokens of a response."})
    max_tool_calls: int | None = field(
        default=None, metadata={"help": "Maximum number of tool calls of a response that are run."}
    )
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "Extra arguments of the chat template, as JSON."}
    )


Scores: TypeAlias = JsonObject


def read_template_kwargs(args: Arguments) -> JsonObject:
    """The extra arguments of the chat template."""
    text = args.chat_template_kwargs or "{}"
    try:
        kwargs = json.loads(text)
    except ValueError as error:
        raise SystemExit(f"--chat_template_kwargs is {text!r}, which is not JSON: {error}") from error
    if not isinstance(kwargs, dict):
        raise SystemExit(f"--chat_template_kwargs is {text!r}; it has to be a JSON object")
    return kwargs


# -- a model in this process ------------------------------------------------------------------------------------------


class LocalModel:
    """Plays episodes in this process, as the trainer's evaluation does."""

    def __init__(self, args: Arguments) -> None:
        name = locate_model(args.model_name_or_path)
        dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        self.args = args
        self.template_kwargs = read_template_kwargs(args)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.end_token_ids = end_token_ids(model.generation_config)
        self.sampler = LocalSampler(
            model.to("cuda") if torch.cuda.is_available() else model, allow_uncached=args.allow_uncached_sampling
        )

    def play(self, rows: Sequence[Row], make: Callable[[], Playable]) -> list[Scores]:
        """The scores of every row."""
        args = self.args
        chat = ChatFormat(
            self.tokenizer,
            tools=make().tools,
            chat_template_kwargs=self.template_kwargs,
            end_token_ids=self.end_token_ids,
        )
        spec = EpisodeSpec(
            EpisodeLimits(args.max_interaction_steps, args.max_prompt_length),
            SamplingParams(max_new_tokens=args.response_length, temperature=0.0),
        )
        requests = [EpisodeRequest(row, index) for index, row in enumerate(rows)]
        with closing(Stage(lambda row: make(), reuses=False)) as stage:
            episodes = play_episodes(requests, EnvironmentPlayer(stage, self.sampler, spec, chat))
        return [
            scores(row, episode.metrics, len(episode.steps), episode.error)
            for row, episode in zip(rows, episodes, strict=True)
        ]


# -- a model behind a server ------------------------------------------------------------------------------------------


class ServedModel:
    """Plays the same environment with a server's chat completions."""

    def __init__(self, args: Arguments) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise SystemExit(f"--base_url needs the client: {install_command('openai')}") from error
        self.args = args
        kwargs = read_template_kwargs(args)
        self.extra_body = (
            {"chat_template_kwargs": kwargs} if kwargs else None
        )  # left out if empty: not every server knows the name
        self.client_class = AsyncOpenAI

    def play(self, rows: Sequence[Row], make: Callable[[], Playable]) -> list[Scores]:
        """The scores of every row; all are played at once."""
        return asyncio.run(self._play_all(rows, make))

    async def _play_all(self, rows: Sequence[Row], make: Callable[[], Playable]) -> list[Scores]:
        key = os.environ.get("OPENAI_API_KEY", "none")  # a local server may need none
        async with self.client_class(base_url=self.args.base_url, api_key=key) as client:
            return await asyncio.gather(*(self._play(client, row, make()) for row in rows))

    async def _play(self, client: Any, row: Row, env: Playable) -> Scores:
        counts: Counter[str] = Counter()
        steps, done = 0, False
        try:
            messages = await self._first_messages(row, env)
            while not done and steps < self.args.max_interaction_steps:
                response, said, call_ids = await self._ask(client, messages, env)
                outcome = await env.step(response)
                steps, done = steps + 1, outcome.done
                counts.update(outcome.metrics)
                rewritten = None if done else await env.state_prompt(outcome.observation)
                answers = answer_messages(outcome.observation, call_ids)
                messages = [*messages, said, *answers] if rewritten is None else as_messages(rewritten)
            await env.get_reward()
            return scores(row, {**counts, **env.metrics()}, steps, None)
        except Exception as error:  # of the server: the question is asked again next time
            return scores(row, {}, steps, f"{type(error).__name__}: {error}")
        finally:
            await env.close()

    async def _first_messages(self, row: Row, env: Playable) -> list[Message]:
        extra = await env.reset(row)
        messages = as_messages(await env.state_prompt("") or row["prompt"])
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + (extra or "")}]

    async def _ask(self, client: Any, messages: list[Message], env: Playable) -> tuple[Response, Message, list[str]]:
        """The response, the message to keep of it, and the ids of its calls: the well-formed ones first."""
        completion = await client.chat.completions.create(
            model=self.args.model_name_or_path,
            messages=messages,
            tools=list(env.tools),
            temperature=0.0,
            max_tokens=self.args.response_length,
            extra_body=self.extra_body,
        )
        message = completion.choices[0].message
        text = message.content or ""
        if not message.tool_calls:  # the server may have left them in the text
            parsed = parse_hermes(text)
            return Response(text, parsed.message, parsed.malformed), {"role": "assistant", "content": text}, []
        return read_calls(text, [call.model_dump() for call in message.tool_calls])


def read_calls(text: str, tool_calls: Sequence[JsonObject]) -> tuple[Response, Message, list[str]]:
    """A response whose calls the server has parsed, except for their arguments, which are JSON text."""
    calls: list[Message] = []
    well_formed: list[str] = []
    others: list[str] = []
    malformed: list[str] = []
    for call in tool_calls:
        name, written = call["function"]["name"], call["function"]["arguments"]
        try:
            arguments = json.loads(written)
        except ValueError as error:
            arguments = error
        if isinstance(arguments, dict):
            calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
            well_formed.append(call["id"])
        else:
            malformed.append(f"the arguments of {name} are not a JSON object: {written:.80}")
            others.append(call["id"])
    message: Message = {"role": "assistant", "content": text, "tool_calls": calls}
    said = {"role": "assistant", "content": text, "tool_calls": list(tool_calls)}
    return Response(text, message, tuple(malformed)), said, [*well_formed, *others]


def answer_messages(observation: TextOrMessages, call_ids: Sequence[str]) -> list[Message]:
    """The tools' answers, each with the id of its call; without ids as one user message."""
    messages = as_messages(observation)
    if not call_ids:
        return [{"role": "user", "content": "\n".join(message["content"] for message in messages)}]
    return [
        {"role": "tool", "tool_call_id": call_id, "content": message["content"]}
        for call_id, message in zip(call_ids, messages, strict=True)
    ]


# -- scores, kept question by question --------------------------------------------------------------------------------


def scores(row: Row, metrics: Mapping[str, float], steps: int, error: str | None) -> Scores:
    """The scores of one question."""
    if error is not None:
        return {"id": row["id"], "error": error}
    errors = sum(metrics.get(name, 0.0) for name in MISTAKES)
    right = {name: metrics[name] for name in ("exact_match", "f1", "answered")}
    return {"id": row["id"], **right, "steps": steps, "tool_errors": errors}


def evaluate(args: Arguments, dataset: str, data: HotpotQAData, model: LocalModel | ServedModel) -> list[Scores]:
    """Play the questions that are not in the file yet. Returns the scores of all questions that did not fail."""
    rows = [dict(row) for row in data.eval_dataset]
    rows = rows[: args.max_questions]
    path = Path(args.output_dir) / f"{Path(dataset).stem}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {line["id"]: line for line in lines if "error" not in line}
    left = [row for row in rows if row["id"] not in done]
    for start in range(0, len(left), args.batch_size):
        played = model.play(left[start : start + args.batch_size], partial(_make, args, data))
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in played)
        done |= {line["id"]: line for line in played if "error" not in line}
        for line in played:
            if "error" in line:
                print(f"{dataset}, {line['id']}: {line['error']}")
    return [done[row["id"]] for row in rows if row["id"] in done]


def _make(args: Arguments, data: HotpotQAData) -> Playable:
    return make_playable(args.environment_factory(data.retriever)(), max_tool_calls=args.max_tool_calls)


def check_settings(args: Arguments) -> None:
    """Refuse to mix scores of different models or settings."""
    path = Path(args.output_dir) / "settings.json"
    settings = {name: value for name, value in asdict(args).items() if name not in SETTINGS_WITHOUT_EFFECT}
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{path} is of an evaluation with other settings; name another --output_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def main(args: Arguments) -> None:
    """Evaluate, print the table, write it."""
    check_settings(args)
    model = LocalModel(args) if args.base_url is None else ServedModel(args)
    table = Table(title=f"{args.model_name_or_path}, greedy", title_justify="left")
    for column in ("data set", "questions", *SCORES):
        table.add_column(column, justify="left" if column == "data set" else "right")
    summary: dict[str, dict[str, float]] = {}
    for dataset in args.datasets:
        rows = None if Path(dataset).is_dir() else dataset  # a prepared directory has its evaluation rows
        data = hotpotqa_dataset(dataset, eval_dataset_name=rows, system_prompt=args.system_prompt)
        lines = evaluate(args, dataset, data, model)
        if not lines:
            raise SystemExit(f"{dataset}: every question failed; the errors are above")
        summary[dataset] = {"questions": len(lines), **{name: mean(line[name] for line in lines) for name in SCORES}}
        table.add_row(dataset, str(len(lines)), *(f"{summary[dataset][name]:.3f}" for name in SCORES))
    Console().print(table)
    (Path(args.output_dir) / "scores.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main(*StepPOParser(Arguments).parse_args_and_config())
