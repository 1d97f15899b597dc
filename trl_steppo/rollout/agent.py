"""Plays rows with an agent that we do not control: it speaks the OpenAI or Anthropic API to a gateway.

An agent is one of

- a function, plain or async: `agent(row, *, base_url, api_key) -> float | None`. What it returns is the episode's
  reward, added to its last step; `None`: it has posted its rewards, or reward functions judge.
- a command, as text or a list: a process for each episode, which reads the row from its standard input, as JSON, and
  finds the address and its key in the environment (`OPENAI_BASE_URL`, `OPENAI_API_KEY`, `ANTHROPIC_BASE_URL`,
  `ANTHROPIC_API_KEY`, `STEPPO_SESSION_URL`), which is the trainer's without the variables of its launcher. If the last
  line that it writes to its standard output is a number, that is the reward.

Each runs in a thread or a process of its own: one that raises, dies or hangs costs its own episode. A process ends
with its episode, and with the trainer, whatever ended that: it and all that it started get SIGTERM, and 2 s later
SIGKILL; see [`keeper`].
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import shlex
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..calls import DaemonThread, is_lazy, look_at
from ..environments.slots import Slots
from ..errors import ConfigurationError, SamplerError
from ..finite import as_reward
from ..gateway.sampling import Engine
from ..gateway.sessions import Session, SessionSpec
from ..inference.base import Sampler, SamplingParams
from ..keeper import SIGKILL_AFTER_S, Keeper
from ..types import Episode, EpisodeLimits
from .episode import describe
from .loops import run_coroutine
from .pacing import InFlight
from .play import EpisodeRequest, play_concurrently

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # starlette and uvicorn come with the extra `gateway`
    from ..gateway import Gateway, GatewayServer

Agent = Callable[..., Any] | str | Sequence[str]
T = TypeVar("T")

_STDERR_SHOWN = 2_000  # characters of what a failed process wrote
_LOOKS_S = 0.25  # between looks whether an agent hangs
_ENDING_S = 60.0  # that an agent whose episode is over may still take where it may be idle as long as it likes
_TAIL_BYTES = 2**16  # of each of a process's streams that are kept
_READS_OUT_S = 1.0  # for what a process that has ended wrote last
_DIES_S = SIGKILL_AFTER_S + 2.0  # for a process and all that it started, from the moment when it is told to end

# What torchrun, accelerate, DeepSpeed and MPI tell their own processes.
_LAUNCHER_VARIABLES = frozenset(
    [
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "LOCAL_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ]
)
_LAUNCHER_PREFIXES = (
    *("ACCELERATE_", "TORCHELASTIC_", "PET_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "DEEPSPEED_"),
    *("DS_ACCELERATOR", "DS_BUILD_", "DS_ENV_FILE", "DS_SKIP_"),  # not all of `DS_`: an agent's own keys begin so, too
    *("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_"),
)


def check_agent(agent: Any) -> None:
    """Raises a `ConfigurationError` for anything that is no agent, and for a command that cannot be run here."""
    if isinstance(agent, str | list | tuple) and all(isinstance(word, str) for word in agent):
        _check_command(agent)
        return
    if not callable(agent):
        raise ConfigurationError(
            f"`agent` is {agent!r:.100}; pass a function `agent(row, *, base_url, api_key)`, or a command to run"
        )
    if is_lazy(agent):
        raise ConfigurationError(
            f"`agent` is the generator function `{getattr(agent, '__name__', agent)}`, which does nothing when it is "
            "called; return its reward instead of yielding"
        )
    try:
        inspect.signature(agent).bind({}, base_url="", api_key="")
    except TypeError as error:
        raise ConfigurationError(
            f"`agent` cannot be called as agent(row, base_url=..., api_key=...): {error}; take these arguments"
        ) from error
    except ValueError:  # a callable without a signature is tried
        return


def _check_command(command: str | Sequence[str]) -> None:
    try:
        words = command_words(command)
    except ValueError as error:
        raise ConfigurationError(
            f"`agent` is the command {command!r:.200}, which cannot be split into words: {error}; close the quote, or "
            "pass a list of words"
        ) from error
    if not words or not words[0].strip():
        raise ConfigurationError(
            f"`agent` is the command {command!r:.200}, which names no program; pass one, with its arguments"
        )
    if shutil.which(words[0]) is None:
        raise ConfigurationError(
            f"`agent` is the command {command!r:.200}, but there is no program {words[0]!r} that could be run from "
            f"{os.getcwd()}; give its path, make it executable, or put it on PATH"
        )


def command_words(command: str | Sequence[str]) -> list[str]:
    """A command's program and arguments. Raises a `ValueError` for text with an open quote."""
    return shlex.split(command) if isinstance(command, str) else list(command)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """
    An environment without what a launcher told its own process.

    An agent is none of the trainer's ranks: if it uses torch, accelerate or transformers itself, it must neither take
    itself for one nor wait for the others. Devices, threads and everything else stay as they are.

    Args:
        environment (`Mapping[str, str]`):
            Names and values, as in `os.environ`.
    """
    return {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def play_agents(
    requests: Sequence[EpisodeRequest],
    agent: Agent,
    server: GatewayServer,
    sampler: Sampler,
    *,
    limits: EpisodeLimits,
    sampling: SamplingParams,
    run_seed: int,
    max_concurrent_episodes: int | None = None,
    slots: Slots | None = None,
    grace_s: float = 0.25,
    idle_s: float | None = 60.0,
    id_prefix: str = "",
    needs_reward: bool = True,
    resumes: bool = False,
    overlaps: bool = False,
    on_episode: Callable[[], None] | None = None,
) -> list[Episode]:
    """
    Play all requested episodes, each by an agent and in a session of its own, and wait for them.

    Args:
        requests (`Sequence[EpisodeRequest]`):
            What to play.
        agent (`Callable`, `str` or `Sequence[str]`):
            Who plays; see the module.
        server ([`~gateway.GatewayServer`]):
            A started gateway; it is given `sampler` for as long as this takes, and is paused afterwards, unless
            `overlaps`.
        sampler ([`Sampler`]):
            The policy.
        limits, sampling, run_seed, max_concurrent_episodes, slots, grace_s, id_prefix, on_episode:
            See [`play_episodes`].
        idle_s (`float`, *optional*, defaults to `60.0`):
            How long an agent may ask for nothing; one that takes longer is given up. `None`: as long as it likes.
        needs_reward (`bool`, *optional*, defaults to `True`):
            Whether an agent that neither returns nor posts a reward has failed.
        resumes (`bool`, *optional*, defaults to `False`):
            Whether episodes are kept in the gateway's store, and those of the same names that it holds are taken from
            there: whole ones without an error, which were played within the same limits, sampling and seed.
        overlaps (`bool`, *optional*, defaults to `False`):
            Whether other rollouts, with the same sampler, are played at the same time: one that can be called from any
            event loop, and takes new weights by itself.

    Returns:
        `list[Episode]`: in the order of the requests.

    Raises:
        SamplerError: The sampler failed for good, or again and again, and the agent could not do without.
    """
    in_flight = InFlight(grace_s=grace_s)
    rollout = _AgentRollout(agent, server, limits, sampling, run_seed, idle_s, id_prefix, needs_reward, resumes)

    async def play() -> list[Episode]:
        server.resume(Engine(sampler) if overlaps else Engine(sampler, asyncio.get_running_loop(), in_flight))
        try:
            return await play_concurrently(
                requests,
                rollout.play_one,
                sampler,
                in_flight,
                max_concurrent_episodes=max_concurrent_episodes,
                slots=slots,
                on_episode=on_episode,
            )
        finally:
            if not overlaps:
                await asyncio.wrap_future(server.submit(server.gateway.port.pause()))

    return run_coroutine(play())


@dataclass(frozen=True)
class _AgentRollout:
    agent: Agent
    server: GatewayServer
    limits: EpisodeLimits
    sampling: SamplingParams
    run_seed: int
    idle_s: float | None
    id_prefix: str
    needs_reward: bool
    resumes: bool

    @property
    def gateway(self) -> Gateway:
        return self.server.gateway

    async def play_one(self, request: EpisodeRequest) -> Episode:
        name = f"{self.id_prefix}{request.stream_position}-{request.generation_index}"
        spec = SessionSpec(
            self.limits,
            self.sampling,
            run_seed=self.run_seed,
            stream_position=request.stream_position,
            generation_index=request.generation_index,
            dataset_row=request.dataset_row,
        )
        found = self.gateway.finished_episode(name, spec) if self.resumes else None
        if found is not None:
            return found
        session, key = await self._at_gateway(self.gateway.open_session(spec, name=name))
        run = _FunctionRun(self.agent) if callable(self.agent) else _ProcessRun(self.agent)
        task = asyncio.ensure_future(run.start(request.row, self.server, session.session_id, key))
        task.add_done_callback(look_at)
        try:
            ending = await self._watch(task, session, key)
            # Before the agent is cancelled: a request that it gives up as it dies is no longer known here.
            await self._at_gateway(self.gateway.finish(session, **ending))
        finally:
            await run.end()
            task.cancel()
        episode = await self._at_gateway(self.gateway.collect(session, keep=self.resumes))
        if not episode.valid and session.sampler_error is not None:
            raise SamplerError(f"episode {name}: {episode.error}") from session.sampler_error
        return episode

    async def _watch(self, task: asyncio.Future[Any], session: Session, key: str) -> dict[str, Any]:
        """Wait for the agent, as long as it may take; how its session is to be finished."""
        while True:
            remaining = None if self.limits.max_episode_s is None else self.limits.max_episode_s - session.age_s()
            looks_s = _LOOKS_S if remaining is None else max(0.0, min(_LOOKS_S, remaining))
            await asyncio.wait({task}, timeout=looks_s)
            is_over = session.is_over or session.ended_early
            if task.done():
                error = task.exception()
                if error is None:
                    return self._judge(session, task.result())
                # A budget that is used up reaches an agent as an error, which it may well not catch.
                return {} if is_over else {"error": describe(error, "the agent").replace(key, "[key]")}
            if remaining is not None and remaining <= 0:
                return {"out_of_time": True}
            patience_s = _ENDING_S if is_over and self.idle_s is None else self.idle_s
            if patience_s is not None and self.gateway.is_idle(session, patience_s):
                if is_over:  # it had the time to judge itself and to clean up
                    return {}
                return {"error": f"the agent asked for nothing in {patience_s:g} s, and was given up"}

    def _judge(self, session: Session, reward: _Reward) -> dict[str, Any]:
        if isinstance(reward, Exception):
            return {"error": f"{reward}; a reward is a finite number, or None"}
        if reward is None:
            has_reward = bool(session.notes.rewards) or session.is_over or session.ended_early
            missing = self.needs_reward and not has_reward
            return {"error": "the agent neither returned nor posted a reward"} if missing else {}
        return {"reward": reward}

    async def _at_gateway(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self.server.submit(coroutine))


_Reward = float | TypeError | ValueError | None


def _reward(value: Any) -> _Reward:
    """What an agent gave as its reward, or what is wrong with it. Runs the value's code: `__float__`, `__repr__`."""
    try:
        return as_reward(value, "what the agent returned")
    except (TypeError, ValueError) as error:
        return error


class _FunctionRun:
    """An agent in a thread, with an event loop of its own if it is async."""

    def __init__(self, agent: Callable[..., Any]) -> None:
        self._agent = agent
        self._thread = DaemonThread("agent")
        self._cancel: Callable[[], None] | None = None

    async def start(self, row: Mapping[str, Any], server: GatewayServer, session_id: str, key: str) -> _Reward:
        def run() -> _Reward:
            result = self._agent(row, base_url=server.base_url, api_key=key)
            return _reward(self._run_async(result) if inspect.isawaitable(result) else result)

        return await self._thread.run(run, None, "the agent")

    async def end(self) -> None:
        """Let go of it: an async one is cancelled; a thread that hangs is left behind, its key worth nothing."""
        if self._cancel is not None:
            self._cancel()
        self._thread.end()

    def _run_async(self, awaitable: Awaitable[Any]) -> Any:
        async def run() -> Any:
            task = asyncio.ensure_future(awaitable)
            loop = asyncio.get_running_loop()

            def cancel() -> None:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(task.cancel)

            self._cancel = cancel
            return await task

        try:
            return asyncio.run(run())
        finally:
            self._cancel = None


class _Output(asyncio.SubprocessProtocol):
    """What a process writes: the ends of it, however much there is; and when it has ended, whoever holds its pipes."""

    def __init__(self) -> None:
        self.tails = {1: bytearray(), 2: bytearray()}
        self.ended = asyncio.Event()
        self.closed = {1: asyncio.Event(), 2: asyncio.Event()}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        tail = self.tails[fd]
        tail += data
        del tail[:-_TAIL_BYTES]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd in self.closed:
            self.closed[fd].set()

    def process_exited(self) -> None:
        self.ended.set()

    def text(self, fd: int) -> str:
        """The end of a stream."""
        return self.tails[fd].decode(errors="replace")


class _ProcessRun:
    """An agent in a process, which ends with all that it started, and with this process."""

    def __init__(self, command: str | Sequence[str]) -> None:
        self._words = command_words(command)
        self._keeper: Keeper | None = None
        self._process: asyncio.SubprocessTransport | None = None
        self.output = _Output()

    async def start(self, row: Mapping[str, Any], server: GatewayServer, session_id: str, key: str) -> _Reward:
        environment = {
            **without_launcher(os.environ),
            "OPENAI_BASE_URL": server.base_url,
            "OPENAI_API_KEY": key,
            "ANTHROPIC_BASE_URL": server.origin,
            "ANTHROPIC_API_KEY": key,
            "STEPPO_SESSION_URL": f"{server.origin}/sessions/{session_id}",
        }
        self._keeper = Keeper(self._words)
        with self._keeper.starting() as descriptor:
            self._process, _ = await asyncio.get_running_loop().subprocess_exec(
                lambda: self.output,
                *self._keeper.command,
                env=environment,
                start_new_session=True,
                pass_fds=[descriptor],
            )
        its_input: Any = self._process.get_pipe_transport(0)
        its_input.write(json.dumps(row, default=repr).encode())
        its_input.close()  # when all is written
        await self.output.ended.wait()
        await self._read_out()
        code = self._process.get_returncode()
        if code:
            tail = self.output.text(2).replace(key, "[key]")[-_STDERR_SHOWN:].strip()
            raise RuntimeError(f"exit status {code}: {tail}")
        return _reward(_last_number(self.output.text(1)))

    async def _read_out(self) -> None:
        """What is still in the pipes, which a child that lives on may keep open."""
        both = asyncio.gather(*(closed.wait() for closed in self.output.closed.values()))
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(both, _READS_OUT_S)

    async def end(self) -> None:
        """End it and all that it started."""
        if self._keeper is not None:
            self._keeper.end()  # before anything that may be cancelled
        if self._process is None:
            return
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self.output.ended.wait(), _DIES_S)
        self._process.close()


def _last_number(text: str) -> float | None:
    """The number on the last line that says anything, if there is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return float(lines[-1]) if lines else None
    except ValueError:
        return None
