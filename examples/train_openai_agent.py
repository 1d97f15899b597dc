"""
Train an agent that is written with the OpenAI Agents SDK and contains no code for training.

    pip install -c constraints.txt -e ".[gateway,agents]"
    accelerate launch examples/train_openai_agent.py

trains it on the questions of the built-in wiki, with the built-in policy, on a CPU, in minutes
(`examples/train_openai_agent.yaml`). It is trainable because its client is given an address and a key: there the
trainer answers as the model, and records every call. Any setting of `StepPOConfig` is a flag.
"""

from __future__ import annotations

import sys
from pathlib import Path

from agents import Agent, ModelBehaviorError, OpenAIProvider, RunConfig, Runner, StopAtTools, function_tool
from openai import AsyncOpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steppo import StepPOConfig, StepPOParser, StepPOTrainer
from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.environments.hotpotqa import SYSTEM_PROMPT, exact_match, hotpotqa_dataset
from trl_steppo.environments.hotpotqa.environment import format_passages
from trl_steppo.gateway.client import AsyncSession
from trl_steppo.types import Row

RECIPE = Path(__file__).with_suffix(".yaml")
DATA = hotpotqa_dataset("mini_wiki")

# -- the agent: as it would be written for any model ------------------------------------------------------------------


@function_tool
def search(query: str) -> str:
    """
    Search the wiki.

    Args:
        query (str): What to look up.
    """
    return format_passages(DATA.retriever.search(query, 1))


@function_tool
def answer(text: str) -> str:
    """
    Give the final answer.

    Args:
        text (str): The answer alone, as short as possible.
    """
    return text


AGENT = Agent(
    name="wiki",
    model="gpt-4.1-mini",
    instructions=SYSTEM_PROMPT,
    tools=[search, answer],
    tool_use_behavior=StopAtTools(stop_at_tool_names=["answer"]),
)


# -- its training -----------------------------------------------------------------------------------------------------


async def play(row: Row, *, base_url: str, api_key: str) -> None:
    """One episode: the agent's answer to the row's question, scored. The score is the reward, and a metric."""
    score = 0.0
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        config = RunConfig(model_provider=OpenAIProvider(openai_client=client), tracing_disabled=True)
        try:
            # The trainer's `max_interaction_steps` ends a run that goes on for too long.
            result = await Runner.run(AGENT, row["question"], run_config=config, max_turns=sys.maxsize)
            score = exact_match(str(result.final_output), row["answer"])
        except ModelBehaviorError:  # it called an unknown tool: a wrong answer, not a broken agent
            pass
    await AsyncSession(base_url, api_key).finish(score, metrics={"exact_match": score})


def main(training_args: StepPOConfig) -> None:
    """Build everything, train, save."""
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
    main(*StepPOParser(StepPOConfig, default_config=RECIPE).parse_args_and_config())
