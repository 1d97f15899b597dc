"""What a trainer is made of: its arguments are checked and loaded, and its parts are built of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import ProcessorMixin, TrainerCallback

from ..batching import LayoutName
from ..compat.accelerate import is_fsdp2
from ..compat.transformers import attention_of, enable_checkpointing
from ..errors import ConfigurationError
from ..inference.base import vocabulary_size
from ..learning.learner import Learner
from ..learning.metrics import Clock
from ..models import (
    AdapterReference,
    Critic,
    PolicyScorer,
    adapter_changes_model,
    add_adapter,
    agrees_on_tries,
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
)
from ..rollout import Agent
from .checkpointing import PolicyAdapters
from .checks import (
    check_adapters,
    check_apart,
    check_kinds,
    check_models,
    check_saved,
    check_trainable,
    refuse_unsupported,
)
from .data_stream import Rows, column_names
from .dataset_checks import check_dataset, check_eval_dataset, check_length, check_no_dataset
from .description import describe_task
from .engines import Engine, check_engine, make_engine
from .loading import Loader
from .networks import SavedNetwork, build_networks, build_reference, hold_in_float32
from .player import EpisodePlayer, factories_of
from .reward_models import RewardFuncs, RewardModel, load_reward_funcs
from .steppo_config import StepPOConfig

logger = transformers.utils.logging.get_logger(__name__)


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
    environment_factory: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None
    tools: Sequence[Callable[..., Any]] | None = None
    reward_funcs: RewardFuncs | None = None
    reward_processing_classes: Any = None
    agent: Agent | None = None
    engine: Engine | None = None

    @property
    def judges(self) -> list[RewardModel]:
        """The reward functions that are models, when they are loaded."""
        return [func for func in self.reward_funcs or () if isinstance(func, RewardModel)]


# -- checked and loaded -----------------------------------------------------------------------------------------------


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
        reward_funcs=load_reward_funcs(
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


# -- built ------------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """
    The models that learning needs.

    Args:
        policy (`PreTrainedModel` or `PeftModel`):
            The model that is trained.
        adapters ([`PolicyAdapters`]):
            Its adapters.
        critic (`PreTrainedModel` or `PeftModel`, *optional*):
            The critic's model.
        reference (`PreTrainedModel`, *optional*):
            The model of the KL terms. `None`: there are none, or the policy is its own reference by its adapters.
        twin (`PreTrainedModel`, *optional*):
            A copy of the policy for another process.
    """

    policy: Any
    adapters: PolicyAdapters
    critic: Any = None
    reference: Any = None
    twin: Any = None


@dataclass(frozen=True)
class Parts:
    """The parts of a trainer that are built of its models."""

    models: Models
    networks: tuple[SavedNetwork, SavedNetwork | None]
    learner: Learner
    engine: Engine


def build_parts(
    given: Arguments,
    accelerator: Accelerator,
    *,
    decay_parameter_names: Callable[[nn.Module], list[str]],
    on_event: Callable[[str], None],
) -> Parts:
    """
    Build what learns and what samples.

    Args:
        given ([`Arguments`]):
            Loaded ones. The models are prepared for training in place.
        accelerator ([`~accelerate.Accelerator`]):
            Places and wraps networks.
        decay_parameter_names (`Callable`):
            Names of a network's parameters that weight decay applies to.
        on_event (`Callable[[str], None]`):
            Called with the name of each `TrainerCallback` event within an update.
    """
    args = given.args
    models = _models(given, accelerator)
    _prepare_for_training(args, accelerator, models)
    layout = choose_layout(args, [models.policy, models.critic, models.reference])
    scorer = PolicyScorer(plain_model(models.policy))
    reference = _reference(args, accelerator, models, scorer)
    networks = build_networks(
        args,
        accelerator,
        scorer,
        Critic(plain_model(models.critic)) if models.critic is not None else None,
        optimizers=given.optimizers,
        decay_parameter_names=decay_parameter_names,
    )
    learner = Learner(args, accelerator, *networks, reference, layout, Clock(), on_event)
    # Last: what a model's attention can take is settled by now.
    engine = given.engine or make_engine(args, accelerator, policy=networks[0], model=models.policy, twin=models.twin)
    return Parts(models, networks, learner, engine)


def _models(given: Arguments, accelerator: Accelerator) -> Models:
    """The given models, and those that are made of the policy."""
    args, policy = given.args, given.model
    register_attention()  # a model that was pickled after a run names it
    adapters = PolicyAdapters(policy.active_adapter if is_peft_model(policy) else None, args.ref_adapter_name)
    models = Models(policy, adapters, reference=given.ref_model)
    needs_reference = args.uses_reference and given.ref_model is None
    with gathered(policy.parameters()):
        if not is_fsdp2(accelerator):
            hold_in_float32(accelerator, policy, "model")  # before it is copied: copies compute as it does
        if needs_reference and adapters.trained is not None:
            _choose_reference(args, policy, adapters)
        if args.uses_critic:
            models.critic = given.value_model
            if given.value_model is None:
                models.critic = _build_critic(args, policy, adapters)
        if needs_reference and adapters.trained is None:
            models.reference = copy.deepcopy(policy)
        if given.engine is None and args.samples_in_worker:
            models.twin = copy.deepcopy(plain_model(policy)).cpu()
        if is_fsdp2(accelerator):
            hold_in_float32(accelerator, policy, "model")  # all compute in the type that FSDP2 gives their layers
    return models


def _choose_reference(args: StepPOConfig, policy: Any, adapters: PolicyAdapters) -> None:
    """Which of the policy's adapters is the reference: the base model for a new one, a copy for a trained one."""
    if args.ref_adapter_name is not None or not adapter_changes_model(policy):
        return
    assert adapters.trained is not None
    adapters.reference = adapters.copied = freeze_copy(policy, adapters.trained)
    logger.warning(
        f"the adapter {adapters.trained!r} of `model` was trained before, so a frozen copy of it, "
        f"{adapters.copied!r}, is the reference of the KL terms; for the base model as the reference, add a new "
        "adapter and set `ref_adapter_name` to its name"
    )


def _build_critic(args: StepPOConfig, policy: Any, adapters: PolicyAdapters) -> Any:
    critic = build_critic(policy, share_weights=args.critic_shares_base)
    if adapters.trained is None:
        return critic
    return add_adapter(critic, critic_adapter(policy.peft_config[adapters.trained]))


def _prepare_for_training(args: StepPOConfig, accelerator: Accelerator, models: Models) -> None:
    """Check the models that are trained, and set them up for it."""
    if models.critic is not None:
        hold_in_float32(accelerator, models.critic, "value_model")
        check_trainable(models.critic, "value_model")
        check_apart(models.policy, models.critic)
        check_saved(models.critic, "value_model")
    check_saved(models.policy, "model")
    for model in (models.policy, models.critic):
        if model is None:
            continue
        disable_dropout(model)
        if args.gradient_checkpointing:
            enable_checkpointing(plain_model(model), args.gradient_checkpointing_kwargs)


def choose_layout(args: StepPOConfig, models: Sequence[Any]) -> LayoutName:
    """The layout of rows that saves the most and that all networks can take. Every rank must call this."""
    if not args.prefix_sharing:
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


def _reference(args: StepPOConfig, accelerator: Accelerator, models: Models, scorer: nn.Module) -> nn.Module | None:
    """What gives the log-probabilities of the KL terms; `None` without such terms."""
    if not args.uses_reference:
        return None
    if models.reference is not None:
        frozen(models.reference)
        return build_reference(accelerator, PolicyScorer(plain_model(models.reference)))
    assert models.adapters.trained is not None
    return AdapterReference(scorer, models.policy, models.adapters.trained, models.adapters.reference)


def frozen(model: Any, device: torch.device | None = None) -> Any:
    """A model that is only read, on a device if one is given; changed in place."""
    disable_dropout(model)
    return (model if device is None else model.to(device)).eval().requires_grad_(False)


def freeze_reward_models(given: Arguments, rows: Rows, device: torch.device) -> None:
    """Place the models that pay rewards, the functions' and `reward_model`, on the device."""
    for judge in given.judges:
        judge.check_prompt(rows.example.get("prompt"))
        frozen(judge.model, device)
    if given.reward_model is not None:
        frozen(given.reward_model, device)


def build_player(given: Arguments, rows: Rows, parts: Parts) -> EpisodePlayer:
    """Build what plays episodes and pays their rewards."""
    args, model = given.args, given.model
    return EpisodePlayer(
        args,
        given.processing_class,
        parts.engine,
        columns=rows.columns,
        eval_columns=[column_names(dataset) for dataset in datasets_of(given.eval_dataset)],
        environment_factory=given.environment_factory,
        tools=given.tools,
        reward_funcs=given.reward_funcs,
        reward_model=plain_model(given.reward_model),
        numerics=parts.learner.numerics,
        data_collator=given.data_collator,
        example_row=rows.example,
        agent=given.agent,
        context=_context(model, given.ref_model, given.value_model, given.reward_model),
        end_token_ids=end_token_ids(getattr(model, "generation_config", None)),
    )


def _context(*models: Any) -> int | None:
    """The maximum number of tokens that all of these can read: each reads the policy's prompts and responses."""
    lengths = (context_length(plain_model(model).config) for model in models if hasattr(model, "config"))
    return min((length for length in lengths if length is not None), default=None)


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
        reward_funcs=given.reward_funcs,
        reward_model=given.reward_model,
        agent=given.agent,
    )
