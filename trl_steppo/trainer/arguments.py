"""The arguments of a trainer: they are checked, and what is given by its name is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import transformers
from transformers import ProcessorMixin, TrainerCallback

from ..errors import ConfigurationError
from ..inference.base import vocabulary_size
from ..models import add_adapter
from ..rollout import Agent
from ..rollout.rewards import RewardFunc
from .checks import check_adapters, check_kinds, check_models, check_trainable, refuse_unsupported
from .data_stream import Rows
from .dataset_checks import (
    EnvironmentFactories,
    check_dataset,
    check_eval_dataset,
    check_length,
    check_no_dataset,
)
from .description import describe_task
from .engines import Engine, check_engine
from .loading import Loader
from .reward_models import RewardFuncs, load_reward_funcs
from .run_environments import factories_of
from .steppo_config import StepPOConfig


@dataclass(frozen=True)
class Arguments:
    """The arguments of a trainer; [`StepPOTrainer`] says what each of them is."""

    args: StepPOConfig
    processing_class: Any
    model: Any
    ref_model: Any
    reward_model: Any
    train_dataset: Any
    value_model: Any
    data_collator: Any
    eval_dataset: Any
    optimizers: tuple[Any, Any]
    callbacks: list[TrainerCallback] | None
    peft_config: Any
    environment_factory: EnvironmentFactories | None = None
    tools: Sequence[Callable[..., Any]] | None = None
    reward_funcs: RewardFuncs | None = None
    reward_processing_classes: Any = None
    agent: Agent | None = None
    engine: Engine | None = None
    loaded_funcs: Sequence[RewardFunc] = ()  # `reward_funcs`, with what was given by its name


def loaded(given: Arguments) -> Arguments:
    """
    Arguments with all models and tokenizers that are given by their names, and with the policy's new adapter.

    Raises:
        ConfigurationError, DataError: If arguments do not fit together.
    """
    args = given.args
    refuse_unsupported(args)
    check_engine(args, given.engine)
    check_kinds(
        processing_class=given.processing_class,
        model=given.model,
        ref_model=given.ref_model,
        value_model=given.value_model,
        reward_model=given.reward_model,
    )
    if isinstance(given.processing_class, ProcessorMixin):
        raise ConfigurationError(
            f"`processing_class` is a {type(given.processing_class).__name__}: images and other media are not "
            "supported; pass its tokenizer, `processing_class.tokenizer`"
        )
    factories_of(given.environment_factory)
    if given.train_dataset is None:
        check_no_dataset(given.environment_factory)
    check_length(args, given.train_dataset)
    given = _with_models(given)
    check_models(args, given.model, given.ref_model, given.value_model, given.reward_model)
    given = _with_adapter(given)
    check_trainable(given.model, "model")
    if given.train_dataset is not None:
        check_dataset(given.train_dataset, "train_dataset", **row_rules(given))
    check_eval_dataset(given.eval_dataset, **row_rules(given))
    return given


def _with_models(given: Arguments) -> Arguments:
    args = given.args
    loader = Loader(args.model_init_kwargs, seed=args.seed)  # type: ignore[arg-type]  # JSON is read by now
    names = ("model", "ref_model", "value_model", "reward_model")
    given = replace(given, **{name: loader.model(name, getattr(given, name)) for name in names})
    given = replace(
        given,
        processing_class=loader.tokenizer("processing_class", given.processing_class, given.model),
        loaded_funcs=load_reward_funcs(
            given.reward_funcs,
            given.reward_processing_classes,
            loader,
            chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
            batch_size=args.local_rollout_forward_batch_size,
        ),
    )
    loader.check_used()
    return given


def _with_adapter(given: Arguments) -> Arguments:
    args = given.args
    if given.peft_config is not None:
        transformers.set_seed(args.seed)  # a new adapter starts at random
        name = args.model_adapter_name or "default"
        given = replace(given, model=add_adapter(given.model, given.peft_config, name=name))
    check_adapters(args, given.model, given.ref_model, given.value_model)
    if args.model_adapter_name is not None:
        given.model.set_adapter(args.model_adapter_name)
    return given


class RowRules(TypedDict):
    """What rows must fit; see [`~dataset_checks.check_dataset`]."""

    vocabulary_size: int | None
    is_for_agent: bool
    environments: list[str] | None
    may_lack_prompt: bool


def row_rules(given: Arguments) -> RowRules:
    """What the rows of a trainer must fit."""
    return {
        "vocabulary_size": vocabulary_size(given.model),
        "is_for_agent": given.agent is not None,
        "environments": [name for name in factories_of(given.environment_factory) if name is not None] or None,
        "may_lack_prompt": given.environment_factory is not None,
    }


def derive_sizes(args: StepPOConfig, num_ranks: int, rows: Rows) -> None:
    """Fill in the derived fields of `PPOConfig`, as `PPOTrainer` does."""
    args.world_size = num_ranks
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size * num_ranks
    args.batch_size = args.local_batch_size * num_ranks
    args.mini_batch_size = args.batch_size // args.num_mini_batches
    args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
    if args.max_steps > 0:
        args.num_total_batches = args.max_steps
    else:
        if args.total_episodes is None:
            assert rows.num_rows is not None  # or its length would have been asked for
            args.total_episodes = math.ceil(args.num_train_epochs * rows.num_rows * args.num_generations)
        args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
    if args.critic_warmup_updates >= args.num_total_batches and args.critic_warmup_updates > 0:
        raise ConfigurationError(
            f"`critic_warmup_updates`={args.critic_warmup_updates} leaves none of the {args.num_total_batches} "
            f"updates to the policy: `total_episodes`={args.total_episodes} at {args.batch_size} episodes an "
            "update; lower it, or raise `total_episodes`"
        )


def datasets_of(eval_dataset: Any) -> list[Any]:
    """The data sets to evaluate on, without those that are empty, as far as they have a length."""
    datasets = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    is_empty = lambda dataset: isinstance(dataset, Sized) and not len(dataset)  # noqa: E731
    return [dataset for dataset in datasets if dataset is not None and not is_empty(dataset)]


def description(given: Arguments) -> dict[str, Any]:
    """What the run trains on, for the file of its settings."""
    return describe_task(
        model=given.model,
        train_dataset=given.train_dataset,
        eval_dataset=given.eval_dataset,
        environment_factory=given.environment_factory,
        tools=given.tools,
        reward_funcs=given.loaded_funcs,
        reward_model=given.reward_model,
        agent=given.agent,
    )
