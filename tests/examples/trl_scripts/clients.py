"""Stand-ins for the clients of remote environments that TRL's example scripts use: the same calls, tiny games."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest


@dataclass
class Action:
    """What any client's `step` takes."""

    message: str = ""
    action_id: int = 0
    game_name: str = ""


def result(reward: float = 0.0, done: bool = False, **observation: Any) -> SimpleNamespace:
    return SimpleNamespace(reward=reward, done=done, observation=SimpleNamespace(done=done, **observation))


class EchoEnv:
    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def step(self, action: Action) -> SimpleNamespace:
        echoed = SimpleNamespace(echoed_message=action.message, reward=len(action.message) / 10)
        return SimpleNamespace(observation=echoed)


@dataclass
class TextArenaEnv:
    """A game in text whose one message grows; which game, the address tells."""

    base_url: str
    text: str = ""
    solved: set[str] = field(default_factory=set)

    def reset(self) -> SimpleNamespace:
        self.text = ""
        self.solved = set()
        return self._say(f"A new game.\n{self._board()}")

    def step(self, action: Action) -> SimpleNamespace:
        return self._place(action.message) if "sudoku" in self.base_url else self._guess(action.message)

    def close(self) -> None:
        pass

    def _guess(self, word: str) -> SimpleNamespace:
        if len(word) != 7:
            return self._say("\nYou attempted an invalid move.", 0.1)
        marks = "".join("G" if a == b else "X" for a, b in zip(word, "[crane]", strict=True))
        return self._say(f"\n{word} {marks}", marks.count("G") / 7, done=word == "[crane]")

    def _place(self, move: str) -> SimpleNamespace:
        if move not in ("[1 1 5]", "[5 5 5]"):
            return self._say("\nInvalid move. Please resubmit.")
        self.solved.add(move)
        done = len(self.solved) == 2
        return self._say(f"\n{self._board()}", float(done), done=done)

    def _board(self) -> str:
        if "sudoku" not in self.base_url:
            return ""
        rows = [
            "534678912",
            "672195348",
            "198342567",
            "859761423",
            "426853791",
            "713924856",
            "961537284",
            "287419635",
            "345286179",
        ]
        rows[0] = rows[0] if "[1 1 5]" in self.solved else "." + rows[0][1:]
        rows[4] = rows[4] if "[5 5 5]" in self.solved else rows[4][:4] + "." + rows[4][5:]
        lines = [f"R{number} {' '.join(row[:3])} | {' '.join(row[3:])}" for number, row in enumerate(rows, 1)]
        return "\n".join(["C1 C2 C3", *lines])

    def _say(self, text: str, reward: float = 0.0, done: bool = False) -> SimpleNamespace:
        self.text += text
        return result(reward, done, messages=[SimpleNamespace(content=self.text)])


class OpenSpielEnv:
    """Catch: a ball that falls for three steps, and a paddle two columns beside it."""

    def __init__(self, base_url: str) -> None:
        self.row, self.paddle = 6, 1

    def reset(self) -> SimpleNamespace:
        self.row, self.paddle = 6, 1
        return self._seen()

    def step(self, action: Action) -> SimpleNamespace:
        assert action.game_name == "catch"
        self.row += 1
        self.paddle = min(4, max(0, self.paddle + action.action_id - 1))
        return self._seen()

    def close(self) -> None:
        pass

    def _seen(self) -> SimpleNamespace:
        cells = [0.0] * 50
        cells[self.row * 5 + 3] = cells[45 + self.paddle] = 1.0
        done = self.row == 9
        return result((1.0 if self.paddle == 3 else -1.0) if done else 0.0, done, info_state=cells)


class LocalDockerProvider:
    pass


class NoRandom:
    """In place of the module `random`: environments are played in different orders."""

    @staticmethod
    def choice(values: list[Any]) -> Any:
        return values[0]

    @staticmethod
    def random() -> float:
        return 0.5


_GENES = [("HTRA2", "BCL2"), ("TP53", "MDM2"), ("TP53", "EP300")]


def load_dataset(name: str, split: str) -> datasets.Dataset:
    """The two data sets of `grpo_agent.py`."""
    assert split == "train"
    if name.endswith("_qa"):
        rows = [("Does the gene TP53 interact?", "Yes"), ("What is it?", "No"), ("Does the gene XYZ interact?", "No")]
        return datasets.Dataset.from_dict({"question": [q for q, _ in rows], "answer": [a for _, a in rows]})
    columns = {"Alt IDs Interactor A": [a for a, _ in _GENES], "Alt IDs Interactor B": [b for _, b in _GENES]}
    return datasets.Dataset.from_dict(columns)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clients be imported, for as long as a test lasts."""
    modules: dict[str, dict[str, Any]] = {
        "echo_env": {"EchoEnv": EchoEnv},
        "echo_env.models": {"EchoAction": Action},
        "textarena_env": {"TextArenaEnv": TextArenaEnv, "TextArenaAction": Action},
        "openspiel_env": {"OpenSpielEnv": OpenSpielEnv},
        "openspiel_env.models": {"OpenSpielAction": Action},
        "openenv": {},
        "openenv.core": {},
        "openenv.core.containers": {},
        "openenv.core.containers.runtime": {"LocalDockerProvider": LocalDockerProvider},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
