"""Rows -> scored episodes: the environment, the chat format, the sampler and the rewards of one run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..calls import DaemonThread, MainThreadNeededError, call_and_wait, error_text
from ..chat import ChatFormat
from ..environments.base import Playable
from ..environments.slots import Slots
from ..environments.tools import check_reset, make_playable
from ..episodes import EpisodeSpec
from ..errors import ConfigurationError, DataError
from ..inference.base import SamplingParams
from ..models import score_sequences
from ..numerics import Numerics
from ..rollout import (
    Agent,
    AgentPlayer,
    EnvironmentPlayer,
    EpisodeLimits,
    EpisodeRequest,
    MainThreadKinds,
    Player,
    Stage,
    check_agent,
    check_reward_funcs,
    checked_weights,
    fail_beyond_float32,
    fail_if_unpaid,
    make_in_main_thread,
    make_in_thread,
    own_row,
    pay_episodes,
    play_episodes,
    takes_environments,
)
from ..rollout.loops import run_coroutine
from ..types import Episode, StopReason, TokenIds
from .dataset_checks import ENVIRONMENT_COLUMN
from .engines import Engine
from .reward_models import RewardModel
from .steppo_config import StepPOConfig

if TYPE_CHECKING:
    from ..gateway import GatewayServer

RewardFunc = Callable[..., Any]
EnvironmentFactory = Callable[[], Any]

_EVAL_EPISODES = 256  # of an evaluation at a time, whose dataset may be large
_CLOSING_S = 5.0  # at the end of the process, for environments that nothing was played in


class EpisodePlayer:
    """
    Plays and scores episodes.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template where rows have `prompt`.
        engine ([`Engine`]):
            Has the sampler that continues prompts.
        columns (`Sequence[str]`):
            The dataset's columns: rows have `prompt` or `input_ids`.
        eval_columns (`Sequence[Sequence[str]]`, *optional*):
            Those of each dataset that is evaluated on.
        environment_factory (`Callable[[], Any]` or `dict[str, Callable[[], Any]]`, *optional*):
            Makes one environment. A dict: each row's column `environment` names its factory.
        tools (`Sequence[Callable]`, *optional*):
            Tools shared by all episodes.
        reward_funcs (`Sequence[Callable]`, *optional*):
            Score finished episodes, as in `GRPOTrainer`.
        reward_model (`torch.nn.Module`, *optional*):
            A sequence classifier with one label that scores the last prompt and response, at the last token.
        numerics ([`~numerics.Numerics`], *optional*):
            The precision of the reward model's forward passes; `None`: that of its weights.
        data_collator (`Callable[[list[dict]], dict]`, *optional*):
            Makes `input_ids` of rows, as `PPOTrainer`'s.
        example_row (`dict`, *optional*):
            What `data_collator` is tried on.
        agent (`Callable`, `str` or `Sequence[str]`, *optional*):
            Plays the rows instead, through a gateway ([`~rollout.agent`]).
        context (`int`, *optional*):
            Most tokens of a prompt with its response that the policy can read; `None`: no bound is known.
        end_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a response to `prompt` beside those of the chat template, as the model's generation
            configuration names them.

    Raises:
        ConfigurationError, DataError: If these do not fit together; every mistake that can be seen before the first
            episode is seen here.
    """

    def __init__(
        self,
        args: StepPOConfig,
        tokenizer: Any,
        engine: Engine,
        *,
        columns: Sequence[str],
        eval_columns: Sequence[Sequence[str]] = (),
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        reward_funcs: Sequence[RewardFunc] | None = None,
        reward_model: PreTrainedModel | None = None,
        numerics: Numerics | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        example_row: Mapping[str, Any] | None = None,
        agent: Agent | None = None,
        context: int | None = None,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self.args = args
        self._end_token_ids = tuple(end_token_ids)
        self.tokenizer = tokenizer
        self.engine = engine
        self._update_episodes = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._factories = factories_of(environment_factory)
        self._chooses = isinstance(environment_factory, Mapping)
        self.tools = list(tools or ())
        self.reward_funcs = list(reward_funcs or ())
        self.reward_model = reward_model
        self.numerics = numerics
        self.data_collator = data_collator
        self.agent = agent
        self._model_context = context
        check_context(args, context, "the model's context")
        self._server: GatewayServer | None = None
        self._tool_slots = _slots(args.max_concurrent_tool_calls)
        # One rollout bounds itself.
        self._episode_slots = _slots(args.max_concurrent_episodes) if args.max_staleness else None
        if agent is not None:
            self._check_agent()
        if data_collator is not None:
            collated = self._collated([EpisodeRequest(example_row or {}, 0)])[0].row
            made = [name for name in collated if name not in (example_row or {})]
            columns, eval_columns = [*columns, *made], [[*names, *made] for names in eval_columns]
        checked_weights(self.reward_funcs, args.reward_weights)
        has_input_ids = agent is None and _check_columns(columns, is_optional=environment_factory is not None)
        for names in (columns, *eval_columns):
            self._check_environment_column(names)
            check_reward_funcs(self.reward_funcs, names, has_environments=bool(self._factories))
        self._stages: list[Stage] = []  # on which nothing is played now
        self._period: object | None = None  # in which environments are kept: a run, or an evaluation outside of one
        # Environments that `pay_rewards` shows, by the episode.
        self._played_in: dict[str, tuple[Stage, Playable | None]] = {}
        self._staging = threading.Lock()
        self._main_thread_kinds = MainThreadKinds()
        self._examples: dict[str | None, Any] = {}  # environments that nothing was played in yet
        weakref.finalize(self, _close_unplayed, self._examples)
        self._make_examples([columns, *eval_columns])
        examples = self._examples or {None: self._playable(None)}
        self._chats = {
            name: self._chat_for(example, has_input_ids=has_input_ids) for name, example in examples.items()
        }
        stop_token_ids = _stop_token_ids(args, tokenizer)
        self.ends_turns = not has_input_ids and not stop_token_ids  # responses stop at the template's end of turn
        self.sampling = SamplingParams(
            max_new_tokens=args.response_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            stop_token_ids=stop_token_ids,
        )

    @property
    def has_environments(self) -> bool:
        """Whether there is an `environment_factory`."""
        return bool(self._factories)

    @property
    def environment_names(self) -> list[str] | None:
        """What rows choose their environment by; `None` where there is nothing to choose."""
        return [str(name) for name in self._factories] if self._chooses else None

    @property
    def episodes_at_once(self) -> int | None:
        """Most episodes of an evaluation that are played before they are scored; `None`: all."""
        return max(_EVAL_EPISODES, self._update_episodes) if self._shows_environments else None

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt with its response: what the model can read, or its servers take if that is less."""
        known = (self._model_context, getattr(self.engine.sampler, "context", None))
        return min((length for length in known if length is not None), default=None)

    @property
    def limits(self) -> EpisodeLimits:
        """
        The budgets of an episode. A state has room for a whole response behind it.

        Raises:
            ConfigurationError: If the settings do not fit into what the servers take, which is known when they run.
        """
        args, context = self.args, self.context
        check_context(args, context, "the context of the policy's servers (`--max-model-len`)")
        longest = args.max_prompt_length
        if longest is None and context is not None:
            longest = context - args.response_length
        return EpisodeLimits(
            max_interaction_steps=args.max_interaction_steps,
            max_prompt_length=longest,
            max_episode_tokens=args.max_episode_tokens,
            max_episode_s=args.max_episode_s,
        )

    def prepare(self, requests: Sequence[EpisodeRequest]) -> list[EpisodeRequest]:
        """Requests as [`play`] takes them: with the `input_ids` that `data_collator` makes, if there is one."""
        return self._collated(requests) if self.data_collator is not None and requests else list(requests)

    def play(
        self,
        requests: Sequence[EpisodeRequest],
        *,
        greedy: bool = False,
        update: int | None = None,
        id_prefix: str = "",
        on_episode: Callable[[], None] | None = None,
    ) -> list[Episode]:
        """
        Play the requested episodes, which [`pay_rewards`] then pays. May be called from any thread, and by several.

        Args:
            requests (`Sequence[EpisodeRequest]`):
                Of [`prepare`]: rows, with their positions in the data stream.
            greedy (`bool`, *optional*, defaults to `False`):
                Whether to take the most likely tokens, as evaluation does.
            update (`int`, *optional*):
                Which update they are for. Its episodes' ids begin with it, and those that an agent has played already,
                before this process, are taken from the gateway's store. `None`: for none.
            id_prefix (`str`, *optional*):
                Put before each episode's id instead.
            on_episode (`Callable`, *optional*):
                Called whenever an episode has ended.

        Returns:
            `list[Episode]`: One for each request, in order; failed ones have an `error`.
        """
        if not requests:
            return []
        sampling = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0) if greedy else self.sampling
        spec = EpisodeSpec(self.limits, sampling, run_seed=self.args.seed)
        prefix = id_prefix if update is None else _prefix(update)
        if self.agent is None:
            with self._staged() as stage:
                played = self._play_all(requests, self._environment_player(stage, spec, prefix), on_episode)
                self._remember_environments(stage, played)
        else:
            with self._serving() as server:
                if update is not None and update > self.args.max_staleness:
                    server.store.forget(_prefix(update - self.args.max_staleness - 1))  # which is trained
                player = self._agent_player(server, spec, prefix, resumes=update is not None)
                played = self._play_all(requests, player, on_episode)
        return [_readable(episode, self.context) for episode in played]

    def _play_all(
        self, requests: Sequence[EpisodeRequest], player: Player, on_episode: Callable[[], None] | None
    ) -> list[Episode]:
        return play_episodes(
            requests,
            player,
            max_concurrent_episodes=self.args.max_concurrent_episodes or max(_EVAL_EPISODES, self._update_episodes),
            slots=self._episode_slots,
            on_episode=on_episode,
        )

    def _environment_player(self, stage: Stage, spec: EpisodeSpec, id_prefix: str) -> EnvironmentPlayer:
        return EnvironmentPlayer(
            stage,
            self.engine.sampler,
            spec,
            self.chat_of,
            make_timeout_s=self.args.tool_timeout_s,
            id_prefix=id_prefix,
            holds=self._shows_environments,
        )

    def _remember_environments(self, stage: Stage, played: Sequence[Episode]) -> None:
        """Keep the environments that reward functions see, each for its episode."""
        if self._shows_environments:
            for name in [episode.episode_id for episode in played if episode.valid]:
                self._played_in[name] = stage, stage.held(name)

    def _agent_player(self, server: GatewayServer, spec: EpisodeSpec, id_prefix: str, *, resumes: bool) -> AgentPlayer:
        assert self.agent is not None
        return AgentPlayer(
            self.agent,
            server,
            self.engine.sampler,
            spec,
            idle_s=self.args.tool_timeout_s,
            id_prefix=id_prefix,
            needs_reward=not self.reward_funcs and self.reward_model is None,
            resumes=resumes,
            overlaps=self.args.max_staleness > 0,
        )

    @contextmanager
    def running(self, *, resumed_at: int | None) -> Iterator[None]:
        """
        Around a run. Its environments are made once and closed at its end. Where an agent plays, one gateway serves it
        from beginning to end, and keeps its episodes on the disk. Outside a run, each [`play`] has a gateway of its
        own, and environments of its own unless they are kept ([`keeping_environments`]).

        Args:
            resumed_at (`int`, *optional*):
                The update that the run goes on with; what agents played for other updates than those that may have
                been begun by then is forgotten. `None`: it is a new one.
        """
        if self.agent is None:
            with self.keeping_environments():
                yield
            return
        path = Path(str(self.args.output_dir)) / "gateway" / f"rank{self.args.process_index:03d}.sqlite"
        begun = [] if resumed_at is None else range(resumed_at, resumed_at + self.args.max_staleness + 1)
        with self._serving(path) as server:
            server.store.keep_finished(*map(_prefix, begun)).result()
            yield

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.tokenizer.decode(list(ids))

    def _collated(self, requests: Sequence[EpisodeRequest]) -> list[EpisodeRequest]:
        """Rows with the `input_ids` that `data_collator` makes of them, all at once, as `PPOTrainer` calls it."""
        assert self.data_collator is not None
        rows = [own_row(request.row) for request in requests]
        try:
            batch: Mapping[str, Any] = call_and_wait(self.data_collator, (rows,), {}, run_coroutine)
        except Exception as error:
            raise DataError(f"`data_collator` failed: {type(error).__name__}: {error_text(error)}") from error
        if "input_ids" not in batch or len(batch["input_ids"]) != len(requests):
            raise ConfigurationError(
                f"`data_collator` made {list(batch)} of {len(requests)} rows; it must give `input_ids`, one for each. "
                "Rows with `prompt` need no collator"
            )
        pad = self.tokenizer.pad_token_id
        masks = (
            batch["attention_mask"]
            if "attention_mask" in batch
            else [[i != pad for i in ids] for ids in batch["input_ids"]]
        )
        collated = []
        for request, ids, mask in zip(requests, batch["input_ids"], masks, strict=True):
            kept = [int(token_id) for token_id, counts in zip(ids, mask, strict=True) if counts]
            collated.append(replace(request, row={**request.row, "input_ids": kept}))
        return collated

    @contextmanager
    def _serving(self, store: Path | None = None) -> Iterator[GatewayServer]:
        """This rank's gateway, on a free port: the one that serves already, or else one for as long as the block."""
        if self._server is not None:
            yield self._server
            return
        from ..gateway import GatewayServer
        from ..gateway.tokens import ChatFormats

        template_kwargs: Any = self.args.chat_template_kwargs
        formats = ChatFormats(self.tokenizer, chat_template_kwargs=template_kwargs, end_token_ids=self._end_token_ids)
        # The agents of another process are gone, so none of its sessions goes on.
        with closing(GatewayServer(formats, store=store, restores=False, context=self.context)) as self._server:
            try:
                yield self._server.start()
            finally:
                self._server = None

    def _check_agent(self) -> None:
        from ..gateway import GatewayServer  # noqa: F401  (told now if its packages are missing)

        check_agent(self.agent)
        given = {"environment_factory": self._factories, "tools": self.tools, "data_collator": self.data_collator}
        for name, value in given.items():
            if value:
                raise ConfigurationError(
                    f"`agent` and `{name}` are both given; an agent brings its own tools and makes its own prompts: "
                    "leave one of them out"
                )

    def chat_of(self, row: Mapping[str, Any]) -> ChatFormat | None:
        """The format of a row's episodes, with the tools of its environment; `None` where none is needed."""
        return self._chats[self._kind_of(row)]

    def _chat_for(self, example: Playable, *, has_input_ids: bool) -> ChatFormat | None:
        has_environment = bool(self._factories)
        has_turns = self.agent is not None or has_environment or bool(self.tools)
        if has_input_ids and not example.tools and not has_environment:
            return None
        return ChatFormat(
            self.tokenizer,
            tools=example.tools or None,
            chat_template_kwargs=self.args.chat_template_kwargs,  # type: ignore[arg-type]
            multi_turn=not has_input_ids and has_turns and self.args.max_interaction_steps != 1,
            end_token_ids=self._end_token_ids,
        )

    # -- environments -------------------------------------------------------------------------------------------------

    @property
    def _shows_environments(self) -> bool:
        """Whether reward functions see environments: where one takes them, by the name or as `**kwargs`."""
        funcs = [func for func in self.reward_funcs if not isinstance(func, RewardModel)]
        return bool(self._factories) and any(takes_environments(func) for func in funcs)

    @contextmanager
    def keeping_environments(self) -> Iterator[None]:
        """
        Within the block, rollouts use environments again that earlier ones have made; at its end all are closed. There
        is one such block at a time: one within another does nothing.
        """
        if self._period is not None:
            yield
            return
        self._period = object()
        try:
            yield
        finally:
            with self._staging:
                self._period = None
                self._played_in.clear()
                stages, self._stages = self._stages, []
            for stage in stages:
                stage.close()

    @contextmanager
    def _staged(self) -> Iterator[Stage]:
        """Where to play a rollout: what earlier ones of the run have left, or else new. Several may play at once."""
        with self._staging:
            period = self._period
            stage = next((stage for stage in self._stages if stage.fits_here), None)
            if stage is not None:
                self._stages.remove(stage)
        if stage is None:
            stage = self._new_stage()
        try:
            yield stage
        except BaseException:
            self._close_stage(stage)
            raise
        with self._staging:
            is_over = period is not None and period is not self._period
            if period is not None and not is_over:
                self._stages.append(stage)
                return
        if is_over or not self._is_shown(stage):  # nobody scores what was played in a run that is over
            self._close_stage(stage)

    def _is_shown(self, stage: Stage) -> bool:
        """Whether reward functions are still to see environments of it."""
        return any(one is stage for one, _ in list(self._played_in.values()))

    def _close_stage(self, stage: Stage) -> None:
        with self._staging:
            for name in [name for name, (one, _) in self._played_in.items() if one is stage]:
                del self._played_in[name]
        stage.close()

    def _new_stage(self) -> Stage:
        stage = Stage(
            self._make_playable,
            kind_of=self._kind_of,
            reuses=self.args.reuse_environments,
            close_timeout_s=self.args.max_episode_s,
            main_thread_kinds=self._main_thread_kinds,
        )
        with self._staging:
            examples = dict(self._examples)
            self._examples.clear()
        for kind, example in examples.items():
            stage.put(kind, example)
        return stage

    def _kind_of(self, row: Mapping[str, Any]) -> str | None:
        """Which environment plays a row; `None` where there is one kind only."""
        if not self._chooses:
            return None
        name = row.get(ENVIRONMENT_COLUMN)
        if not isinstance(name, str) or name not in self._factories:
            raise DataError(
                f"the row's `{ENVIRONMENT_COLUMN}` is {name!r:.100}, which is none of the environments of "
                f"`environment_factory`: {', '.join(map(repr, self._factories))}"
            )
        return name

    def _make_playable(self, row: Mapping[str, Any]) -> Playable | None:
        if self._factories:
            return self._new_playable(self._kind_of(row))
        return self._playable(None) if self.tools else None  # one step, which `reward_funcs` judge

    def _new_playable(self, kind: str | None) -> Playable:
        return self._playable(call_and_wait(self._factories[kind], (), {}, run_coroutine))

    def _make_examples(self, columns: Sequence[Sequence[str]]) -> None:
        """One environment of each kind, to see what it has, in the thread that it is to play in."""
        for name in self._factories:
            example = self._examples[name] = self._example(name)
            for names in columns:
                check_reset(example.environment, [one for one in names if one not in self._hidden_columns])
        self._check_reward_source([example.environment for example in self._examples.values()])

    def _example(self, name: str | None) -> Any:
        make = partial(self._new_playable, name)
        try:
            try:
                return run_coroutine(make_in_thread(make, DaemonThread("environment"), None))
            except MainThreadNeededError as error:
                self._main_thread_kinds.add(name, error)
                return run_coroutine(make_in_main_thread(make))
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"`{_shown(name)}()` failed: {type(error).__name__}: {error_text(error)}; it is called without "
                "arguments and returns one environment"
            ) from error

    @property
    def _hidden_columns(self) -> tuple[str, ...]:
        return (ENVIRONMENT_COLUMN,) if self._chooses else ()

    def _check_environment_column(self, columns: Sequence[str]) -> None:
        if self._chooses and ENVIRONMENT_COLUMN not in columns:
            raise DataError(
                f"the dataset has the columns {list(columns)}; `environment_factory` is a dict, so each row needs a "
                f"column `{ENVIRONMENT_COLUMN}` with one of its names: {', '.join(map(repr, self._factories))}"
            )

    def _playable(self, environment: Any) -> Playable:
        return make_playable(
            environment,
            self.tools,
            tool_timeout_s=self.args.tool_timeout_s,
            max_tool_calls=self.args.max_tool_calls,
            slots=self._tool_slots,
            hidden_columns=self._hidden_columns,
            # Each is a call to another thread. Recorded episodes may be trained on with `gigpo` later.
            reads_state_keys=self.args.estimator.compares_states or self.args.dump_episodes_dir is not None,
        )

    @property
    def reward_models(self) -> list[nn.Module]:
        """The models that pay rewards: `reward_model`, and those among the reward functions."""
        judges = [func.model for func in self.reward_funcs if isinstance(func, RewardModel)]
        return [*([] if self.reward_model is None else [self.reward_model]), *judges]

    def pay_rewards(
        self,
        requests: Sequence[EpisodeRequest],
        episodes: list[Episode],
        *,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], Any] = lambda name, value: None,
    ) -> list[Episode]:
        """
        Add what reward functions and the reward model pay to the last steps of episodes that did not fail. Those that
        nothing has paid fail, and those whose rewards together cannot be computed with in float32.

        Args:
            requests (`Sequence[EpisodeRequest]`), episodes (`list[Episode]`):
                What was played, and what came of it.
            trainer_state (`TrainerState`, *optional*):
                Passed to reward functions.
            log_metric (`Callable[[str, float], Any]`, *optional*):
                Called with what reward functions log for a mean.
        """
        if self.reward_funcs:
            names = [episode.episode_id for episode in episodes]
            played_in = {name: self._played_in.pop(name) for name in names if name in self._played_in}
            try:
                episodes = pay_episodes(
                    self.reward_funcs,
                    self.args.reward_weights,
                    episodes,
                    [request.row for request in requests],
                    chat=self.chat_of,
                    decode=None if any(chat is not None for chat in self._chats.values()) else self.decode,
                    extra={"trainer_state": trainer_state},
                    environments=[played_in[name][1] if name in played_in else None for name in names]
                    if played_in
                    else None,
                    log_metric=log_metric,
                )
            finally:
                for stage in {stage for stage, _ in played_in.values()}:
                    stage.release([name for name, (one, _) in played_in.items() if one is stage])
                    if self._period is None and not self._is_shown(stage):  # it was played outside of a run
                        stage.close()
        if self.reward_model is not None:
            valid = [index for index, episode in enumerate(episodes) if episode.valid]
            last = [episodes[index].steps[-1] for index in valid]
            sequences = [[*step.prompt_ids, *step.response_ids] for step in last]
            scores = score_sequences(
                self.reward_model,
                sequences,
                batch_size=self.args.local_rollout_forward_batch_size,
                numerics=self.numerics,
            )
            for index, score in zip(valid, scores, strict=True):
                episodes[index] = replace(episodes[index].paid(score), needs_reward=False)
        episodes = [fail_if_unpaid(episode) for episode in episodes]
        if self.args.missing_eos_penalty is not None:
            episodes = [self._penalize_missing_eos(episode) for episode in episodes]
        return [fail_beyond_float32(episode) for episode in episodes]

    def _penalize_missing_eos(self, episode: Episode) -> Episode:
        """The last response of an episode should end by itself: with the end of its turn, or else with EOS."""
        if not episode.valid or (self.ends_turns and episode.steps[-1].stop_reason is StopReason.STOP):
            return episode
        if self.tokenizer.eos_token_id in episode.steps[-1].response_ids:
            return episode
        assert self.args.missing_eos_penalty is not None
        return episode.paid(-self.args.missing_eos_penalty)

    def _check_reward_source(self, environments: Sequence[Any]) -> None:
        if self.agent is not None:
            return  # whether it pays shows when it has played
        names = ("step", "step_reward", "get_reward")
        pays = any(callable(getattr(environment, name, None)) for environment in environments for name in names)
        if not (pays or self.reward_funcs or self.reward_model is not None):
            raise ConfigurationError(
                "nothing pays a reward: pass `reward_funcs` or `reward_model`, or an `environment_factory` whose "
                "environment defines `get_reward()`, `step_reward()` or `step(response)`"
            )


def check_context(args: StepPOConfig, context: int | None, what: str) -> None:
    """
    Find out whether the budgets of a step fit into a context.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        context (`int`, *optional*):
            Most tokens of a prompt with its response; `None`: no bound is known.
        what (`str`):
            Whose context it is.

    Raises:
        ConfigurationError: If no prompt has room beside a response, or a longest one has not.
    """
    if context is None:
        return
    if args.response_length >= context:
        raise ConfigurationError(
            f"`response_length` is {args.response_length}, and {what} has {context} tokens for a prompt and its "
            "response; set `response_length` to less"
        )
    if args.max_prompt_length is not None and args.max_prompt_length + args.response_length > context:
        raise ConfigurationError(
            f"`max_prompt_length`={args.max_prompt_length} and `response_length`={args.response_length} are more than "
            f"{what}, {context} tokens; set `max_prompt_length` to {context - args.response_length} or less, or leave "
            "it out, which means that"
        )


def _readable(episode: Episode, context: int | None) -> Episode:
    """
    An episode whose final state a critic can read: one that is longer than the context ends with the last response
    instead, without what was observed behind it.
    """
    final = episode.final_prompt_ids
    if context is None or final is None or len(final) <= context:
        return episode
    last = episode.steps[-1]
    return replace(episode, final_prompt_ids=TokenIds([*last.prompt_ids, *last.response_ids]))


def _slots(limit: int | None) -> Slots | None:
    return None if limit is None else Slots(limit)


def _prefix(update: int) -> str:
    """What the ids of an update's episodes begin with."""
    return f"{update}/"


def _check_columns(columns: Sequence[str], *, is_optional: bool) -> bool:
    """Whether rows are token ids; raises where they are neither those nor prompts, unless that `is_optional`."""
    if "input_ids" in columns:
        return True
    if "prompt" in columns or is_optional:
        return False
    raise DataError(
        f"the dataset has the columns {list(columns)}; a row needs `prompt` (text or messages), or `input_ids`, "
        "unless an `environment_factory` makes environments whose `reset` returns the prompt"
    )


def factories_of(environment_factory: Any) -> dict[str | None, EnvironmentFactory]:
    """
    The factories by the name that rows choose them by; a single one has none.

    Raises:
        ConfigurationError: If there is something else among them, or a name that no row can have.
    """
    if environment_factory is None:
        return {}
    factories: dict[str | None, EnvironmentFactory] = {None: environment_factory}
    if isinstance(environment_factory, Mapping):
        factories = dict(environment_factory)
        if not factories or not all(isinstance(name, str) for name in factories):
            raise ConfigurationError(
                f"`environment_factory` is a dict with the names {list(factories)}; give at least one, each of them "
                f"text, as the dataset's column `{ENVIRONMENT_COLUMN}` has it"
            )
    for name, factory in factories.items():
        if not callable(factory):
            raise ConfigurationError(
                f"`{_shown(name)}` is a {type(factory).__name__}; pass a class or a function without arguments that "
                "returns one environment, or a dict of them"
            )
    return factories


def _shown(name: str | None) -> str:
    return "environment_factory" if name is None else f"environment_factory[{name!r}]"


def _close_unplayed(examples: dict[str | None, Any]) -> None:
    """
    Close environments of a trainer that has not played with them, and that is gone. At the end of the process their
    threads end with it, so it waits for them.
    """
    closing_now = []
    for example in examples.values():
        with suppress(MainThreadNeededError):
            closing_now.append(example.close_unplayed(run_coroutine))
    if not threading.main_thread().is_alive():
        wait(closing_now, timeout=_CLOSING_S)


def _stop_token_ids(args: StepPOConfig, tokenizer: Any) -> tuple[int, ...]:
    """Explicit stop tokens; without any, rows with `prompt` stop at the chat template's end of turn."""
    if args.stop_token_id is not None:
        return (args.stop_token_id,)
    if args.stop_token == "eos":
        if tokenizer.eos_token_id is None:
            raise ConfigurationError(
                "`stop_token` is 'eos', but the tokenizer has no `eos_token`; set `stop_token_id`"
            )
        return (tokenizer.eos_token_id,)
    return ()
