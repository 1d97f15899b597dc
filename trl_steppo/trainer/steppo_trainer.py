"""StepPOTrainer: plays episodes, assigns credit step by step, updates policy and critic."""

from __future__ import annotations

import copy
import math
import os
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import DistributedType
from torch import nn
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy, SchedulerType, TrainOutput

from ..batching import StepRolloutCollator
from ..errors import ConfigurationError, DataError, RolloutError
from ..inference.local import LocalSampler
from ..losses import kl_estimate
from ..models import Critic, PolicyScorer, build_critic, check_critic
from ..rollout import EpisodeRequest, dump_episodes, episode_file, load_episodes
from ..types import Episode
from .callbacks import StepPOProgressCallback, print_episodes
from .credit import Credit, assign_credit
from .data_stream import RowStream, column_names
from .learner import Learner, Network, Rollout, Scores
from .metrics import Clock, Means, add_episode_metrics
from .player import EpisodePlayer
from .ppo import PPOConfig, PPOTrainer
from .steppo_config import CRITIC_ESTIMATORS, StepPOConfig

logger = transformers.utils.logging.get_logger(__name__)

_NUM_SHOWN = 3  # episodes of a printed table


class StepPOTrainer(PPOTrainer):
    """
    Trainer for step-level PPO (StepPO, arXiv 2604.18401), token-level PPO, and baselines without a critic.

    It takes every argument of [`~trl.experimental.ppo.PPOTrainer`], with the same names in the same order, and plays
    multi-turn episodes where it is given an environment or tools.

    Args:
        args ([`StepPOConfig`] or [`~trl.experimental.ppo.PPOConfig`]):
            The run's settings. A plain `PPOConfig` means token-level PPO, as in `PPOTrainer`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer; with a chat template where rows have `prompt`.
        model ([`~transformers.PreTrainedModel`]):
            The policy, a causal language model.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            The reference of the KL terms. If `None` and a KL coefficient is not 0, a copy of the policy.
        reward_model ([`~transformers.PreTrainedModel`], *optional*):
            A sequence classifier with one label that scores the last prompt and response of an episode. `None` when
            the environment or `reward_funcs` pay the reward.
        train_dataset ([`~datasets.Dataset`]):
            Rows with `prompt` (text or messages) or `input_ids`; all other columns go to the environment's
            `reset(**row)`.
        value_model ([`~transformers.PreTrainedModel`], *optional*):
            The critic: a sequence classifier with one label. If `None`, it is built from the policy's weights, with a
            value head that starts at zero.
        data_collator, optimizers, peft_config:
            As in `PPOTrainer`; not in this version, which says so.
        eval_dataset ([`~datasets.Dataset`] or `dict` of them, *optional*):
            Rows to evaluate on, greedily.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Callbacks beside the default ones.
        environment_factory (`Callable[[], Any]`, *optional*):
            Makes the environment of one episode: a class with tools as in `GRPOTrainer`, or one with
            `step(response)`; see [`environments.base`].
        tools (`list[Callable]`, *optional*):
            Functions the model may call, sync or async, shared by all episodes.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Score finished episodes, as in `GRPOTrainer`; their sum lands on the last step.

    Raises:
        ConfigurationError, DataError: If arguments or settings do not fit together; the message names them and the
            cure.

    Example:
    ```python
    from trl_steppo import StepPOConfig, StepPOTrainer

    trainer = StepPOTrainer(
        args=StepPOConfig(output_dir="runs/guess"),
        processing_class=tokenizer,
        model=model,
        train_dataset=dataset,
        environment_factory=GuessNumber,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "ppo", "steppo"]  # noqa: RUF012  (as declared by the base class)
    _name = "StepPO"
    _paper = {  # noqa: RUF012
        "title": "StepPO: Step-Aligned Policy Optimization for Agentic Reinforcement Learning",
        "id": "2604.18401",
        "citation": textwrap.dedent("""\
            @article{steppo2026,
                title  = {{StepPO: Step-Aligned Policy Optimization for Agentic Reinforcement Learning}},
                year   = 2026,
                eprint = {arXiv:2604.18401}
            }"""),
    }

    def __init__(
        self,
        args: StepPOConfig | PPOConfig,
        processing_class: Any,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        reward_model: nn.Module | None = None,
        train_dataset: Any = None,
        value_model: PreTrainedModel | None = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        *,
        environment_factory: Callable[[], Any] | None = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    ) -> None:
        args = args if isinstance(args, StepPOConfig) else StepPOConfig.from_ppo_config(args)
        _refuse_unsupported(args, data_collator=data_collator, peft_config=peft_config, optimizers=optimizers)
        _check_models(args, model, ref_model, value_model, reward_model)
        if train_dataset is None:
            raise DataError("`train_dataset` is required; pass rows with `prompt` or `input_ids`")
        # `Trainer` seeds every generator, which a critic that is built here then draws from.
        Trainer.__init__(
            self,
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.args: StepPOConfig = args
        _check_distribution(self.accelerator.distributed_type)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StepPOProgressCallback)
        self.rows = RowStream(train_dataset, seed=args.seed if args.data_seed is None else args.data_seed)
        self._derive_sizes()
        self.clock = Clock()
        self.sampler = LocalSampler(model, cache_tokens=args.rollout_cache_tokens)
        self.player = EpisodePlayer(
            args,
            processing_class,
            self.sampler,
            columns=column_names(train_dataset),
            environment_factory=environment_factory,
            tools=tools,
            reward_funcs=[reward_funcs] if callable(reward_funcs) else reward_funcs,
            reward_model=self._frozen(reward_model),
        )
        self._build_learner(model, ref_model, value_model)
        self.failed_updates = 0
        self._last_eval_step = -1
        self._history: list[dict[str, float]] = []  # metrics of the updates since the last log

    # -- the story ----------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train until `total_episodes` (or `max_steps` updates) are reached, or a callback stops the run.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Not in this version.
            trial, ignore_keys_for_eval:
                As in `Trainer`, for its hyperparameter search; not used.

        Raises:
            RolloutError: If `max_failed_updates` updates in a row have no valid episode.
        """
        if resume_from_checkpoint:
            raise ConfigurationError(
                "`resume_from_checkpoint` is set, but this version cannot resume; start a new run"
            )
        if self.state.global_step > 0:
            raise ConfigurationError("`train()` was called before, and its schedules have ended; make a new trainer")
        with self._running():
            while not self.control.should_training_stop:
                with self._update():
                    episodes = self._roll_out()
                    rollout = self._collate(episodes)
                    if rollout is None:
                        self.learner.end_update()
                        continue
                    scores = self._score(rollout)
                    credit = self._assign_credit(rollout, scores)
                    self._learn(rollout, scores, credit)
        return TrainOutput(self.state.global_step, float("nan"), {})

    def _roll_out(self) -> list[Episode]:
        """Play (or read back) this update's episodes on this rank."""
        update, rank, args = self.state.global_step, self.accelerator.process_index, self.args
        with self.clock.measure("rollout_s"):
            if args.replay_episodes_dir is not None:
                episodes = load_episodes(episode_file(args.replay_episodes_dir, update, rank))
            else:
                self.sampler.policy_version = update
                with self.accelerator.autocast():  # the numerics of the policy's forward passes in training
                    episodes = self.player.play(self._requests(), trainer_state=self.state, id_prefix=f"{update}/")
                self.sampler.reset_cache()
            if args.dump_episodes_dir is not None:
                dump_episodes(episode_file(args.dump_episodes_dir, update, rank), episodes)
        if self._shows_samples():
            print_episodes(episodes[:_NUM_SHOWN], self.player.decode, f"episodes sampled in update {update + 1}")
        return episodes

    def _collate(self, episodes: Sequence[Episode]) -> Rollout | None:
        """Lay out the valid episodes; `None` where no rank has one."""
        add_episode_metrics(self._means, episodes, eos_token_id=self.player.tokenizer.eos_token_id)
        valid = [episode for episode in episodes if episode.valid]
        errors = Counter(str(episode.error) for episode in episodes if not episode.valid)
        for error, count in errors.most_common(3):
            logger.warning(f"update {self.state.global_step + 1}: {count} of {len(episodes)} episodes failed: {error}")
        num_valid = self.learner.reduce(torch.tensor([float(len(valid))], device=self.accelerator.device))
        self.failed_updates = 0 if float(num_valid) else self.failed_updates + 1
        if self.failed_updates >= self.args.max_failed_updates:
            raise RolloutError(
                f"{self.failed_updates} updates in a row had no valid episode (`max_failed_updates`); the last error "
                f"was: {next(iter(errors), 'on another rank')}"
            )
        return self.learner.prepare(valid) if float(num_valid) else None

    def _score(self, rollout: Rollout) -> Scores:
        """Log-probabilities and values under the weights before the update."""
        with self.clock.measure("forward_s"):
            return self.learner.score(rollout)

    def _assign_credit(self, rollout: Rollout, scores: Scores) -> Credit:
        """Rewards and values to advantages and returns."""
        batch = rollout.batch
        penalties = torch.zeros_like(batch.rollout_logprobs)
        if scores.ref_logprobs is not None:
            old = scores.old_logprobs if scores.old_logprobs is not None else batch.rollout_logprobs
            kl = kl_estimate(old, scores.ref_logprobs, batch.action_mask, self.args.kl_estimator)
            penalties = -self.args.kl_coef * kl
            self._means.add("objective/kl", kl.sum(), batch.num_episodes)
        self._means.add("objective/non_score_reward", penalties.sum(), batch.num_episodes)
        self._means.add("objective/rlhf_reward", batch.rewards.sum() + penalties.sum(), batch.num_episodes)
        groups, states = _group_indices(rollout.episodes, batch.rewards.device)
        credit = assign_credit(
            self.args,
            batch,
            token_penalties=penalties,
            values=scores.values,
            bootstrap_values=scores.bootstrap_values,
            group_index=groups,
            state_index=states,
            reduce=self.learner.reduce,
        )
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
        start = time.perf_counter()
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        requests = [EpisodeRequest(dataset[i], i) for i in range(rank, len(dataset), num_ranks)]
        episodes = self._play_greedily(requests, "eval/")
        means = Means()
        add_episode_metrics(means, episodes)
        runtime = time.perf_counter() - start
        shown = {name: value for name, value in means.reduced().items() if name != "objective/scores"}
        short = {name.removeprefix("env/").removeprefix("rollout/"): value for name, value in shown.items()}
        short |= {"runtime": runtime, "samples_per_second": len(dataset) / runtime}
        result = {f"{metric_key_prefix}_{k}": v for k, v in short.items() if k not in (ignore_keys or ())}
        self.log(result)
        self._last_eval_step = self.state.global_step
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
        count = min(len(dataset), _NUM_SHOWN) if sampling else len(dataset)
        requests = [EpisodeRequest(dataset[index], index) for index in range(count)]
        episodes = self._play_greedily(requests, "shown/")
        if self.accelerator.is_main_process:
            print_episodes(episodes, self.player.decode, "episodes played greedily")

    def _play_greedily(self, requests: Sequence[EpisodeRequest], id_prefix: str) -> list[Episode]:
        self.sampler.policy_version = self.state.global_step
        self.sampler.reset_cache()
        with self.accelerator.autocast():
            episodes = self.player.play(requests, greedy=True, id_prefix=id_prefix, trainer_state=self.state)
        self.sampler.reset_cache()
        return episodes

    def get_train_dataloader(self) -> Any:
        """Raises: rows are drawn from a seeded stream and played one by one (`self.rows`)."""
        raise ConfigurationError("there is no data loader: rows are played one by one; see `trainer.rows`")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Raises: evaluation plays the rows of `eval_dataset` one by one."""
        raise ConfigurationError("there is no data loader: rows are played one by one; see `trainer.eval_dataset`")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as a plain transformers model, and the critic beside it in `critic/`."""
        output_dir = output_dir or str(self.args.output_dir)
        if self.value_model is not None and self.args.should_save:
            self.value_model.save_pretrained(os.path.join(output_dir, "critic"))
        Trainer.save_model(self, output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer`'s, with the critic's optimizer beside its weights."""
        Trainer._save_checkpoint(self, model, trial)
        if self.learner.critic is not None and self.args.should_save and not self.args.save_only_model:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / "critic"
            torch.save(self.learner.critic.optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(self.learner.critic.scheduler.state_dict(), folder / "scheduler.pt")

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
                args.total_episodes = math.ceil(args.num_train_epochs * self.rows.num_rows * args.num_generations)
            args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
        if args.critic_warmup_updates >= args.num_total_batches and args.critic_warmup_updates > 0:
            raise ConfigurationError(
                f"`critic_warmup_updates`={args.critic_warmup_updates} leaves none of the {args.num_total_batches} "
                "updates to the policy; lower it, or raise `total_episodes`"
            )

    def _build_learner(
        self, model: PreTrainedModel, ref_model: PreTrainedModel | None, value_model: PreTrainedModel | None
    ) -> None:
        args = self.args
        self.ref_model: Any = None
        if args.uses_reference:
            self.ref_model = self._frozen(ref_model if ref_model is not None else copy.deepcopy(model))
        self.value_model: Any = None
        if args.uses_critic:
            self.value_model = value_model if value_model is not None else build_critic(model)
        if args.gradient_checkpointing:
            for network in (model, self.value_model):
                if network is not None:
                    _enable_checkpointing(network, args.gradient_checkpointing_kwargs)
        policy = self._network(PolicyScorer(model), args.learning_rate)
        critic = None
        if self.value_model is not None:
            rate = args.learning_rate if args.critic_learning_rate is None else args.critic_learning_rate
            critic = self._network(Critic(self.value_model), rate)
        self.optimizer, self.lr_scheduler, self.model_wrapped = policy.optimizer, policy.scheduler, policy.module
        self.learner = Learner(
            args,
            self.accelerator,
            policy,
            critic,
            PolicyScorer(self.ref_model) if self.ref_model is not None else None,
            StepRolloutCollator(
                pad_token_id=_pad_token_id(self.processing_class),
                prefix_sharing=args.prefix_sharing,
                bootstrap_truncated=args.bootstrap_truncated,
            ),
            self.clock,
        )

    def _network(self, module: nn.Module, learning_rate: float) -> Network:
        """Wrap a network for training, with an optimizer and a schedule of its own as `TrainingArguments` say."""
        args, total = self.args, self.args.num_total_batches
        assert total is not None
        decays = set(self.get_decay_parameter_names(module))
        groups = [
            {
                "params": [p for n, p in module.named_parameters() if p.requires_grad and (n in decays) == decayed],
                "weight_decay": args.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([g for g in groups if g["params"]], **{**kwargs, "lr": learning_rate})
        scheduler = transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(total),
            num_training_steps=total,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
        prepared, optimizer = self.accelerator.prepare(module.to(self.accelerator.device), optimizer)
        return Network(prepared, optimizer, scheduler)

    def _frozen(self, model: Any) -> Any:
        """A model that is only read."""
        return None if model is None else model.to(self.accelerator.device).eval().requires_grad_(False)

    # -- a run and its updates ----------------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Everything around the updates: callbacks, first and last evaluation, the state on disk."""
        args = self.args
        assert args.num_total_batches is not None
        self.is_in_train = True
        self.state.epoch = 0.0
        self.state.max_steps = args.num_total_batches
        self.state.num_train_epochs = math.ceil(args.num_train_epochs)
        self.state.train_batch_size = args.per_device_train_batch_size
        self.state.compute_steps(args, args.num_total_batches)
        self.control.should_training_stop = False
        self._start = time.perf_counter()
        if args.loss_aggregation is None:
            logger.info(f"the loss averages over {args.aggregation}s (`loss_aggregation`)")
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start:
            self.evaluate()
        self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
        yield
        if self._history:  # the updates since the last log
            self.log(_averaged(self._history))
            self._history.clear()
        if args.eval_strategy != "no" and self._last_eval_step != self.state.global_step:
            self.evaluate()
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        if args.should_save:
            self.state.save_to_json(os.path.join(str(args.output_dir), "trainer_state.json"))
        self.is_in_train = False

    @contextmanager
    def _update(self) -> Iterator[None]:
        """Everything around one update: metrics, callbacks, logging, evaluation, checkpoints."""
        args = self.args
        self._means = Means()
        self._logs: dict[str, float] = {}
        self.clock.seconds.clear()
        sampled, prefilled, sampling = (
            self.sampler.sampled_tokens,
            self.sampler.prefilled_tokens,
            self.sampler.forward_s,
        )
        start = time.perf_counter()
        learning_rate = self.learner.policy.learning_rate  # of this update, as `PPOTrainer` logs it
        critic_learning_rate = self.learner.critic.learning_rate if self.learner.critic is not None else None
        self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
        yield
        update_s = time.perf_counter() - start
        model_s = self.clock.seconds["model_s"] + self.sampler.forward_s - sampling
        self.state.global_step += 1
        assert args.batch_size is not None
        num_rows = args.batch_size // args.num_generations
        epoch_before = math.floor(self.state.epoch or 0.0)
        self.state.epoch = self.state.global_step * num_rows / self.rows.num_rows
        self._logs |= {
            "episode": self.state.global_step * args.batch_size,
            "eps": self.state.global_step * args.batch_size / (time.perf_counter() - self._start),
            "lr": learning_rate,
            **{f"perf/{name}": value for name, value in self.clock.seconds.items() if name != "model_s"},
            "perf/update_s": update_s,
            "perf/overhead_fraction": 1.0 - model_s / update_s,
            "perf/tokens_per_s": (self.sampler.sampled_tokens - sampled) / max(self.clock.seconds["rollout_s"], 1e-9),
            "perf/sampled_tokens": self.sampler.sampled_tokens - sampled,
            "perf/prefilled_tokens": self.sampler.prefilled_tokens - prefilled,
        }
        if critic_learning_rate is not None:
            self._logs["critic/lr"] = critic_learning_rate
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        if math.floor(self.state.epoch) > epoch_before:
            self.control = self.callback_handler.on_epoch_end(args, self.state, self.control)
            self.control = self.callback_handler.on_epoch_begin(args, self.state, self.control)
        self._log_evaluate_save()

    def _log_evaluate_save(self) -> None:
        """What the callbacks asked for."""
        self._history.append(self._logs | _finished(self._means.reduced()))
        if self.control.should_log:
            self.log(_averaged(self._history))
            self._history.clear()
        metrics = None
        if self.control.should_evaluate:
            metrics = self.evaluate()
        if metrics is not None:
            is_best = self._determine_best_metric(metrics=metrics, trial=None)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
        if self.control.should_save:
            self._save_checkpoint(self.learner.policy.module, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _requests(self) -> list[EpisodeRequest]:
        """This rank's rows of this update; a row's episodes stay together."""
        args, rank = self.args, self.accelerator.process_index
        assert args.batch_size is not None
        rows_per_rank = args.batch_size // args.num_generations // self.accelerator.num_processes
        first = self.state.global_step * args.batch_size // args.num_generations + rank * rows_per_rank
        return [
            EpisodeRequest(self.rows[position], position, generation)
            for position in range(first, first + rows_per_rank)
            for generation in range(args.num_generations)
        ]

    def _shows_samples(self) -> bool:
        args = self.args
        if args.num_sample_generations <= 0 or not self.accelerator.is_main_process:
            return False
        assert args.num_total_batches is not None
        return self.state.global_step % max(1, args.num_total_batches // args.num_sample_generations) == 0


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


def _group_indices(episodes: Sequence[Episode], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(E,) equal for the episodes of a row, and (N,) equal for the steps of a row that were taken in one state."""
    states: dict[tuple[int, Any], int] = {}
    step_states = []
    for episode in episodes:
        observed: Any = None  # the state of a step that has no key of its own: what was observed last
        for step in episode.steps:
            key = step.info.get("state_key", repr(observed))
            step_states.append(states.setdefault((episode.row_index, _hashable(key)), len(states)))
            observed = step.observation
    rows: dict[int, int] = {}
    groups = [rows.setdefault(episode.row_index, len(rows)) for episode in episodes]
    return torch.tensor(groups, device=device).long(), torch.tensor(step_states, device=device).long()


def _hashable(key: Any) -> Any:
    """A user's key that cannot be one (a list, say) as text: no reason for a run to end."""
    try:
        hash(key)
    except TypeError:
        return repr(key)
    return key


def _enable_checkpointing(network: PreTrainedModel, kwargs: Any) -> None:
    """Recompute activations in the backward pass; newer transformers renamed the method."""
    if hasattr(network, "activation_checkpointing_enable"):
        network.activation_checkpointing_enable(kwargs)
    else:
        network.gradient_checkpointing_enable(kwargs)


def _pad_token_id(tokenizer: Any) -> int:
    """Any id will do: nothing attends to padding."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _refuse_unsupported(
    args: StepPOConfig, *, data_collator: Any, peft_config: Any, optimizers: tuple[Any, Any]
) -> None:
    for name, unset in (
        ("model_adapter_name", None),
        ("ref_adapter_name", None),
        ("neftune_noise_alpha", None),
        ("label_smoothing_factor", 0.0),
        ("auto_find_batch_size", False),
    ):
        if getattr(args, name) != unset:
            raise ConfigurationError(f"`{name}`={getattr(args, name)!r} has no effect in this trainer; leave it out")
    if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        raise ConfigurationError(
            "`lr_scheduler_type` is 'reduce_lr_on_plateau', which waits for a metric; choose a schedule over updates"
        )
    if args.load_best_model_at_end:
        raise ConfigurationError(
            "`load_best_model_at_end` is set, but this version does not load checkpoints; leave it out, and take the "
            "best one from `output_dir` (`save_strategy='best'` keeps it)"
        )
    if data_collator is not None:
        raise ConfigurationError(
            "`data_collator` is set, but rows are played one by one; tokenize or change them in the dataset instead"
        )
    if peft_config is not None:
        raise ConfigurationError("`peft_config` is set, but this version trains whole models; leave it out")
    if any(optimizers):
        raise ConfigurationError(
            "`optimizers` is set, but policy and critic have one each; choose them by `optim`, `learning_rate` and "
            "`critic_learning_rate`"
        )


def _check_distribution(distributed_type: DistributedType) -> None:
    if distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ConfigurationError(
            f"accelerate was launched with {distributed_type.value}, and this version trains in one process or with "
            "DDP; choose one of these with `accelerate config`"
        )


def _check_models(
    args: StepPOConfig,
    model: PreTrainedModel,
    ref_model: PreTrainedModel | None,
    value_model: PreTrainedModel | None,
    reward_model: nn.Module | None,
) -> None:
    if value_model is not None and value_model is reward_model:
        raise ConfigurationError(
            "`value_model` is the `reward_model` itself, which must not be trained; load it twice, or leave "
            "`value_model` out to have a critic built"
        )
    if ref_model is model:
        raise ConfigurationError(
            "`ref_model` is the policy itself, which training changes; leave it out to have a copy made"
        )
    if ref_model is not None and not args.uses_reference:
        raise ConfigurationError(
            "`ref_model` has no effect: `kl_coef` and `kl_loss_coef` are both 0; set one of them, or leave it out"
        )
    if value_model is not None and not args.uses_critic:
        raise ConfigurationError(
            f"`value_model` has no effect with `advantage_estimator`={args.advantage_estimator!r}, which has no "
            f"critic; leave it out, or choose one of {CRITIC_ESTIMATORS}"
        )
    if value_model is not None:
        check_critic(value_model, "value_model")
    if reward_model is not None:
        check_critic(reward_model, "reward_model")
