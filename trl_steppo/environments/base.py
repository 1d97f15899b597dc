"""The environment protocol: a response in, an observation and a reward out.

Users write plain classes, in one of two forms (see [`Environment`] and [`ToolEnvironment`]); nothing has to be
inherited. The rollout plays a [`Playable`], which adapts either form: it is async, it never raises for a mistake of
the model, and it counts what went wrong.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..types import Message

HOOKS: dict[str, tuple[str, ...] | None] = {
    "reset": None,
    "get_reward": None,
    "step": ("response",),
    "state_prompt": ("observation",),
    **dict.fromkeys(("step_reward", "done", "state_key", "metrics", "close"), ()),
}
"""
Names of an environment's methods that the rollout calls, with their parameters; `None`: whatever these are. A method
of one of these names with other parameters is a tool like any other. All but `reset` are optional:

| name | when it is called |
|---|---|
| `reset(**row)` | at the start, with every column of the row; may return text for the prompt's last user message |
| `step(response)` | for each response, in the form that takes the whole response |
| `step_reward()`, `done` | after each step, in the form with tools; `done` is an attribute, a property or a method |
| `state_key()` | before each step is played, if the trainer compares states (`gigpo`): the state the response was \
written in |
| `state_prompt(observation)` | after `reset` (with `""`) and each step: the whole prompt of the state, text or \
messages, instead of the row's prompt to which everything is appended; `None`: that one all the same. A control token \
that is spelled in it is tokenized as text: return messages for the chat template to write the turns |
| `get_reward()` | once, at the end |
| `metrics()` | after it: scores to log, by name |
| `close()` | once, when it plays no more episodes: at the end of the run, or after an episode that failed |
"""

RESERVED_NAMES = frozenset(HOOKS)
"""The names in [`HOOKS`]."""


@runtime_checkable
class Environment(Protocol):
    """
    An environment that takes the whole response as its action. Methods may be sync or async. The one parameter of
    `step` is named `response`; in a class that inherits from this one it may have any name.

    `reset(**row)` receives every column of the dataset row (`prompt` included) and may return text that is appended to
    the prompt's last user message. Optional: `get_reward() -> float`, called once at the end and added to the last
    step; `state_key() -> Hashable`, which groups steps for `gigpo`; `state_prompt(observation)`, which rewrites the
    prompt for every step; `metrics() -> dict`; `close()`. Other public methods are refused: they would look like
    tools, which this form does not have.

    Example:
    ```python
    >>> class GuessNumber:
    ...     def reset(self, number, **row):
    ...         self.number = number
    ...
    ...     def step(self, response):
    ...         right = response.strip() == str(self.number)
    ...         return ("right" if right else "wrong"), float(right), right
    ```
    """

    def reset(self, **row: Any) -> str | None: ...

    def step(self, response: str) -> tuple[str | list[Message], float, bool]: ...


@runtime_checkable
class ToolEnvironment(Protocol):
    """
    A TRL-style environment: every public method with a docstring and type hints is a tool the model may call, static
    methods included. A method with the name and the parameters of a hook ([`HOOKS`]) is none.

    Methods may be sync or async. An episode ends when a response calls no tool, or when `done` becomes true. Optional:
    `get_reward() -> float`, called once at the end and added to the last step; `step_reward() -> float` and `done`
    (attribute or method), read after each step; `state_key() -> Hashable`; `state_prompt(observation)`;
    `metrics() -> dict`; `close()`.

    When one response holds several calls, an environment's sync methods run one after another, in the order they were
    called, all in the thread that it was made in: they share the environment's state. Async ones run concurrently,
    when these are done. `reset` sets all that an episode changes: an environment plays many of them.
    """

    def reset(self, **row: Any) -> str | None: ...


@dataclass(frozen=True)
class Response:
    """One response as the environment sees it."""

    text: str  # decoded, without special tokens
    message: Message  # parsed by the chat format: role, content, tool_calls
    malformed: tuple[str, ...] = ()  # for each tool call that could not be read: why


@dataclass(frozen=True)
class Outcome:
    """
    What the environment answered to one response. `state_key` is that of the state the response was written in.
    `ended_by_response`: the episode is done because the response asks for nothing more (it called no tool), and not
    because the environment ended it. If such a response was cut at its length, the episode is truncated.
    """

    observation: str | list[Message]
    reward: float
    done: bool
    state_key: Hashable = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # counters to add up over the episode
    ended_by_response: bool = False


class Playable(Protocol):
    """What the rollout plays: either form of environment, made async, with the model's mistakes caught."""

    tools: Sequence[Any]  # callables or JSON schemas, as `apply_chat_template(tools=...)` takes them

    async def reset(self, row: Mapping[str, Any]) -> str | None:
        """Start an episode; the text to append to the prompt's last user message, if any."""
        ...

    async def step(self, response: Response) -> Outcome:
        """Answer one response. Raises only if the environment itself broke."""
        ...

    async def state_prompt(self, observation: str | list[Message]) -> str | list[Message] | None:
        """The whole prompt of the state that `observation` led to; `None`: the one before, with all that followed."""
        ...

    async def get_reward(self) -> float | None:
        """Called once, at the end; added to the last step. `None`: the environment has not paid the episode."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Scores of the finished episode that the environment chooses to expose (e.g. `exact_match`)."""
        ...

    async def close(self) -> None:
        """The episode is over, however it ended: release what it held."""
        ...
