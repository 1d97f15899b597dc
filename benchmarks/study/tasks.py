"""The tasks of the study: the mini wiki, and the rooms, where one axis at a time is set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .methods import MAIN, METHODS, Flags


@dataclass(frozen=True, eq=False)
class Task:
    """
    What is trained on.

    Args:
        name (`str`):
            Its folder in the results.
        script (`str`):
            The example that plays it.
        config (`str`):
            The example's configuration, for the methods with a critic.
        group_config (`str`, *optional*):
            The same for those without; `None`: they are not run.
        score (`str`):
            The environment's score.
        flags (`Flags`):
            The script's flags.
        response_tokens (`int`):
            About how long a response is. A step's ratio is the geometric mean of its tokens' ratios, so where a few
            tokens decide it moves by a fraction of theirs: its clip range is the tokens' over this length. (Published
            ones, of 3e-4 and 4e-4 for responses of some hundred tokens, are of that size.)
        rates (`tuple[float, ...]`):
            The grid of learning rates, the same for every method, each twice the one before.
        result_seeds (`Mapping[str, int]`):
            Number of seeds of each method.
    """

    name: str
    script: str
    config: str
    group_config: str | None
    score: str
    flags: Flags
    response_tokens: int
    rates: tuple[float, ...]
    result_seeds: Mapping[str, int]


MINI_WIKI = Task(
    name="mini_wiki",
    script="hotpotqa_steppo.py",
    config="mini_wiki",
    group_config="mini_wiki_group",
    score="exact_match",
    flags={
        "model_name_or_path": "mini_wiki_thinking",
        "response_length": 64,
        "total_episodes": 1536,
        "per_device_train_batch_size": 64,
    },
    response_tokens=40,
    rates=(2e-4, 4e-4, 8e-4),
    result_seeds=dict.fromkeys(METHODS, 8),
)


def rooms(num_rooms: int, num_words: int) -> Task:
    """The rooms of one size."""
    return Task(
        name=f"rooms_h{num_rooms}_l{num_words}",
        script="rooms_steppo.py",
        config="rooms",
        group_config=None,
        score="score",
        flags={"max_interaction_steps": num_rooms, "response_length": num_words},
        response_tokens=num_words,
        rates=(5e-4, 1e-3, 2e-3),
        result_seeds=dict.fromkeys(MAIN, 3),
    )


# One axis at a time
ROOMS_BY_STEPS = {steps: rooms(steps, 32) for steps in (3, 6, 12)}
ROOMS_BY_TOKENS = {tokens: rooms(6, tokens) for tokens in (8, 32, 128)}
ROOMS_AXES = {
    "steps of an episode (responses of 32 tokens)": ROOMS_BY_STEPS,
    "tokens of a response (episodes of 6 steps)": ROOMS_BY_TOKENS,
}
TASKS = {
    "mini_wiki": [MINI_WIKI],
    "rooms": list({task.name: task for axis in ROOMS_AXES.values() for task in axis.values()}.values()),
}
