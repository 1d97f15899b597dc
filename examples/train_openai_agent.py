"""
Train an agent that is written with the OpenAI Agents SDK and knows nothing of training.

    pip install -c constraints.txt -e ".[gateway,agents]"
    accelerate launch examples/train_openai_agent.py

The agent plays each question of the built-in wiki through the gateway: all that makes it trainable is the address and
the key that its client is given. Any setting of `StepPOConfig` is a flag.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from agents import (
    Agent,
    MaxTurnsExceeded,
    ModelBehaviorError,
    OpenAIChatCompletionsModel,
    Runner,
    StopAtTools,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI, BadRequestError
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.environments.hotpotqa import exact_match, hotpotqa_dataset
from trl_steppo.environments.hotpotqa.data import SYSTEM_PROMPT
from trl_steppo.environments.hotpotqa.environment import format_passages
from trl_steppo.models import MINI_WIKI_POLICY

CONFIG = Path(__file__).with_suffix(".yaml")

DATA = hotpotqa_dataset("mini_wiki")


async def answer_question(client: AsyncOpenAI, question: str) -> str:
    """The agent: it looks things up until it knows the answer."""
    given: list[str] = []

    @function_tool
    def search(query: str) -> str:
        """
        Search the wiki.

        Args:
            query: What to look up.
        """
        return format_passages(DATA.retriever.search(query, 1))

    @function_tool
    def answer(text: str) -> str:
        """
        Give the final answer.

        Args:
            text: The answer alone, as short as possible.
        """
        given.append(text)
        return "Answered."

    agent = Agent(
        name="wiki",
        instructions=SYSTEM_PROMPT,
        tools=[search, answer],
        model=OpenAIChatCompletionsModel(model="policy", openai_client=client),
        tool_use_behavior=StopAtTools(stop_at_tool_names=["answer"]),
    )
    with suppress(BadRequestError, MaxTurnsExceeded, ModelBehaviorError):  # out of steps, or a tool that is not there
        await Runner.run(agent, question)
    return given[0] if given else ""


async def play(row: dict[str, Any], *, base_url: str, api_key: str) -> float:
    """One episode: the agent's answer to the row's question, scored."""
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        return exact_match(await answer_question(client, row["question"]), row["answer"])


def main(training_args: StepPOConfig) -> None:
    """Build everything, train, save."""
    set_tracing_disabled(True)
    trainer = StepPOTrainer(
        args=training_args,
        processing_class=AutoTokenizer.from_pretrained(MINI_WIKI_POLICY),
        model=AutoModelForCausalLM.from_pretrained(MINI_WIKI_POLICY),
        train_dataset=DATA.train_dataset,
        eval_dataset=DATA.eval_dataset.select(range(64)),
        agent=play,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", str(CONFIG), *arguments]
    (parsed,) = TrlParser((StepPOConfig,)).parse_args_and_config(arguments)  # type: ignore[arg-type]
    main(parsed)
