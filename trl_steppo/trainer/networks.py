"""Policy and critic in training: their optimizers, schedules and distributed engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from accelerate import Accelerator, DistributedType
from torch import nn
from transformers import Trainer

from ..compat.accelerate import forget_engine, is_fsdp2
from ..compat.deepspeed import basic_optimizer, overflowed
from ..compat.torch import become_root
from ..compat.transformers import decoder_layers
from ..compat.trl import frozen_engine, pause_zero_hooks, resume_zero_hooks
from ..errors import CheckpointError, ConfigurationError
from ..learning.network import HALF_DTYPES, Network
from ..models import gathered, is_sharded, shard_like, take_shards, whole_tensor
from .checkpoints import SHARDS, load_optimizer_state, load_scheduler_state, reading
from .steppo_config import StepPOConfig

logger = transformers.utils.logging.get_logger(__name__)

OptimizerState: TypeAlias = dict[str, Any]
"""What `state_dict` of an optimizer returns."""


class SavedNetwork(Network):
    """A network whose optimizer and schedule can be saved: on one device, or under DDP."""

    def save_state(self, directory: Path, *, is_writer: bool) -> None:
        """Write the optimizer's and the schedule's state."""
        state = self._optimizer_state(keep=is_writer)
        if is_writer:
            torch.save(state, directory / "optimizer.pt")
            torch.save(self.scheduler.state_dict(), directory / "scheduler.pt")

    def load_state(self, directory: Path) -> None:
        """Read what [`save_state`] wrote."""
        self.optimizer.zero_grad()  # an update may have been interrupted
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if not type(innermost(self.optimizer)).__module__.startswith("torch.optim"):
            parameters = []  # other optimizers may have states of other shapes
        load_optimizer_state(directory / "optimizer.pt", parameters, self._load_optimizer_state)
        load_scheduler_state(directory / "scheduler.pt", self.scheduler)

    def _optimizer_state(self, *, keep: bool) -> OptimizerState:
        """
        The optimizer's state, whole; ranks with `keep=False` need not hold all of it.
        Collective: every rank must call this.
        """
        state: OptimizerState = self.optimizer.state_dict()
        return state

    def _load_optimizer_state(self, state: OptimizerState) -> None:
        self.optimizer.load_state_dict(state)


class Fsdp2Network(SavedNetwork):
    """
    A network under FSDP2. Between passes a rank holds only its shards of weights, gradients and the optimizer's state.
    On the disk they are whole, so that a run with another number of ranks, or with DDP, can continue from them.
    """

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext()  # gradients are in shards after every pass: without a reduction they would stay whole

    def _clip(self, max_norm: float) -> float:
        self.accelerator.unscale_gradients(self.optimizer)
        return float(whole_tensor(nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)))

    @contextmanager
    def whole(self) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        root: Any = self.module
        root.set_reshard_after_forward(False)
        for unit in root.modules():
            if isinstance(unit, FSDPModule):
                unit.unshard()
        try:
            yield
        finally:
            root.set_reshard_after_forward(True)
            # Shard again, and forget the order of these passes: ranks differ in it, and would prefetch differently.
            root.reset_iter_state()

    def _optimizer_state(self, *, keep: bool) -> OptimizerState:
        state = super()._optimizer_state(keep=keep)  # whose inner dicts are the optimizer's own
        whole: dict[int, dict[str, object]] = {}
        for index, of_parameter in state["state"].items():
            gathered_state = {name: whole_tensor(value) for name, value in of_parameter.items()}
            if keep:
                whole[index] = {n: v.cpu() if torch.is_tensor(v) else v for n, v in gathered_state.items()}
        return {**state, "state": whole}

    def _load_optimizer_state(self, state: OptimizerState) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, of_parameter in state["state"].items():
            for name, value in of_parameter.items():
                if torch.is_tensor(value) and value.dim():  # the count of steps has no dimension
                    of_parameter[name] = shard_like(value, parameters[index])
        super()._load_optimizer_state(state)


class DeepSpeedNetwork(SavedNetwork):
    """A network under DeepSpeed's ZeRO: `module` is its engine, which clips and steps by itself."""

    @property
    def engine(self) -> Any:
        return self.module

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def step(self, max_grad_norm: float, agree: Callable[[bool], bool], before: Callable[[], None]) -> float | None:
        before()
        self.engine.step()  # clips at the configuration's `gradient_clipping`, which is `max_grad_norm`
        norm = self.engine.get_global_grad_norm()
        if norm is None or overflowed(self.engine):
            return None
        norm = float(norm)
        return norm if math.isfinite(norm) and norm >= 0.0 else None  # -1 means that it is not a number

    @contextmanager
    def whole(self) -> Iterator[None]:
        if not any(map(is_sharded, self.engine.parameters())):
            yield
            return
        with gathered(self.engine.parameters()):
            pause_zero_hooks(self.engine)
            try:
                yield
            finally:
                resume_zero_hooks(self.engine)

    def save_state(self, directory: Path, *, is_writer: bool) -> None:
        # Every rank writes its shards, those of the weights among them.
        self.engine.save_checkpoint(str(directory), tag=SHARDS, save_latest=False)
        if is_writer:
            torch.save(self.scheduler.state_dict(), directory / "scheduler.pt")

    def load_state(self, directory: Path) -> None:
        self.load_shards(directory)
        load_scheduler_state(directory / "scheduler.pt", self.scheduler)

    def load_shards(self, directory: Path) -> None:
        """Load weights and the optimizer's state. DeepSpeed unpickles them, so they must be trusted."""
        if not (directory / SHARDS).is_dir():
            raise CheckpointError(f"{directory} holds no shards of DeepSpeed's; it was written by another engine")
        with reading(directory, SHARDS):
            self.engine.load_checkpoint(str(directory), tag=SHARDS, load_lr_scheduler_states=False)


def innermost(optimizer: Any) -> Any:
    """The optimizer that accelerate or a distributed engine has wrapped."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def engine_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The type that DeepSpeed or FSDP2 gives the weights of layers in mixed precision; `None`: their own."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED and not is_fsdp2(accelerator):
        return None
    return HALF_DTYPES.get(accelerator.mixed_precision)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters as engines do: buffers, such as the frequencies of rotary positions, keep their type."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def hold_in_float32(accelerator: Accelerator, network: nn.Module, name: str) -> None:
    """
    Hold what is trained in float32 where mixed precision is on. An optimizer's step is often smaller than half the
    distance between two numbers of bfloat16, and would be rounded away. DeepSpeed keeps float32 copies by itself.

    Without mixed precision, weights in bfloat16 or float16 stay as they are, and a warning names the cure.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Knows the precision.
        network (`torch.nn.Module`):
            The model; changed in place.
        name (`str`):
            What messages call it.
    """
    trained = [p for p in network.parameters() if p.requires_grad and p.dtype in HALF_DTYPES.values()]
    if not trained:
        return
    dtype = str(trained[0].dtype).removeprefix("torch.")
    if accelerator.mixed_precision == "no":
        logger.warning(
            f"`{name}` trains weights in {dtype} without mixed precision: steps of the optimizer that are smaller "
            "than what it can tell apart are lost, and most weights hardly move. Set `bf16=True`, which holds them in "
            "float32, or load the model with dtype=torch.float32"
        )
    elif accelerator.distributed_type != DistributedType.DEEPSPEED:
        for parameter in trained:
            parameter.data = parameter.data.float()
        count = sum(parameter.numel() for parameter in trained)
        logger.info(f"`{name}`: {count:,} trained weights are held in float32; they were loaded in {dtype}")


def build_networks(
    args: StepPOConfig,
    accelerator: Accelerator,
    policy: nn.Module,
    critic: nn.Module | None,
    *,
    optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None],
    decay_parameter_names: Callable[[nn.Module], list[str]],
) -> tuple[SavedNetwork, SavedNetwork | None]:
    """
    Place policy and critic on the device, with an optimizer and a schedule of its own each, or with one that the user
    made for both.

    Args:
        args ([`StepPOConfig`]):
            `optim`, `learning_rate`, `critic_learning_rate`, `weight_decay`, and the schedule's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Wraps what it is given for distributed training.
        policy (`torch.nn.Module`), critic (`torch.nn.Module`, *optional*):
            What to train.
        optimizers (`tuple`):
            The trainer's argument: an optimizer over the parameters of both, and its scheduler; each may be `None`.
        decay_parameter_names (`Callable`):
            Names of a network's parameters that weight decay applies to.

    Raises:
        ConfigurationError: If the given optimizer holds none of a network's parameters, or there is a scheduler
            without one.
    """
    networks = [network for network in (policy, critic) if network is not None]
    given, given_scheduler = optimizers
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        found = _build_engines(args, accelerator, networks, decay_parameter_names)
        return found[0], found[1] if critic is not None else None
    if is_fsdp2(accelerator):
        found = _build_shards(args, accelerator, networks, decay_parameter_names)
        return found[0], found[1] if critic is not None else None
    networks = [network.to(accelerator.device) for network in networks]
    if given is not None:
        _check_optimizer(args, given, policy, critic)
        scheduler = given_scheduler if given_scheduler is not None else make_scheduler(args, given)
        *prepared, optimizer = accelerator.prepare(*networks, given)
        found = [SavedNetwork(module, optimizer, scheduler, accelerator) for module in prepared]
    elif given_scheduler is not None:
        raise ConfigurationError(
            "`optimizers` has a scheduler without an optimizer; pass both, or choose a schedule by `lr_scheduler_type`"
        )
    else:
        found = []
        for network, learning_rate in zip(networks, _learning_rates(args), strict=False):
            optimizer = make_optimizer(args, network, learning_rate, set(decay_parameter_names(network)))
            scheduler = make_scheduler(args, optimizer)
            module, optimizer = accelerator.prepare(network, optimizer)
            found.append(SavedNetwork(module, optimizer, scheduler, accelerator))
    return found[0], found[1] if critic is not None else None


def _learning_rates(args: StepPOConfig) -> tuple[float, float]:
    """The learning rates of the policy and of the critic."""
    return args.learning_rate, args.learning_rate if args.critic_learning_rate is None else args.critic_learning_rate


def _build_shards(
    args: StepPOConfig,
    accelerator: Accelerator,
    networks: list[nn.Module],
    decay_parameter_names: Callable[[nn.Module], list[str]],
) -> list[SavedNetwork]:
    """Put networks in FSDP2's shards, which go to the device by themselves: it need not hold all."""
    found: list[SavedNetwork] = []
    for network, learning_rate in zip(networks, _learning_rates(args), strict=False):
        shard(network, accelerator)
        optimizer = make_optimizer(args, network, learning_rate, set(decay_parameter_names(network)))
        scheduler = make_scheduler(args, optimizer)
        found.append(Fsdp2Network(network, accelerator.prepare_optimizer(optimizer), scheduler, accelerator))
    return found


def _build_engines(
    args: StepPOConfig,
    accelerator: Accelerator,
    networks: list[nn.Module],
    decay_parameter_names: Callable[[nn.Module], list[str]],
) -> list[SavedNetwork]:
    """
    An engine for each network. One for both would have one step for both: a critic that warms up, or makes more epochs
    than the policy, would drag the policy along by its optimizer's momentum.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    if config.get("gradient_clipping", "auto") not in ("auto", args.max_grad_norm):
        raise ConfigurationError(
            f"DeepSpeed's `gradient_clipping` is {config['gradient_clipping']}, and `max_grad_norm` is "
            f"{args.max_grad_norm}; write 'auto' there, or leave it out"
        )
    config["gradient_clipping"] = float(args.max_grad_norm or 0.0)
    found: list[SavedNetwork] = []
    for network, learning_rate in zip(networks, _learning_rates(args), strict=False):
        optimizer = make_optimizer(args, network, learning_rate, set(decay_parameter_names(network)))
        forget_engine(accelerator)
        engine, _ = accelerator.prepare(network, optimizer)
        if accelerator.deepspeed_plugin.zero_stage == 3 and not any(map(is_sharded, network.parameters())):
            raise _no_shards("DeepSpeed's ZeRO-3")
        network.prepare_sharding()  # type: ignore[operator]
        # On a CPU-offloaded run the engine has made an optimizer of another class.
        scheduler = make_scheduler(args, basic_optimizer(engine))
        found.append(DeepSpeedNetwork(engine, engine.optimizer, scheduler, accelerator))
    return found


def build_reference(accelerator: Accelerator, scorer: nn.Module) -> nn.Module:
    """Place a frozen network on the device, in the policy's numerics; under ZeRO-3 and FSDP2, in shards."""
    if is_fsdp2(accelerator):
        return shard(scorer, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3:
        engine: nn.Module = frozen_engine(scorer, accelerator)
        scorer.prepare_sharding()  # type: ignore[operator]
        return engine
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # It casts its networks, where accelerate would autocast.
        cast_parameters(scorer, engine_dtype(accelerator) or torch.float32)
    return scorer.to(accelerator.device)


def shard(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    Have FSDP2 keep a network in shards: every layer by itself, and all that is around the layers together.

    Args:
        network (`torch.nn.Module`):
            A [`PolicyScorer`] or a [`Critic`], on any device; changed in place. In mixed precision what is trained is
            float32 by now ([`hold_in_float32`]), and gradients are summed in it.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the ranks, their device, and the precision.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = engine_dtype(accelerator)
    shared: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "reshard_after_forward": True,
        # Inputs and outputs stay as they are: temperatures and log-probabilities are float32.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
        ),
    }
    for layer in decoder_layers(network.model):
        fully_shard(layer, **shared)
    fully_shard(network, **shared)
    for module in network.modules():
        module.register_load_state_dict_pre_hook(take_shards)
    # Now, while adapters are on: or the first layer to run would take itself for the root, and only what happens to be
    # on in the first pass would be trained in float32.
    if not any(map(is_sharded, network.parameters())):
        raise _no_shards("FSDP2")
    become_root(network)
    return network


def _no_shards(engine: str) -> ConfigurationError:
    """Check that no parameter is in shards. The name that tells it is the engine's own, which versions may change."""
    return ConfigurationError(
        f"none of the parameters that {engine} was given is known to be in shards: this version of it is not known "
        "here, and weights would be read and saved in parts; install one that the requirements name"
    )


def make_optimizer(
    args: StepPOConfig, network: nn.Module, learning_rate: float, decays: set[str]
) -> torch.optim.Optimizer:
    """Make the optimizer that `TrainingArguments` choose, over the parameters that require a gradient."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n in decays], "weight_decay": args.weight_decay},
        {"params": [p for n, p in trained if n not in decays], "weight_decay": 0.0},
    ]
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer: torch.optim.Optimizer = optimizer_class(
        [group for group in groups if group["params"]], **{**kwargs, "lr": learning_rate}
    )
    return optimizer


def make_scheduler(args: StepPOConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the schedule of learning rates over the run's updates."""
    total = args.num_total_batches
    assert total is not None
    scheduler: torch.optim.lr_scheduler.LambdaLR = transformers.get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
    return scheduler


def _check_optimizer(args: StepPOConfig, optimizer: object, policy: nn.Module, critic: nn.Module | None) -> None:
    """Check a user's optimizer, one for two networks, as `PPOTrainer` has it."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(
            f"`optimizers` has a {type(optimizer).__name__}; pass a `torch.optim.Optimizer` and its scheduler, or None"
        )
    if args.critic_learning_rate is not None:
        raise ConfigurationError(
            f"`critic_learning_rate`={args.critic_learning_rate} has no effect together with `optimizers`, whose "
            "parameter groups have learning rates of their own; remove one of the two"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, network in (("model", policy), ("value_model", critic)):
        trained = [p for p in network.parameters() if p.requires_grad] if network is not None else []
        if network is not None and not any(id(parameter) in held for parameter in trained):
            raise ConfigurationError(
                f"`optimizers` has an optimizer that holds no parameter of `{name}` that is trained; build it over "
                "those of both, [*model.parameters(), *value_model.parameters()], pass that `value_model`, and a "
                "`PeftModel` instead of `peft_config`"
            )
