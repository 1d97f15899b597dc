"""
Training programs written for TRL's `GRPOTrainer`, which have in them what its example scripts have: clients made with
the environment, several tools, tools that refuse, hang or answer with lists, scores kept as attributes and properties,
environments chosen by a column, reward functions that read environments, messages and columns.

Each takes what makes its settings, of those of `GRPOConfig`, and the trainer's class; else it is the same for both.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from tests.examples.trl_scripts.scripted_runs import call, say

Config = Callable[..., Any]


PRICES = {"tea": 3, "cup": 5}


class Client:
    """A connection that works in the thread that opened it alone, as those of `sqlite3` do."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def price(self, item: str) -> int:
        if threading.get_ident() != self._thread:
            raise RuntimeError("this connection was opened in another thread")
        return PRICES[item]


class Shop:
    """Buys things until the money is spent."""

    CLOSED = "the shop is closed"

    def __init__(self) -> None:
        self.client = Client()

    def reset(self, **kwargs: Any) -> str | None:
        self.money = kwargs["money"]
        self.bought: list[str] = []
        self._closed = False
        self.refusals = 0.0
        return f" You have {self.money}." if self.money > 5 else None

    @property
    def spent(self) -> float:
        return sum(PRICES[item] for item in self.bought) / 10

    @staticmethod
    def _shown(items: list[str]) -> list[dict[str, str]]:
        return [{"item": item} for item in items]

    def buy(self, item: str, count: int = 1) -> str:
        """
        Buy something.

        Args:
            item: What to buy.
            count: How many of it.

        Returns:
            What is left.
        """
        if self._closed:
            raise ValueError(self.CLOSED)
        price = self.client.price(item) * count
        if price > self.money:
            self.refusals += 1
            raise ValueError(f"{price} is more than {self.money}")
        self.money -= price
        self.bought += [item] * count
        return f"{self.money} left"

    def basket(self) -> list[dict[str, str]]:
        """
        Look at what was bought.

        Returns:
            All of it.
        """
        return self._shown(self.bought)

    def step(self, seconds: float) -> dict[str, float]:
        """
        Wait.

        Args:
            seconds: How long.

        Returns:
            How long it was.
        """
        return {"waited": seconds}

    def close(self, reason: str) -> None:
        """
        Close the shop.

        Args:
            reason: Why.
        """
        self._closed = True


def paid(environments: list[Shop], log_metric: Callable[..., None], **kwargs: Any) -> list[float]:
    log_metric("shop/refusals", sum(shop.refusals for shop in environments))
    return [shop.spent for shop in environments]


def wished(environments: list[Shop], wish: list[str], log_extra: Callable[..., None], **kwargs: Any) -> list[Any]:
    log_extra("bought", [" ".join(shop.bought) for shop in environments])
    return [float(w in shop.bought) if shop.bought else None for shop, w in zip(environments, wish, strict=True)]


def shopping(config: Config, trainer: type, folder: str) -> None:
    rows = [{"money": 20, "wish": "cup"}, {"money": 5, "wish": "tea"}]
    prompt = [{"role": "system", "content": "You shop."}, {"role": "user", "content": "Buy something."}]
    trainer(
        model="somebody/a-model",
        reward_funcs=[paid, wished],
        train_dataset=Dataset.from_list([{"prompt": prompt, **row} for row in rows]),
        args=config(output_dir=folder, chat_template_kwargs={"enable_thinking": False}, reward_weights=[1.0, 0.5]),
        environment_factory=Shop,
    ).train()


SHOPPING = [
    [call(("buy", {"item": "tea"}), text="First tea.")] * 8,
    [call(("buy", {"item": "cup", "count": 1}), ("basket", {}), ("step", {"seconds": 0.5})), say("That was it.")],
    [
        call(("buy", {"item": "hat"})),
        call(("sell", {"item": "tea"})),
        call(("close", {"reason": "late"})),
        call(("buy", {"item": "tea"})),
    ],
    [say("<think>\nWhat for?\n</think>\n\nNothing.")],
]


# -- functions as tools, read from the messages -----------------------------------------------------------------------


@contextmanager
def time_limit(seconds: int) -> Any:
    """As scripts do it, which works in the main thread alone."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def lookup(name: str) -> list[dict[str, str]]:
    """
    Look a town up.

    Args:
        name: Its name.

    Returns:
        What is known of it.
    """
    with time_limit(30):
        if name == "Nowhere":
            raise LookupError("no such town")
        return [{"name": name, "on": "the river"}] if name == "Basel" else []


async def distance(first: str, second: str) -> int:
    """
    Measure how far two towns are apart.

    Args:
        first: The one.
        second: The other.

    Returns:
        Kilometres.
    """
    await asyncio.sleep(0)
    return len(first) * len(second)


def found(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    scores = []
    for messages, right in zip(completions, answer, strict=True):
        results = [message["content"] for message in messages if message["role"] == "tool"]
        lists = [result for result in results if isinstance(result, list)]
        asked = [c["function"]["arguments"] for message in messages for c in message.get("tool_calls") or []]
        scores.append(len(lists) + 10 * sum(map(len, lists)) + 100 * len(asked) + (right in str(messages[-1])))
    return scores


async def short(completions: list[Any], prompts: list[Any], **kwargs: Any) -> list[float]:
    return [len(p[-1]["content"]) / (1 + len(c[-1]["content"])) for p, c in zip(prompts, completions, strict=True)]


def asking(config: Config, trainer: type, folder: str) -> None:
    rows = [{"question": "Where is Basel?", "answer": "river"}, {"question": "Where is Bern?", "answer": "river"}]
    prompts = [{"prompt": [{"role": "user", "content": row["question"]}], **row} for row in rows]
    trainer(
        model="somebody/a-model",
        reward_funcs=[found, short],
        train_dataset=Dataset.from_list(prompts).remove_columns("question"),
        args=config(output_dir=folder, chat_template_kwargs={"enable_thinking": False}),
        tools=[lookup, distance],
    ).train()


ASKING = [
    [call(("lookup", {"name": "Basel"})), say("On the river.")],
    [call(("lookup", {"name": "Bern"})), call(("distance", {"first": "Basel", "second": "Bern"})), say("No river.")],
    [call(("lookup", {"name": "Nowhere"})), call(("lookup", {"town": "Basel"})), say("river")],
    [say("I do not know.")],
]


# -- environments that are chosen by the row, and say what to do ------------------------------------------------------


class Counter:
    """Counts."""

    def reset(self, **kwargs: Any) -> str:
        self.count, self.goal = 0, kwargs["goal"]
        return f"Count to {self.goal}. {sorted(kwargs)}"

    def up(self, by: int) -> str:
        """
        Count up.

        Args:
            by: How far.
        """
        self.count += by
        return str(self.count)


class Door:
    """Is opened, and knows what that is worth."""

    def reset(self, **kwargs: Any) -> str:
        self.is_open = False
        return "Open the door."

    def open(self) -> str:
        """Open it."""
        self.is_open = True
        return "open"

    def get_reward(self) -> float:
        return 1.0 if self.is_open else -1.0


def counted(environments: list[Any], environment: list[str], **kwargs: Any) -> list[float | None]:
    pairs = zip(environments, environment, strict=True)
    return [float(env.count == env.goal) if name == "counter" else None for env, name in pairs]


def choosing(config: Config, trainer: type, folder: str) -> None:
    rows = [{"environment": "counter", "goal": 7}, {"environment": "door", "goal": 0}]
    trainer(
        model="somebody/a-model",
        reward_funcs=counted,
        train_dataset=Dataset.from_list(rows),
        args=config(output_dir=folder, chat_template_kwargs={"enable_thinking": False}),
        environment_factory={"counter": Counter, "door": Door},
    ).train()


CHOOSING = [
    [call(("up", {"by": 1}))] * 7,
    [call(("open", {}))],
    [call(("up", {"by": 3}), ("up", {"by": 4}))],
    [say("I will not.")],
]


# -- no dataset -------------------------------------------------------------------------------------------------------


class Opening(Door):
    """The same, without a row."""


def many_turns(completions: list[Any], prompts: list[Any], **kwargs: Any) -> list[float]:
    return [
        len(completion) + len(prompt[-1]["content"]) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def without_rows(config: Config, trainer: type, folder: str) -> None:
    trainer(
        model="somebody/a-model",
        reward_funcs=many_turns,
        args=config(output_dir=folder, chat_template_kwargs={"enable_thinking": False}),
        environment_factory=Opening,
    ).train()


@dataclass(frozen=True)
class Program:
    run: Callable[[Config, type, str], None]
    said: list[list[str]]  # in the episodes of a row; when all is said, "done"


PROGRAMS = {
    "shopping": Program(shopping, SHOPPING),
    "asking": Program(asking, ASKING),
    "choosing": Program(choosing, CHOOSING),
    "without_rows": Program(without_rows, CHOOSING),
}
