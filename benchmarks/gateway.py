"""
The gateway against the sampler that it serves: many sessions at once, with the gateway and without it.

    python benchmarks/gateway.py --json benchmarks/results/gateway.json

A scripted sampler takes 20 ms a token, whatever else is sampled at the same time. Clients in another process play
sessions of several turns over HTTP, with and without trouble: clients that go away or ask twice, a sampler that fails.
For comparison, agents in this process call the sampler itself. Every step is on the disk before its client is told of
it. Then: memory over many sessions, one after the other, and the time that a turn takes the gateway when a
conversation has 1, 8 and 64 of them. Then (`common/hostile_clients.py`): how long others wait while a client sends far
more than the model's context has room for, again and again, and beside 1,500 silent connections, under a limit of
1,024 open files.

The figures, as `--json` has them:

- `throughput_over_direct`, `lost_steps`, `mixed_steps`, `cpu_ms_per_request`, `client_cpu_ms_per_request`: of
  `sessions` sessions of `steps` steps at once;
- `memory_growth_mb`: over `finished_sessions`;
- `turn_ms`, `new_tokens_turn_64_over_turn_2`: of a long conversation;
- `hostile`, for models of two contexts (`context_2048`, `context_131072`; `--quick`: the first): `healthz_p99_ms` and
  `one_token_p99_ms` of others, `idle` and beside each kind of hostile client (`malformed_1.6_mb`, `malformed_7.6_mb`,
  `short_messages_100_000`, `prompt_ids_200_000`, `nested_1_mb`, with how many requests that one sent and the statuses
  it was told; `silent_connections_1500`), over `requests_each`; the worst of them, `worst_healthz_p99_ms` and
  `worst_one_token_p99_ms`, beside what is allowed (`allowed_...`: five times the idle gateway's, or 50 ms).
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from common.hostile_clients import measure_hostile
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from transformers import AutoTokenizer

from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.chat import ChatFormat
from trl_steppo.gateway import EpisodeSpec, GatewayServer
from trl_steppo.gateway.sampling import SamplerLoop
from trl_steppo.gateway.tokens import ChatFormats
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.types import Episode, EpisodeLimits, JsonObject, StopReason, TokenIds

CLIENTS = Path(__file__).parent / "common" / "gateway_clients.py"
RESPONSE_TOKENS = 48  # about a tool call
TOKEN_S = 0.02
DELAY_S = 0.2  # an agent's longest pause between two calls


class Responses:
    """What is said, made without a tokenizer at work: it is the gateway's processor time that is measured."""

    def __init__(self, chat: ChatFormat) -> None:
        self._end = chat.end_of_turn_id
        self._words = {
            text: chat.encode_text(text, add_special_tokens=False) for text in ("step ", " of ", *"0123456789")
        }

    def of(self, *, session: int, step: int) -> TokenIds:
        """ "step 2 of 17", over and over, up to the length of a response."""
        parts = ["step ", *str(step), " of ", *str(session)]
        ids = [token_id for part in parts for token_id in self._words[part]]
        return TokenIds([*(ids * RESPONSE_TOKENS)[: RESPONSE_TOKENS - 1], self._end])


class ScriptedSampler:
    """Says the number of the step and of the session, at 20 ms a token; fails as often as it is told."""

    def __init__(self, chat: ChatFormat, *, token_s: float = TOKEN_S, failures: float = 0.0, seed: int = 0) -> None:
        self.responses = Responses(chat)
        self.token_s = token_s
        self.failures = failures
        self.rng = random.Random(seed)
        self.num_sampled = 0

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """One response."""
        ids = self.responses.of(session=order[0], step=order[2])
        if self.token_s:
            await asyncio.sleep(self.token_s * len(ids))
        if self.rng.random() < self.failures:
            raise OSError("made to fail")
        self.num_sampled += 1
        return Sample(ids, (-1.0,) * len(ids), StopReason.STOP, 0)

    def release(self, episode_id: str) -> None:
        """Nothing is kept."""

    def pace(self, quiet: object) -> None:
        """Nothing is batched."""


def make_spec(index: int = 0) -> EpisodeSpec:
    """A session that may go on."""
    return EpisodeSpec(EpisodeLimits(10_000), SamplingParams(RESPONSE_TOKENS), stream_position=index)


async def sample_directly(sampler: ScriptedSampler, chat: ChatFormat, num_sessions: int, num_steps: int) -> float:
    """Seconds that the same sessions take without a gateway."""

    async def play(index: int) -> None:
        rng = random.Random(index)
        ids = chat.render([{"role": "user", "content": f"session {index}"}])
        for step in range(num_steps):
            await asyncio.sleep(rng.random() * DELAY_S)
            params = SamplingParams(RESPONSE_TOKENS)
            sample = await sampler.sample(ids, params, episode_id=str(index), order=(index, 0, step))
            answer = chat.append([{"role": "user", "content": f"session {index}"}])
            ids = [*ids, *sample.token_ids, *answer]

    start = time.perf_counter()
    await asyncio.gather(*(play(index) for index in range(num_sessions)))
    return time.perf_counter() - start


def play_through(server: GatewayServer, num_sessions: int, num_steps: int, *, trouble: bool) -> JsonObject:
    """What clients in another process saw: seconds, and what each session was told."""
    opened = [server.call(server.gateway.open_session(make_spec(index))) for index in range(num_sessions)]
    work = {
        "origin": server.origin,
        "keys": [key for _, key in opened],
        "num_steps": num_steps,
        "delay_s": DELAY_S,
        "trouble": trouble,
    }
    before = cpu_s()
    done = subprocess.run([sys.executable, str(CLIENTS)], input=json.dumps(work), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seen: dict[str, Any] = json.loads(done.stdout)
    seen["cpu_s"] = cpu_s() - before
    episodes = []
    for session, _ in opened:
        server.call(server.gateway.finish(session))
        episodes.append(server.call(server.gateway.collect(session, keep=False)))
    seen["episodes"] = episodes
    return seen


def count_wrong(chat: ChatFormat, episodes: Sequence[Episode], said: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Steps that are lost or duplicated; steps that are another session's, or half."""
    lost = mixed = 0
    for index, (episode, texts) in enumerate(zip(episodes, said, strict=True)):
        recorded = [chat.decode(step.response_ids) for step in episode.steps]
        lost += sum(text not in recorded for text in texts) + max(0, len(recorded) - len(texts))
        for step in episode.steps:
            asked = f"session {index}" in chat.decode(step.prompt_ids).replace("\n", " ").split("assistant")[0]
            whole = len(step.response_ids) == len(step.rollout_logprobs) == RESPONSE_TOKENS
            mixed += not (asked and f"of {index}" in chat.decode(step.response_ids) and whole)
    return lost, mixed


def memory_growth(server: GatewayServer, sampler: ScriptedSampler, num_sessions: int) -> float:
    """MB that the process grows by over so many sessions of one step, after as many tenths of them to warm up."""
    server.resume(SamplerLoop(sampler))
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}

    async def play(count: int) -> None:
        async with httpx.AsyncClient(base_url=server.origin, timeout=60) as http:
            for _ in range(count):
                session, key = await at_gateway(server, server.gateway.open_session(make_spec()))
                headers = {"authorization": f"Bearer {key}"}
                (await http.post("/v1/chat/completions", json=body, headers=headers)).raise_for_status()
                (await http.post("/sessions/current/finish", json={"reward": 1.0}, headers=headers)).raise_for_status()
                await at_gateway(server, server.gateway.collect(session, keep=False))

    asyncio.run(play(num_sessions // 10))
    gc.collect()
    before = resident_mb()
    asyncio.run(play(num_sessions))
    gc.collect()
    return resident_mb() - before


async def at_gateway(server: GatewayServer, coroutine: Any) -> Any:
    """In the gateway's own loop."""
    return await asyncio.wrap_future(server.submit(coroutine))


def time_of_turns(server: GatewayServer, sampler: ScriptedSampler, repeats: int) -> tuple[dict[str, float], float]:
    """Milliseconds of turn 1, 8 and 64 of a conversation, and how many new tokens turn 64 has over turn 2."""
    server.resume(SamplerLoop(sampler))
    times: dict[int, list[float]] = {1: [], 8: [], 64: []}
    ratios = []
    for _ in range(repeats):
        session, key = server.call(server.gateway.open_session(make_spec()))
        messages: list[Any] = [{"role": "user", "content": "session 0"}]
        with httpx.Client(base_url=server.origin, headers={"authorization": f"Bearer {key}"}) as http:
            for turn in range(1, 65):
                start = time.perf_counter()
                response = http.post("/v1/chat/completions", json={"model": "m", "messages": messages})
                elapsed = time.perf_counter() - start
                if turn in times:
                    times[turn].append(elapsed * 1000)
                messages += [response.json()["choices"][0]["message"], {"role": "user", "content": "and then?"}]
        ratios.append(len(session.steps[63].new_ids) / len(session.steps[1].new_ids))
        server.call(server.gateway.finish(session))
    return {str(turn): statistics.median(values) for turn, values in times.items()}, max(ratios)


def cpu_s() -> float:
    """Seconds of processor time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def resident_mb() -> float:
    """This process's memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(args: BenchmarkArguments) -> None:
    """Measure, print, write."""
    logging.getLogger("trl_steppo.gateway").setLevel(logging.ERROR)  # samplers fail here on purpose
    formats = ChatFormats(AutoTokenizer.from_pretrained(MINI_WIKI_POLICY))
    with (
        TemporaryDirectory() as directory,
        closing(GatewayServer(formats, store=Path(directory) / "sessions.sqlite")) as server,
    ):
        gc.collect()
        gc.freeze()  # as `trl-steppo gateway` does
        figures = measure(server.start(), formats.of(()), args)
    rows = [[name, json.dumps(value)] for name, value in figures.items()]
    print_table(f"{figures['sessions']} sessions of {figures['steps']} steps at once", ["figure", "value"], rows)
    write_record(args.json, figures)


def measure(server: GatewayServer, chat: ChatFormat, args: BenchmarkArguments) -> JsonObject:
    """All figures."""
    num_sessions, num_steps = (60, 3) if args.quick else (300, 5)
    num_finished, repeats = (500, 1) if args.quick else (10_000, 5)
    direct_s = asyncio.run(sample_directly(ScriptedSampler(chat), chat, num_sessions, num_steps))
    server.resume(SamplerLoop(ScriptedSampler(chat)))
    calm = play_through(server, num_sessions, num_steps, trouble=False)
    troubled_sampler = ScriptedSampler(chat, failures=0.02, seed=args.seed)
    server.resume(SamplerLoop(troubled_sampler))
    troubled = play_through(server, num_sessions, num_steps, trouble=True)
    wrong = [count_wrong(chat, seen["episodes"], seen["said"]) for seen in (calm, troubled)]
    at_once = ScriptedSampler(chat, token_s=0.0)
    turn_ms, new_tokens_ratio = time_of_turns(server, at_once, repeats)
    growth = memory_growth(server, at_once, num_finished)
    return {
        "throughput_over_direct": direct_s / calm["seconds"],
        "lost_steps": sum(lost for lost, _ in wrong),
        "mixed_steps": sum(mixed for _, mixed in wrong),
        "cpu_ms_per_request": calm["cpu_s"] * 1000 / (num_sessions * num_steps),
        "client_cpu_ms_per_request": calm["client_cpu_s"] * 1000 / (num_sessions * num_steps),
        "memory_growth_mb": growth,
        "turn_ms": turn_ms,
        "new_tokens_turn_64_over_turn_2": new_tokens_ratio,
        "sessions": num_sessions,
        "steps": num_steps,
        "finished_sessions": num_finished,
        "hostile": measure_hostile(quick=args.quick),
    }


if __name__ == "__main__":
    main(parse_arguments(BenchmarkArguments))
