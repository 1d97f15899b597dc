"""A scripted policy and a whole gateway around it, in a thread or (run as a program) in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_steppo.gateway import EpisodeSpec, GatewayServer
from trl_steppo.gateway.sampling import SamplerLoop
from trl_steppo.gateway.tokens import ChatFormats
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.testing import END_OF_TURN, ScriptedSampler, Turn, byte_tokenizer, tool_call
from trl_steppo.types import EpisodeLimits

END = END_OF_TURN
ADMIN = "admin-key-of-the-tests"

TOKENIZER = byte_tokenizer()


def call(name: str, **arguments: Any) -> str:
    return tool_call(name, **arguments)


class Policy(ScriptedSampler):
    """
    Says `script(prompt_text, order)` and ends its turn, one token each `token_s`; fails and waits as it is told.

    A token's log-probability is minus its place in the response, minus one hundredth of the step's.
    """

    def __init__(self, script: Callable[[str, tuple[int, ...]], str], *, token_s: float = 0.0) -> None:
        super().__init__(self._say, tokenizer=TOKENIZER, logprobs=_logprobs, policy_version=3)
        self.say = script
        self.token_s = token_s
        self.asked: list[tuple[list[int], SamplingParams, tuple[int, ...]]] = []
        self.failures = 0  # calls that are to fail
        self.gate: asyncio.Event | None = None

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        self.asked.append((list(prompt_ids), params, order))
        return await super().sample(prompt_ids, params, episode_id=episode_id, order=order)

    async def _say(self, turn: Turn) -> str:
        if self.failures:
            self.failures -= 1
            raise OSError("the engine is broken")
        if self.gate is not None:
            await self.gate.wait()
        text = self.say(turn.prompt, _order(turn))
        if self.token_s:
            num_tokens = min(len(TOKENIZER.encode(text)) + 1, turn.params.max_new_tokens)
            await asyncio.sleep(self.token_s * num_tokens)
        return text


def _logprobs(turn: Turn, ids: Sequence[int]) -> list[float]:
    return [-float(index) - turn.step_index / 100 for index in range(len(ids))]


def _order(turn: Turn) -> tuple[int, int, int]:
    return turn.stream_position, turn.generation_index, turn.step_index


def echo(prompt: str, order: tuple[int, ...]) -> str:
    """Says which step of which prompt it is; a response that belongs elsewhere is found out."""
    return f"{order[2]}:{zlib.crc32(prompt.encode()):08x}"


def start(policy: Policy, *, spec: EpisodeSpec | None = None, **settings: Any) -> GatewayServer:
    """A gateway that serves the policy, which runs in the gateway's own loop."""
    settings.setdefault("admin_key", ADMIN)
    server = GatewayServer(ChatFormats(TOKENIZER), default=spec or make_spec(), **settings).start()
    server.resume(SamplerLoop(policy))
    return server


def make_spec(**changes: Any) -> EpisodeSpec:
    limits = {"max_interaction_steps": changes.pop("max_interaction_steps", 100)}
    limits |= {name: changes.pop(name) for name in list(changes) if name.startswith("max_")}
    sampling = SamplingParams(max_new_tokens=changes.pop("response_length", 200))
    return EpisodeSpec(EpisodeLimits(**limits), sampling, **changes)


def serve(port: int, store: Path) -> None:
    """Serve until a signal ends it; after a kill, the next one goes on from its store."""
    server = start(Policy(echo, token_s=0.002), port=port, store=store)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    print("ready", flush=True)
    server.wait()
    server.close()


def main() -> None:
    """Start a process that serves, whenever a line comes in; imports are done once, and it is there at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                serve(args.port, args.store)
            except BaseException as error:
                print(f"failed: {error}", flush=True)
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
