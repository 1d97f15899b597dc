"""PPOTrainer: plays episodes, assigns credit, updates policy and critic."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import random
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import IterableDataset
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, ProgressCallback, Trainer, TrainerCallback, TrainerState

from ..batching import LayoutName, num_unique_tokens
from ..compat.accelerate import find_fsdp, is_fsdp2
from ..compat.transformers import (
    ExportableState,
    SaveStrategy,
    TrainOutput,
    attention_of,
    enable_checkpointing,
    load_callback_states,
    load_generators,
    load_scaler,
    note_best,
    push_checkpoint,
    save_policy,
    save_scaler_and_generators,
    source_of,
    speed_metrics,
)
from ..compat.trl import ppo_bases
from ..durable import Lock, LockedError
from ..errors import CheckpointError, ConfigurationError, DataError, RolloutError
from ..inference.base import Sampler, vocabulary_size
from ..learning.estimators import reference_kl, token_penalties
from ..learning.learner import Learner
from ..learning.metrics import Clock, Means
from ..learning.ranks import gather_objects, summed, together
from ..learning.update import Credit, Rollout, Scores
from ..models import (
    AdapterReference,
    Critic,
    PolicyScorer,
    adapter_changes_model,
    add_adapter,
    agrees_on_tries,
    as_reference,
    build_critic,
    context_length,
    critic_adapter,
    disable_dropout,
    end_token_ids,
    freeze_copy,
    gathered,
    is_peft_model,
    plain_model,
    register_attention,
    takes_tries,
    whole_state_dict,
)
from ..modes import modes_kept
from ..rollout import Agent, Ahead, EpisodeRequest, dump_episodes, episode_file, load_episodes, within_float32
from ..stopping import StopRequestedError, is_requested, listening
from ..types import Episode, StopReason
from .callbacks import StepPOProgressCallback, close_progress_bars, print_episodes
from .checkpoints import (
    Manifest,
    Progress,
    check_whole,
    find_checkpoint,
    load_weights,
    newest_checkpoint,
    read_manifest,
    reading,
    rotate,
    shapes,
    written_whole,
)
from .checks import (
    check_adapters,
    check_apart,
    check_kinds,
    check_models,
    check_saved,
    check_trainable,
    refuse_unsupported,
    warn_of_waiting,
)
from .data_stream import check_same_order, checksum, column_names, first_rows, make_rows, numbered_rows
from .dataset_checks import check_dataset, check_eval_dataset, check_length, check_no_dataset
from .description import describe_task
from .distribution import Distribution, check_distribution
from .engines import Engine, check_engine, counts_of, make_engine
from .episode_log import EpisodeLog
from .loading import Loader
from .metrics import add_age_metrics, add_correction_metrics, add_episode_metrics, beside
from .model_card import model_card
from .networks import (
    DeepSpeedNetwork,
    SavedNetwork,
    build_networks,
    build_reference,
    hold_in_float32,
    innermost,
)
from .player import EpisodePlayer, factories_of
from .ppo_config import PPOConfig
from .reward_models import RewardFuncs, RewardModel, load_reward_funcs
from .steppo_config import StepPOConfig

if TYPE_CHECKING:
    _Base = Trainer
else:
    _, _Base = ppo_bases()

logger = transformers.utils.logging.get_logger(__name__)

SETTINGS_FILE = "steppo_config.json"
LOCK_FILE = "_run.lock"  # `Trainer` uploads nothing that begins so
_NUM_SHOWN = 3  # episodes of a printed table
_BUDGETS_BY_DEFAULT = (StopReason.MAX_INTERACTION_STEPS, StopReason.MAX_PROMPT_LENGTH)
"""Those that cut episodes unless told otherwise."""


class PPOTrainer(_Base):
    """
    Trainer for token-level PPO ([Proximal Policy Optimization Algorithms](https://huggingface.co/papers/1707.06347)).

    It takes the arguments of the `PPOTrainer` that TRL had until 1.12, with the same names in the same order, and
    makes the same updates. With such a TRL it is a subclass of that class; with a later one, of
    [`~transformers.Trainer`]. [`StepPOTrainer`], its subclass, plays episodes of several steps.

    Args:
        args ([`PPOConfig`]):
            The run's settings; TRL's own class is taken, too.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer; with a chat template where rows have `prompt`.
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `str`):
            The policy, a causal language model. It and the other models may be names, of the hub or of directories.
        ref_model ([`~transformers.PreTrainedModel`] or `None`):
            The reference of the KL penalty. If `None` and `kl_coef` is not 0, the policy as it is given.
        reward_model ([`~transformers.PreTrainedModel`]):
            A sequence classifier with one label, which scores prompt and response.
        train_dataset ([`~datasets.Dataset`]):
            Rows with `input_ids`, or with `prompt` (text or messages).
        value_model ([`~transformers.PreTrainedModel`] or `None`):
            The critic: a sequence classifier with one label. If `None`, it is built from the policy's weights, with a
            value head that starts at zero.
        data_collator (`Callable`, *optional*):
            Makes `input_ids` of the rows of an update; its padding is taken away again.
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*):
            Rows to evaluate on, greedily.
        optimizers (`tuple` of [`~torch.optim.Optimizer`] and a scheduler, *optional*):
            One optimizer over the parameters of `model` and `value_model`, and the schedule of its learning rates over
            updates. If `None`, each network has an optimizer of its own, as `TrainingArguments` choose it.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks beside the default ones.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter to put on the policy, e.g. a `LoraConfig`.

    Raises:
        ConfigurationError, DataError: If arguments or settings do not fit together; the message names them and the
            cure.

    Example:
    ```python
    from trl_steppo import PPOConfig, PPOTrainer

    trainer = PPOTrainer(
        args=PPOConfig(output_dir="runs/ppo"),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        train_dataset=dataset,
        value_model=value_model,
    )
    trainer.train()
    ```
    """

    _reference_adapter: str | None  # which of the policy's adapters the reference is
    _copied_adapter: str | None  # the one that was made for it

    _tag_names = ["trl", "ppo"]  # noqa: RUF012  (as TRL's trainers declare it)
    _name = "PPO"
    _paper = {  # noqa: RUF012
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017ppo,
                title  = {{Proximal Policy Optimization Algorithms}},
                author = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year   = 2017,
                eprint = {arXiv:1707.06347}
            }"""),
    }

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Any,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        reward_model: nn.Module,
        train_dataset: Any,
        value_model: PreTrainedModel | None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        if isinstance(args, StepPOConfig):
            raise ConfigurationError(
                "`args` is a StepPOConfig, which `StepPOTrainer` takes; `PPOTrainer` takes a PPOConfig"
            )
        if reward_model is None:
            raise ConfigurationError(
                "`reward_model` is None; pass a sequence classifier with one label, or use `StepPOTrainer`, whose "
                "environments and `reward_funcs` pay rewards, too"
            )
        self._set_up(
            StepPOConfig.of(args),
            processing_class,
            model,
            ref_model,
            reward_model,
            train_dataset,
            value_model,
            data_collator,
            eval_dataset,
            optimizers,
            callbacks,
            peft_config,
        )

    def _set_up(
        self,
        args: StepPOConfig,
        processing_class: Any,
        model: Any,
        ref_model: Any,
        reward_model: Any,
        train_dataset: Any,
        value_model: Any,
        data_collator: Any,
        eval_dataset: Any,
        optimizers: tuple[Any, Any],
        callbacks: list[TrainerCallback] | None,
        peft_config: Any,
        *,
        environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        reward_funcs: RewardFuncs | None = None,
        reward_processing_classes: Any = None,
        agent: Agent | None = None,
        engine: Engine | None = None,
    ) -> None:
        """All arguments of both trainers, checked and put together."""
        refuse_unsupported(args)
        check_engine(args, engine)
        check_kinds(
            processing_class=processing_class,
            model=model,
            ref_model=ref_model,
            value_model=value_model,
            reward_model=reward_model,
        )
        if isinstance(processing_class, ProcessorMixin):
            raise ConfigurationError(
                f"`processing_class` is a {type(processing_class).__name__}: images and other media are not "
                "supported; pass its tokenizer, `processing_class.tokenizer`"
            )
        names = [name for name in factories_of(environment_factory) if name is not None]
        if train_dataset is None:
            check_no_dataset(environment_factory)
        check_length(args, train_dataset)
        loader = Loader(args.model_init_kwargs, seed=args.seed)  # type: ignore[arg-type]  # JSON is read by now
        model, ref_model = loader.model("model", model), loader.model("ref_model", ref_model)
        value_model = loader.model("value_model", value_model)
        reward_model = loader.model("reward_model", reward_model)
        processing_class = loader.tokenizer("processing_class", processing_class, model)
        funcs = load_reward_funcs(
            reward_funcs,
            reward_processing_classes,
            loader,
            chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
            batch_size=args.local_rollout_forward_batch_size,
        )
        loader.check_used()
        check_models(args, model, ref_model, value_model, reward_model)
        if peft_config is not None:
            transformers.set_seed(args.seed)  # a new adapter starts at random
            model = add_adapter(model, peft_config, name=args.model_adapter_name or "default")
        check_adapters(args, model, ref_model, value_model)
        if args.model_adapter_name is not None:
            model.set_adapter(args.model_adapter_name)
        check_trainable(model, "model")
        known: dict[str, Any] = {
            "vocabulary_size": vocabulary_size(model),
            "is_for_agent": agent is not None,
            "environments": names or None,
            "may_lack_prompt": environment_factory is not None,
        }
        if train_dataset is not None:
            check_dataset(train_dataset, "train_dataset", **known)
        check_eval_dataset(eval_dataset, **known)
        assert args.device is not None  # sets the process group up
        args.world_size = PartialState().num_processes  # a field of `PPOConfig`, which DeepSpeed's set-up reads
        Trainer.__init__(
            self,
            model=model,
            args=args,
            train_dataset=train_dataset
            if isinstance(train_dataset, Sized)
            else None,  # it asks others for `max_steps`
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.args: StepPOConfig = args
        self.train_dataset = train_dataset
        find_fsdp(self.accelerator)
        check_distribution(args, Distribution.from_accelerator(self.accelerator), optimizers)
        warn_of_waiting(args, self.accelerator)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StepPOProgressCallback)
        self.rows = make_rows(train_dataset, seed=args.seed if args.data_seed is None else args.data_seed)
        check_same_order(self.rows.order, "train_dataset")
        self._derive_sizes()
        self._judges = [func for func in funcs if isinstance(func, RewardModel)]
        for judge in self._judges:
            judge.check_prompt(self.rows.example.get("prompt"))
            _frozen(judge.model, self.accelerator.device)
        self.clock = Clock()
        self._build_learner(model, ref_model, value_model, optimizers, engine)
        self.player = EpisodePlayer(
            args,
            processing_class,
            self.engine,
            columns=self.rows.columns,
            eval_columns=[column_names(dataset) for dataset in _datasets(eval_dataset)],
            environment_factory=environment_factory,
            tools=tools,
            reward_funcs=funcs,
            reward_model=plain_model(_frozen(reward_model, self.accelerator.device)),
            numerics=self.learner.numerics,
            data_collator=data_collator,
            example_row=self.rows.example,
            agent=agent,
            context=_context(model, ref_model, value_model, reward_model),
            end_token_ids=end_token_ids(getattr(model, "generation_config", None)),
        )
        self.episode_log = EpisodeLog(args, self.learner, self.player.decode)
        self._described = describe_task(
            model=model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            environment_factory=environment_factory,
            tools=tools,
            reward_funcs=funcs,
            reward_model=reward_model,
            agent=agent,
        )
        self.progress = Progress(reference_adapter=self._copied_adapter)
        self._saved_step: int | None = None  # update of the newest checkpoint that holds this run
        self._first_failure: str | None = None  # of the run's updates that moved nothing
        self._told_of: set[StopReason] = set()  # budgets that have cut episodes
        self._steps_taken = self._steps_skipped = 0  # by the learner, before this update
        # Of Python, NumPy and torch, at the beginning of the update that is being made.
        self._generators: tuple[Any, Any, torch.Tensor] | None = None

    @property
    def sampler(self) -> Sampler:
        """What continues prompts: the engine's sampler."""
        return self.engine.sampler

    # -- the story ----------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train until `total_episodes` (or `max_steps` updates) are reached, or a callback stops the run.

        SIGTERM and SIGINT (Ctrl-C) stop the run, too: a rollout is broken off, while an update is finished; unless
        `save_strategy` is "no", a checkpoint is written; then the process ends, by `SystemExit` with the status 143 or
        by `KeyboardInterrupt`. What was broken off is played again by a run that resumes. A second signal ends the
        process at once.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's directory to go on from, or `True` for the newest in `output_dir`. The run ends as it
                would have without the interruption.
            trial, ignore_keys_for_eval:
                As in `Trainer`, for its hyperparameter search; not used.

        Returns:
            `TrainOutput`: Number of updates; mean of `loss/policy_avg` as logged; how long it took.

        Raises:
            ConfigurationError: If another run, of this machine or of one that shares the file system, trains in the
                same `output_dir`.
            RolloutError: If `max_failed_updates` updates in a row have no valid episode; at the end, if not one update
                of the run has moved any weights.
            CheckpointError: If a checkpoint cannot be written; if the one to resume from is missing, damaged, or of
                another run.
        """
        if self.state.global_step > 0 and not resume_from_checkpoint:
            raise ConfigurationError("`train()` was called before, and its schedules have ended; make a new trainer")
        with listening(), self._alone(), self._as_before(), _short_collections(self.accelerator.device):
            self._set_out(resume_from_checkpoint or None)
            self._train()
        losses = [logs["loss/policy_avg"] for logs in self.state.log_history if "loss/policy_avg" in logs]
        mean_loss = sum(losses) / len(losses) if losses else float("nan")
        return TrainOutput(self.state.global_step, mean_loss, self._runtime())

    def _train(self) -> None:
        """All updates that are left, and all that is around them."""
        with (
            self.learner.numerics.between_passes(),
            self.player.running(resumed_at=None if self._resumed_from is None else self.state.global_step),
            closing(self.ahead),  # when the sampler is closed, which ends what is still being played
            self.engine.running(self.state.global_step),
            self._saving_when_stopped(),
            self._running(),
        ):
            while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
                self._heed_requests_to_stop()
                with self._update():
                    episodes = self._roll_out()
                    rollout = self._collate(episodes)
                    if rollout is None:
                        self._skip(episodes)
                        continue
                    scores = self._score(rollout)
                    credit = self._assign_credit(rollout, scores)
                    with self.episode_log.around(self.state.global_step + 1, episodes, rollout, scores, credit):
                        self._learn(rollout, scores, credit)
            self._heed_requests_to_stop()  # during the last update, too, which nothing else may save
        self._refuse_to_have_learned_nothing()

    def _roll_out(self) -> list[Episode]:
        """Play (or read back) this update's episodes on this rank."""
        update, rank, args = self.state.global_step, self.accelerator.process_index, self.args
        with self.clock.measure("rollout_s"):
            if args.replay_episodes_dir is not None:
                found = together(partial(load_episodes, episode_file(args.replay_episodes_dir, update, rank)))
                episodes = [within_float32(episode) for episode in found]
            elif args.max_staleness:
                together(partial(self.ahead.begin, update, self.state.max_steps))
                episodes = self._judge(self._logged, *together(partial(self.ahead.take, update)))
            else:
                episodes = self._judge(self._logged, *together(lambda: self._rollout(update)(), self._generating()))
            if args.dump_episodes_dir is not None:
                together(partial(dump_episodes, episode_file(args.dump_episodes_dir, update, rank), episodes))
        if self._shows_samples() and self.eval_dataset is None and self.accelerator.is_main_process:
            print_episodes(episodes[:_NUM_SHOWN], self.player.decode, f"episodes sampled in update {update + 1}")
        return episodes

    def _rollout(self, update: int) -> Callable[[], tuple[list[EpisodeRequest], list[Episode]]]:
        """What plays the episodes of an update on this rank, and does not need this thread any more."""
        requests = self.player.prepare(self._requests(update))
        play = partial(self.player.play, requests, update=update)
        return lambda: (requests, play())

    def _judge(self, logged: Means, requests: Sequence[EpisodeRequest], episodes: list[Episode]) -> list[Episode]:
        """With the rewards of reward functions and the reward model; `logged` gets the metrics of the functions."""
        score = partial(self.player.score, requests, episodes, trainer_state=self.state, log_metric=logged.add)
        return together(score, self._scoring())  # a judge may take as long as an episode, or fail on one rank

    def _collate(self, episodes: Sequence[Episode]) -> Rollout | None:
        """Lay out the valid episodes; `None` where no rank has one."""
        add_episode_metrics(self._means, episodes, eos_token_id=self.player.tokenizer.eos_token_id)
        valid = [episode for episode in episodes if episode.valid]
        self._logs["perf/unique_tokens"] = num_unique_tokens(valid)
        errors = Counter(str(episode.error) for episode in episodes if not episode.valid)
        for error, count in errors.most_common(3):
            logger.warning(f"update {self.state.global_step + 1}: {count} of {len(episodes)} episodes failed: {error}")
        cut = [sum(episode.stop_reason is reason for episode in episodes) for reason in _BUDGETS_BY_DEFAULT]
        counts = torch.tensor([float(len(valid)), *map(float, cut)], device=self.accelerator.device)
        num_valid, *cut = map(int, summed(counts).tolist())
        self._tell_of_cut(dict(zip(_BUDGETS_BY_DEFAULT, cut, strict=True)))
        if not num_valid:
            return None
        self.progress.failed_updates = 0
        return self.learner.prepare(valid)

    def _tell_of_cut(self, num_cut: dict[StopReason, int]) -> None:
        """Warn, once for each, of episodes that end at a budget that nobody set."""
        cures = {
            StopReason.MAX_INTERACTION_STEPS: f"`max_interaction_steps` = {self.args.max_interaction_steps}. Raise it "
            "if your episodes need more steps",
            StopReason.MAX_PROMPT_LENGTH: "what the model's context leaves beside `response_length`. Set "
            "`max_interaction_steps`, `max_prompt_length` or `max_episode_tokens` if they should end before",
        }
        for reason in [reason for reason, number in num_cut.items() if number and reason not in self._told_of]:
            self._told_of.add(reason)
            is_set = reason is StopReason.MAX_PROMPT_LENGTH and self.args.max_prompt_length is not None
            if self.accelerator.is_main_process and not is_set:
                logger.warning(
                    f"update {self.state.global_step + 1}: {num_cut[reason]} episodes were cut at {cures[reason]} "
                    "(told once)"
                )

    def _skip(self, episodes: Sequence[Episode]) -> None:
        """An update without a valid episode: nothing is learned. Too many of them end the run."""
        self.episode_log.failed(self.state.global_step + 1, episodes)
        self.progress.failed_updates += 1
        error = next((episode.error for episode in episodes if not episode.valid), "on another rank")
        self._note_failure(f"it had no valid episode: {error}")
        if self.progress.failed_updates >= self.args.max_failed_updates:
            raise RolloutError(
                f"{self.progress.failed_updates} updates in a row had no valid episode (`max_failed_updates`); the "
                f"last error was: {error}"
            )
        self.learner.end_update()

    def _score(self, rollout: Rollout) -> Scores:
        """Log-probabilities and values under the weights before the update."""
        with self.clock.measure("forward_s"):
            scores = self.learner.evaluate(rollout)
        args = self.args
        add_age_metrics(self._means, rollout.batch, version=self.state.global_step, max_staleness=args.max_staleness)
        differs = args.max_staleness > 0 or args.use_vllm or args.correction != "none"
        if differs and scores.old_logprobs is not None:
            add_correction_metrics(
                self._means,
                rollout.batch,
                scores.old_logprobs,
                level=args.rollout_correction_level,
                cap=args.rollout_correction_cap,
            )
        return scores

    def _assign_credit(self, rollout: Rollout, scores: Scores) -> Credit:
        """Rewards and values to advantages and returns."""
        args, batch = self.args, rollout.batch
        kl, penalties = reference_kl(args, rollout, scores), token_penalties(args, rollout, scores)
        if kl is not None:
            self._means.add("objective/kl", kl.sum(), batch.num_episodes)
        self._means.add("objective/non_score_reward", penalties.sum(), batch.num_episodes)
        self._means.add("objective/rlhf_reward", batch.rewards.sum() + penalties.sum(), batch.num_episodes)
        credit = args.estimator.assign(args, rollout, scores, summed)
        self._logs.update(credit.explained_variance)
        return credit

    def _learn(self, rollout: Rollout, scores: Scores, credit: Credit) -> None:
        """Update the networks."""
        update = self.state.global_step
        with self.clock.measure("train_s"):
            stats = self.learner.update(
                rollout,
                scores,
                credit,
                seed=self.args.seed * 1_000_003 + update,
                train_policy=update >= self.args.critic_warmup_updates,
            )
        self._means.merge(stats)
        if self.learner.steps_taken > self._steps_taken:
            self.progress.learned_updates += 1
        elif self.learner.steps_skipped > self._steps_skipped:
            self._note_failure("its loss or gradient was not a finite number, so that no step was taken")
        else:
            self._note_failure("its episodes had nothing to learn from (all of them are masked)")
        self._steps_taken, self._steps_skipped = self.learner.steps_taken, self.learner.steps_skipped

    def _note_failure(self, what: str) -> None:
        """Why an update moved nothing; of the run's first one."""
        if self._first_failure is None:
            self._first_failure = f"update {self.state.global_step + 1}: {what}"

    def _refuse_to_have_learned_nothing(self) -> None:
        """A run whose every update failed must not look like one that has trained."""
        num_updates = self.state.global_step - self._first_step
        if num_updates and not self.progress.learned_updates:
            raise RolloutError(
                f"none of the run's {self.state.global_step} updates has moved any weights, so the policy is the one "
                f"that it began with; the first failure was in {self._first_failure}"
            )

    # -- evaluation and saving ----------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Play every row of the evaluation dataset once, greedily, and log what came out as `eval_*`.

        Args:
            eval_dataset (`Dataset` or `dict` of them, *optional*):
                Instead of the trainer's own.
            ignore_keys (`list[str]`, *optional*):
                Metrics to leave out.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Put before every name.

        Returns:
            `dict[str, float]`: Means over the episodes that did not fail.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise DataError("there is no `eval_dataset` to evaluate on")
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if not any(
            dataset is part for part in _datasets(self.eval_dataset)
        ):  # which were looked at when the trainer was made
            size, is_for_agent = vocabulary_size(plain_model(self.model)), self.player.agent is not None
            names, has_environments = self.player.environment_names, self.player.has_environments
            known: dict[str, Any] = {"environments": names, "may_lack_prompt": has_environments}
            check_eval_dataset(dataset, vocabulary_size=size, is_for_agent=is_for_agent, **known)
        start = time.perf_counter()
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        if num_ranks > 1 and isinstance(dataset, IterableDataset):
            check_same_order(checksum(first_rows(dataset)), "eval_dataset")
        rows = numbered_rows(dataset, first=rank, every=num_ranks)
        requests = [EpisodeRequest(row, index, dataset_row=index) for index, row in rows]
        num_rows = sum(gather_objects([len(requests)]))
        if num_rows == 0:  # on every rank
            raise DataError("`eval_dataset` has no rows")
        means, logged = Means(), Means()
        episodes = self._play_greedily(requests, "eval/", logged)
        add_episode_metrics(means, episodes)
        runtime = time.perf_counter() - start
        shown = {name: value for name, value in means.reduced().items() if name != "objective/scores"}
        short = {name.removeprefix("env/").removeprefix("rollout/"): value for name, value in shown.items()}
        short |= {"runtime": runtime, "samples_per_second": num_rows / runtime}
        short |= beside(logged.reduced(), short)
        result = {f"{metric_key_prefix}_{k}": v for k, v in short.items() if k not in (ignore_keys or ())}
        self.log(result)
        self.progress.last_eval_step = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result

    def generate_completions(self, sampling: bool = False) -> None:
        """
        Print a table of episodes played greedily on the evaluation dataset.

        Args:
            sampling (`bool`, *optional*, defaults to `False`):
                Whether a few are enough; else all rows are played.
        """
        dataset: Any = self.eval_dataset
        if dataset is None:
            return
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        plays = self.accelerator.is_main_process
        rows = islice(numbered_rows(dataset), _NUM_SHOWN if sampling else None) if plays else ()
        requests = [EpisodeRequest(row, index, dataset_row=index) for index, row in rows]
        episodes = self._play_greedily(requests, "shown/")
        if self.accelerator.is_main_process:
            print_episodes(episodes, self.player.decode, "episodes played greedily")

    def _play_greedily(
        self, requests: Sequence[EpisodeRequest], id_prefix: str, logged: Means | None = None
    ) -> list[Episode]:
        def play(part: Sequence[EpisodeRequest]) -> tuple[Sequence[EpisodeRequest], list[Episode]]:
            prepared = self.player.prepare(part)
            return prepared, self.player.play(
                prepared, greedy=True, id_prefix=id_prefix, on_episode=lambda: self._event("on_prediction_step")
            )

        most = max(gather_objects([len(requests)]))
        size = self.player.episodes_at_once or max(most, 1)
        episodes: list[Episode] = []
        with self.player.keeping_environments():
            for start in range(0, most, size):  # on every rank as often
                part = requests[start : start + size]
                episodes += self._judge(logged or Means(), *together(partial(play, part), self._generating()))
        return episodes

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Context of a rollout that is waited for. Collective: every rank must enter it, even with nothing to play."""
        # A run has started its engine; an evaluation outside of one starts it for itself.
        running = nullcontext() if self.is_in_train else self.engine.running(self.state.global_step)
        with running, self.engine.sampling():
            yield

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Around the forward passes of reward models; all ranks enter it."""
        models = [self.player.reward_model, *(judge.model for judge in self._judges)]
        with gathered([parameter for model in models if model is not None for parameter in model.parameters()]):
            yield

    def get_train_dataloader(self) -> Any:
        """Raises: rows are drawn from a seeded stream and played one by one (`self.rows`)."""
        raise ConfigurationError("there is no data loader: rows are played one by one; see `trainer.rows`")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Raises: evaluation plays the rows of `eval_dataset` one by one."""
        raise ConfigurationError("there is no data loader: rows are played one by one; see `trainer.eval_dataset`")

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """Raises: there are no labels to predict; `evaluate` plays any dataset."""
        raise ConfigurationError(
            f"there is nothing to predict; `evaluate(test_dataset, metric_key_prefix={metric_key_prefix!r})` plays it"
        )

    @contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """Within the block, a policy with adapters is the reference, as in `PPOTrainer`; another is left as it is."""
        with (
            as_reference(self.model, self.policy_adapter, self._reference_adapter)
            if self.policy_adapter is not None
            else nullcontext()
        ):
            yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the policy as a plain transformers model, and the critic beside it in `critic/`; of networks with
        adapters, the adapters.
        """
        output_dir = output_dir or str(self.args.output_dir)
        if self.value_model is not None:
            state = whole_state_dict(self.value_model, keep=self.args.should_save)
            if self.args.should_save:
                self.value_model.save_pretrained(os.path.join(output_dir, "critic"), state_dict=state)
        if not self._saves_together:
            Trainer.save_model(self, output_dir, _internal_call)
            return
        policy: Any = self.model
        state = whole_state_dict(policy, keep=self.args.should_save)
        if self.args.should_save:
            save_policy(self, output_dir, state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_merged_model(self, output_dir: str) -> None:
        """
        Save the policy with its adapter merged into its weights: a plain transformers model. The run can go on.

        Args:
            output_dir (`str`):
                Where to.
        """
        if self._saves_together:
            raise ConfigurationError(
                "adapters of networks in shards are merged afterwards, with peft: "
                "`AutoPeftModelForCausalLM.from_pretrained(output_dir).merge_and_unload()`"
            )
        if not self.args.should_save:
            return
        # Of a copy: merging and taking apart again would leave rounding errors behind.
        model: Any = copy.deepcopy(self.model)
        (model.merge_and_unload() if is_peft_model(model) else model).save_pretrained(output_dir)
        self.player.tokenizer.save_pretrained(output_dir)

    def create_model_card(  # type: ignore[override]  # the arguments that TRL's trainers have
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the README of the saved model into `output_dir`.

        Args:
            model_name (`str`, *optional*):
                The model's name. `None`: that of `output_dir`.
            dataset_name (`str`, *optional*):
                The dataset on the Hub that it was trained on.
            tags (`str` or `list[str]`, *optional*):
                Tags beside the trainer's own.
        """
        if not self.is_world_process_zero():
            return
        output_dir = Path(str(self.args.output_dir))
        source = source_of(plain_model(self.model).config)
        card = model_card(
            name=model_name or output_dir.name,
            base_model=source if source and not os.path.isdir(source) else None,
            dataset=dataset_name,
            tags=[*({tags} if isinstance(tags, str) else tags or ()), *self._tag_names],
            method=self._name,
            paper=self._paper,
        )
        card.save(output_dir / "README.md")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _saves_together(self) -> bool:
        """Whether what one rank writes takes all of them."""
        return self.is_deepspeed_enabled or is_fsdp2(self.accelerator)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All that `train(resume_from_checkpoint=...)` needs; see [`checkpoints`]."""
        output_dir, state = Path(str(self.args.output_dir)), self.state
        self.create_model_card(model_name=(self.hub_model_id or output_dir.name).split("/")[-1])
        directory = output_dir / f"checkpoint-{state.global_step}"
        best = output_dir / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best == directory or best.is_dir()):
            state.best_model_checkpoint = str(best)
        manifest = Manifest(self._identity(), self.progress)
        with written_whole(
            directory,
            manifest,
            is_writer=self.args.should_save,
            gather=gather_objects,
            writes_together=self._saves_together,
        ) as partial:
            self._write_checkpoint(partial)
        self._saved_step = state.global_step
        if self.args.push_to_hub:
            if self.args.should_save:  # what `Trainer` does not know of
                for folder in (path for path in directory.iterdir() if path.is_dir()):
                    shutil.copytree(folder, output_dir / folder.name, dirs_exist_ok=True)
            push_checkpoint(self, str(directory))
        if self.args.should_save:
            keep = {directory.name, Path(state.best_model_checkpoint or "").name}
            rotate(output_dir, self.args.save_total_limit, keep=keep)

    def _write_checkpoint(self, directory: Path) -> None:
        self.save_model(str(directory), _internal_call=True)
        if not self.args.save_only_model:
            for folder, network in self._network_folders(directory):
                network.save_state(folder, is_writer=self.args.should_save)
            save_scaler_and_generators(self, str(directory))
        if self.args.should_save:
            states: dict[str, Any] = {}
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    states.setdefault(type(callback).__name__, []).append(callback.state())
            self.state.stateful_callbacks = {n: s[0] if len(s) == 1 else s for n, s in states.items()}  # type: ignore[assignment]
            self.state.save_to_json(str(directory / "trainer_state.json"))

    def _resume(self, resume_from_checkpoint: str | bool) -> None:
        """Everything as it was when the checkpoint was written; the random generators come last, in `_running`."""
        directory = find_checkpoint(Path(str(self.args.output_dir)), resume_from_checkpoint)
        identity, reads_all = self._identity(), self.accelerator.is_local_main_process
        manifest = together(lambda: read_manifest(directory, identity, reads_all=reads_all))
        if not (directory / "scheduler.pt").is_file():
            raise CheckpointError(
                f"{directory} holds no optimizer (`save_only_model`), so the run cannot go on from it; pass its model "
                "as `model` to start a new one"
            )
        if not self.is_deepspeed_enabled:  # whose shards hold the weights, too
            self._load_networks(directory)
        for folder, network in self._network_folders(directory):
            network.load_state(folder)
        with reading(directory, "scaler.pt"):
            load_scaler(self, str(directory))
        self.progress = manifest.progress
        self._resume_reference(directory, self.progress.reference_adapter)
        with reading(directory, "trainer_state.json"):
            self.state = TrainerState.load_from_json(str(directory / "trainer_state.json"))
            load_callback_states(self)
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self._resumed_from: Path | None = directory
        self._saved_step = self.state.global_step
        logger.info(f"going on from {directory}, after update {self.state.global_step}")

    def _load_networks(self, directory: Path) -> None:
        if self.is_deepspeed_enabled:
            for folder, network in self._network_folders(directory):
                assert isinstance(network, DeepSpeedNetwork)
                network.load_shards(folder)
        else:
            load_weights(self.model, directory)
            if self.value_model is not None:
                load_weights(self.value_model, directory / "critic")

    def _resume_reference(self, directory: Path, saved: str | None) -> None:
        """The reference that the run had where it was chosen by default, whatever adapter `model` was given with."""
        reference = self.learner.reference
        if not isinstance(reference, AdapterReference) or self.args.ref_adapter_name is not None:
            return
        if saved is not None and self._reference_adapter is None:
            raise CheckpointError(
                f"the reference of the run in {directory} is the adapter that it began with, and `model` has a new "
                "one; load that adapter, or the one in the checkpoint, as `PeftModel.from_pretrained(base, directory, "
                "is_trainable=True)`"
            )
        if saved is None:
            self._reference_adapter = reference.reference_adapter = None
        elif not self.is_deepspeed_enabled:  # whose shards hold it, too
            load_weights(self.model, directory, adapter=saved, into=self._copied_adapter)
        self.progress.reference_adapter = self._reference_adapter  # by its name in this run

    def _load_best_model(self) -> None:
        """The networks of the checkpoint with the best metric."""
        state = self.state
        if state.best_model_checkpoint is None or not Path(state.best_model_checkpoint).is_dir():
            logger.warning(
                f"`load_best_model_at_end` is set, but the best checkpoint ({state.best_model_checkpoint}) is not "
                "there; the networks stay as they are"
            )
            return
        logger.info(f"loading the best networks, of {state.best_model_checkpoint}: {state.best_metric}")
        directory, reads_all = Path(state.best_model_checkpoint), self.accelerator.is_local_main_process
        together(lambda: check_whole(directory, reads_all=reads_all))
        self._load_networks(directory)

    def _network_folders(self, directory: Path) -> list[tuple[Path, SavedNetwork]]:
        """Where each optimizer and schedule is kept; one that both networks share stands with the policy."""
        policy, critic = self._networks
        if critic is None or critic.optimizer is policy.optimizer:
            return [(directory, policy)]
        return [(directory, policy), (directory / "critic", critic)]

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint's run must have in common with this one."""
        networks = {"policy": self.model, "critic": self.value_model}
        return {
            "networks": {name: self._shapes(model) for name, model in networks.items() if model is not None},
            "train_dataset rows": self.rows.num_rows,
            "seed of the data": self.rows.seed,
            "order of the stream": self.rows.order,
            "optimizer": type(innermost(self.optimizer)).__name__,
            "ranks of the shards": self.accelerator.num_processes if self.is_deepspeed_enabled else None,
        }

    def _shapes(self, model: Any) -> dict[str, list[int]]:
        """Of a network's parameters, without those of a reference that was copied."""
        copied = self._copied_adapter
        return {name: shape for name, shape in shapes(model).items() if copied not in name.split(".")}

    # -- construction -------------------------------------------------------------------------------------------------

    def _derive_sizes(self) -> None:
        """The derived fields of `PPOConfig`, as `PPOTrainer` fills them in."""
        args, world = self.args, self.accelerator.num_processes
        args.world_size = world
        args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.micro_batch_size = args.per_device_train_batch_size * world
        args.batch_size = args.local_batch_size * world
        args.mini_batch_size = args.batch_size // args.num_mini_batches
        args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
        if args.max_steps > 0:
            args.num_total_batches = args.max_steps
        else:
            if args.total_episodes is None:
                assert self.rows.num_rows is not None  # or its length would have been asked for
                args.total_episodes = math.ceil(args.num_train_epochs * self.rows.num_rows * args.num_generations)
            args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
        if args.critic_warmup_updates >= args.num_total_batches and args.critic_warmup_updates > 0:
            raise ConfigurationError(
                f"`critic_warmup_updates`={args.critic_warmup_updates} leaves none of the {args.num_total_batches} "
                f"updates to the policy: `total_episodes`={args.total_episodes} at {args.batch_size} episodes an "
                "update; lower it, or raise `total_episodes`"
            )

    def _build_learner(
        self,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        value_model: PreTrainedModel | None,
        optimizers: tuple[Any, Any],
        engine: Engine | None,
    ) -> None:
        args = self.args
        register_attention()  # a model that was pickled after a run names it
        self.policy_adapter: str | None = model.active_adapter if is_peft_model(model) else None
        self.value_model: Any = None
        needs_copy = args.uses_reference and ref_model is None and self.policy_adapter is None
        self._reference_adapter = args.ref_adapter_name
        self._copied_adapter = None
        hold = partial(hold_in_float32, self.accelerator)
        with gathered(model.parameters()):
            if not is_fsdp2(self.accelerator):
                hold(model, "model")  # before it is copied: copies compute as it does
            if args.uses_reference and ref_model is None and self.policy_adapter is not None:
                self._reference_adapter = self._choose_reference(model, self.policy_adapter)
            if args.uses_critic:
                self.value_model = value_model if value_model is not None else self._build_critic(model)
            if needs_copy:
                ref_model = copy.deepcopy(model)
            needs_twin = engine is None and args.samples_in_worker
            twin = copy.deepcopy(plain_model(model)).cpu() if needs_twin else None
            if is_fsdp2(self.accelerator):
                hold(model, "model")  # all compute in the type that FSDP2 gives their layers
        if args.uses_critic:
            hold(self.value_model, "value_model")
            check_trainable(self.value_model, "value_model")
            check_apart(model, self.value_model)
            check_saved(self.value_model, "value_model")
        check_saved(model, "model")
        networks = [network for network in (model, self.value_model) if network is not None]
        for network in networks:
            disable_dropout(network)
            if args.gradient_checkpointing:
                enable_checkpointing(plain_model(network), args.gradient_checkpointing_kwargs)
        layout = self._layout([model, self.value_model, ref_model])
        scorer = PolicyScorer(plain_model(model))
        self.ref_model: Any = None
        reference: nn.Module | None = None
        if args.uses_reference and ref_model is None:
            assert self.policy_adapter is not None
            reference = AdapterReference(scorer, model, self.policy_adapter, self._reference_adapter)
        elif args.uses_reference:
            self.ref_model = _frozen(ref_model)
            reference = build_reference(self.accelerator, PolicyScorer(plain_model(self.ref_model)))
        policy, critic = build_networks(
            args,
            self.accelerator,
            scorer,
            Critic(plain_model(self.value_model)) if self.value_model is not None else None,
            optimizers=optimizers,
            decay_parameter_names=self.get_decay_parameter_names,
        )
        self._networks = policy, critic
        self.optimizer, self.lr_scheduler, self.model_wrapped = policy.optimizer, policy.scheduler, policy.module
        handler = self.callback_handler
        handler.optimizer, handler.lr_scheduler = self.optimizer, self.lr_scheduler
        self.learner = Learner(
            args,
            self.accelerator,
            policy,
            critic,
            reference,
            layout,
            self.clock,
            self._event,
        )
        # Last: what a model's attention can take is settled by now.
        self.engine = engine or make_engine(args, self.accelerator, policy=policy, model=model, twin=twin)

    def _choose_reference(self, model: Any, policy_adapter: str) -> str | None:
        """The adapter that is the reference; `None`: the base model without any, as for an adapter that is new."""
        if self.args.ref_adapter_name is not None or not adapter_changes_model(model):
            return self.args.ref_adapter_name
        name = self._copied_adapter = freeze_copy(model, policy_adapter)
        logger.warning(
            f"the adapter {policy_adapter!r} of `model` was trained before, so a frozen copy of it, {name!r}, is the "
            "reference of the KL terms; for the base model as the reference, add a new adapter and set "
            "`ref_adapter_name` to its name"
        )
        return name

    def _layout(self, models: Sequence[Any]) -> LayoutName:
        """The layout of rows that saves the most and that all networks can take."""
        if not self.args.prefix_sharing:
            return "rows"
        plain = [plain_model(model) for model in models if model is not None]
        for model in plain:
            if not takes_tries(model):
                logger.warning(
                    f"{type(model).__name__} with {attention_of(model.config)!r} attention cannot attend to a tree of "
                    "prefixes: only steps that continue one another will share a row"
                )
                return "chains"
        for model in plain:
            with gathered(model.parameters()):
                agrees = agrees_on_tries(model)
            if not agrees:
                logger.warning(
                    f"{type(model).__name__} computes other values for a tree of prefixes than for its rows with "
                    f"transformers {transformers.__version__}: only steps that continue one another will share a row; "
                    "take a version that the requirements name"
                )
                return "chains"
        return "trie"

    def _build_critic(self, model: PreTrainedModel) -> Any:
        critic = build_critic(model, share_weights=self.args.critic_shares_base)
        if self.policy_adapter is None:
            return critic
        return add_adapter(critic, critic_adapter(model.peft_config[self.policy_adapter]))

    # -- a run and its updates ----------------------------------------------------------------------------------------

    def _set_out(self, resume_from_checkpoint: str | bool | None) -> None:
        """The state of a run that begins, or goes on."""
        args = self.args
        assert args.num_total_batches is not None
        self.is_in_train = True
        self.state.epoch = 0.0
        self._resumed_from = None
        self._saved_step = self._first_failure = self._generators = None
        self._steps_taken, self._steps_skipped = self.learner.steps_taken, self.learner.steps_skipped
        if resume_from_checkpoint is not None:
            self._resume(resume_from_checkpoint)
        elif self.accelerator.is_main_process and (old := newest_checkpoint(Path(str(args.output_dir)))) is not None:
            logger.warning(
                "%s is of an earlier run, and this one writes its own checkpoints beside it; set another "
                "`output_dir`, or go on from it with `resume_from_checkpoint=True`",
                old,
            )
        self.state.max_steps = args.num_total_batches
        self.state.num_train_epochs = math.ceil(args.num_train_epochs)
        self.state.train_batch_size = args.per_device_train_batch_size
        self.state.compute_steps(args, args.num_total_batches)
        self.control.should_training_stop = False
        self.ahead = Ahead(self._rollout, args.max_staleness)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Everything around the updates: callbacks, first and last evaluation, the state on disk."""
        args = self.args
        self._start, self._first_step = time.monotonic(), self.state.global_step
        if args.loss_aggregation is None:
            logger.info(f"the loss averages over {args.aggregation}s (`loss_aggregation`)")
        if args.should_save:
            os.makedirs(str(args.output_dir), exist_ok=True)
            settings = {**json.loads(args.to_json_string()), **self._described}
            Path(str(args.output_dir), SETTINGS_FILE).write_text(json.dumps(settings, indent=2))
        self._event("on_train_begin")
        if args.eval_on_start and self._resumed_from is None:
            self.evaluate()
        self._event("on_epoch_begin")
        if self._resumed_from is not None:
            with reading(self._resumed_from, "rng_state.pth"):
                load_generators(self, str(self._resumed_from))
        yield
        if self.progress.unlogged:
            self.log(_averaged(self.progress.unlogged))
            self.progress.unlogged.clear()
        if args.eval_strategy != "no" and self.progress.last_eval_step != self.state.global_step:
            self.evaluate()
        self.log(self._runtime())
        if args.load_best_model_at_end:
            self._load_best_model()
        self._event("on_train_end")
        if args.should_save:
            self.state.save_to_json(os.path.join(str(args.output_dir), "trainer_state.json"))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold `output_dir`, in which no other run may train meanwhile."""
        directory = Path(str(self.args.output_dir))
        lock = together(lambda: _locked(directory) if self.accelerator.is_main_process else None)
        with closing(lock) if lock is not None else nullcontext():
            yield

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """What a run changes in this object and is no result of it is as before, however the run ends."""
        networks = [network.module for network in (self.learner.policy, self.learner.critic) if network is not None]
        try:
            with modes_kept(*networks):
                yield
        finally:
            self.is_in_train = False
            close_progress_bars(self.callback_handler.callbacks)

    def _heed_requests_to_stop(self) -> None:
        """Raises a [`StopRequestedError`] on all ranks, where one of them was asked to stop."""
        if any(gather_objects([is_requested()])):
            raise StopRequestedError("the run was asked to stop")

    @contextmanager
    def _saving_when_stopped(self) -> Iterator[None]:
        """A run that is asked to stop can go on from the update that was done last."""
        try:
            yield
        except StopRequestedError:
            update = self.state.global_step
            words = "it was not saved (`save_strategy`='no')" if update else "there is nothing to save"
            if self._saved_step == update:
                words = f"checkpoint-{update} holds it"
            elif self.args.save_strategy != SaveStrategy.NO and update:
                self._rewind_generators()
                self._save_checkpoint(self.learner.policy.module, trial=None)
                words = f"it was saved as checkpoint-{update}"
            logger.warning(f"the run was asked to stop, and ends after update {update}; {words}")
            raise

    @contextmanager
    def _update(self) -> Iterator[None]:
        """Everything around one update: metrics, callbacks, logging, evaluation, checkpoints."""
        args = self.args
        self._means = Means()
        self._logged = Means()  # by reward functions
        self._logs: dict[str, float] = {}
        self.clock.seconds.clear()
        before = counts_of(self.sampler)
        forwarded = self.learner.tokens_forwarded
        self._generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
        start = time.perf_counter()
        learning_rate = self.learner.policy.learning_rate  # of this update, as `PPOTrainer` logs it
        critic_learning_rate = self.learner.critic.learning_rate if self.learner.critic is not None else None
        self._event("on_step_begin")
        yield
        update_s = time.perf_counter() - start
        # Read now: tokens sampled during the weight sync count towards the next update.
        counts = counts_of(self.sampler) - before
        self._means.add(
            "rollout/prefix_cache_hit_rate",
            max(0, counts.prompt_tokens - counts.prefilled_tokens),
            counts.prompt_tokens,
        )
        model_s, rollout_s = self.clock.seconds["model_s"], max(self.clock.seconds["rollout_s"], 1e-9)
        if args.max_staleness:  # sampling goes on all the time, and takes none of this process's
            rollout_s = update_s
        else:
            model_s += counts.forward_s
        self.state.global_step += 1
        with self.clock.measure("sync_s"):
            self.engine.take_weights(self.state.global_step)
        assert args.batch_size is not None
        self.progress.num_rows_played += args.batch_size // args.num_generations
        epoch_before = math.floor(self.state.epoch or 0.0)
        if self.rows.num_rows is not None:
            self.state.epoch = self.progress.num_rows_played / self.rows.num_rows
        else:  # of a run whose epochs have no end, as `Trainer` counts them
            self.state.epoch = self.state.global_step / self.state.max_steps
        self._logs |= {
            "episode": self.progress.num_rows_played * args.num_generations,
            "eps": self._num_played() / (time.monotonic() - self._start),
            "lr": learning_rate,
            **{f"perf/{name}": value for name, value in self.clock.seconds.items() if name != "model_s"},
            "perf/update_s": update_s,
            "perf/overhead_fraction": 1.0 - model_s / update_s,
            "perf/tokens_per_s": counts.sampled_tokens / rollout_s,
            "perf/sampled_tokens": counts.sampled_tokens,
            "perf/prefilled_tokens": counts.prefilled_tokens,
            "rollout/uncached_rows": counts.uncached_rows,
        }
        if self.learner.tokens_forwarded > forwarded:
            count = self.learner.tokens_forwarded - forwarded
            self._logs["perf/tokens_forwarded"] = count / self.args.num_ppo_epochs
        if critic_learning_rate is not None:
            self._logs["critic/lr"] = critic_learning_rate
        self._event("on_step_end")
        if math.floor(self.state.epoch) > epoch_before:
            self._event("on_epoch_end")
            self._event("on_epoch_begin")
        self._generators = None
        self._log_evaluate_save()

    def _rewind_generators(self) -> None:
        """To the beginning of the update that is broken off, so that its environments draw the same when resumed."""
        if self._generators is not None:
            of_python, of_numpy, of_torch = self._generators
            random.setstate(of_python)
            np.random.set_state(of_numpy)
            torch.set_rng_state(of_torch)

    def _log_evaluate_save(self) -> None:
        """What the callbacks asked for."""
        logs = self._logs | _finished(self._means.reduced())
        self.progress.unlogged.append(logs | beside(self._logged.reduced(), logs))
        if self.control.should_log:
            self.log(_averaged(self.progress.unlogged))
            self.progress.unlogged.clear()
        if self._shows_samples(finished=True):
            self.generate_completions(sampling=True)
        metrics = None
        if self.control.should_evaluate:
            metrics = self.evaluate()
        if metrics is not None:
            is_best = note_best(self, metrics)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
        if self.control.should_save:
            self._save_checkpoint(self.learner.policy.module, trial=None)
            self._event("on_save")

    def _requests(self, update: int) -> list[EpisodeRequest]:
        """This rank's rows of an update that is still to come; a row's episodes stay together."""
        args, rank = self.args, self.accelerator.process_index
        assert args.batch_size is not None
        rows_per_update = args.batch_size // args.num_generations
        rows_per_rank = rows_per_update // self.accelerator.num_processes
        before = (update - self.state.global_step) * rows_per_update
        first = self.progress.num_rows_played + before + rank * rows_per_rank
        requests = []
        for position in range(first, first + rows_per_rank):
            row, dataset_row = self.rows[position], self.rows.row_number(position)
            requests += [
                EpisodeRequest(row, position, generation, dataset_row) for generation in range(args.num_generations)
            ]
        return requests

    def _shows_samples(self, *, finished: bool = False) -> bool:
        """Whether episodes of this update are printed (`finished`: of the one that has just been counted)."""
        args = self.args
        if args.num_sample_generations <= 0:
            return False
        assert args.num_total_batches is not None
        update = self.state.global_step - finished
        return update % max(1, args.num_total_batches // args.num_sample_generations) == 0

    def _event(self, name: str) -> None:
        """Tell the callbacks, who may change what happens next."""
        self.control = getattr(self.callback_handler, name)(self.args, self.state, self.control)

    def _num_played(self) -> int:
        """Episodes since this process began to train."""
        assert self.args.batch_size is not None
        return (self.state.global_step - self._first_step) * self.args.batch_size

    def _runtime(self) -> dict[str, float]:
        # It takes the beginning by the wall clock, which may have been set since.
        began = time.time() - (time.monotonic() - self._start)
        return speed_metrics("train", began, self._num_played(), self.state.global_step - self._first_step)


def _locked(directory: Path) -> Lock:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return Lock(directory / LOCK_FILE)
    except LockedError as error:
        raise ConfigurationError(
            f"another run trains in `output_dir`={str(directory)!r} ({error.holder}), and the two would overwrite "
            "each other's files; wait for it, stop it, or set another `output_dir`"
        ) from error
    except OSError as error:
        raise CheckpointError(f"`output_dir`={str(directory)!r} cannot be written: {error}") from error


def _context(*models: Any) -> int | None:
    """The most tokens that all of these can read: each of them reads the policy's prompts and responses."""
    lengths = (context_length(plain_model(model).config) for model in models if hasattr(model, "config"))
    return min((length for length in lengths if length is not None), default=None)


def _frozen(model: Any, device: torch.device | None = None) -> Any:
    """A model that is only read, on a device if one is given."""
    if model is None:
        return None
    disable_dropout(model)
    return (model if device is None else model.to(device)).eval().requires_grad_(False)


def _finished(means: dict[str, float]) -> dict[str, float]:
    """Metrics that are not means themselves, from those that are."""
    square = means.pop("val/ratio_sq", None)
    if square is not None:
        means["val/ratio_var"] = max(0.0, square - means["val/ratio"] ** 2)
    return means


def _averaged(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the updates since the last log; of running totals and learning rates the last one."""
    last = ("episode", "eps", "lr", "critic/lr")
    names = dict.fromkeys(name for logs in history for name in logs)
    averaged = {}
    for name in names:
        values = [logs[name] for logs in history if name in logs]
        averaged[name] = values[-1] if name in last else sum(values) / len(values)
    return averaged


def _datasets(eval_dataset: Any) -> list[Any]:
    """The data sets to evaluate on, without those that are empty, as far as they have a length."""
    given = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    is_empty = lambda dataset: isinstance(dataset, Sized) and not len(dataset)  # noqa: E731
    return [dataset for dataset in given if dataset is not None and not is_empty(dataset)]


@contextmanager
def _short_collections(device: torch.device) -> Iterator[None]:
    """
    Leave what exists already out of garbage collection. A full collection takes 0.3 s with all that torch and
    transformers have loaded, longer than a rollout waits for environments that it takes to be quick.
    """
    if gc.get_freeze_count():  # the program does so by itself
        yield
        return
    if device.type != "cpu":
        gc.collect()  # a model that nobody uses any more may hold the device's memory
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
