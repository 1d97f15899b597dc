"""
What a run needs of a GPU's memory, from the model's configuration alone.

An estimate, in the terms that papers on ZeRO use (arXiv 1910.02054): what is held all the time (weights, optimizer
states), what training adds, and what a rollout adds. Of the last two only the larger counts, since they alternate;
where a process beside the trainer samples, what it needs is held all the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .shapes import Shape

LaunchKind = Literal["single", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2"]
SamplesIn = Literal["trainer", "worker", "vllm"]

GIB = 2**30
GPU_SIZES = (24, 40, 80)  # GB, as they are sold
RESERVED = 1.5 * GIB  # the CUDA context, and what the allocator cannot use
_LOGITS_BYTES = 16  # of each: as computed, in float32, its log-probability, its gradient
_BUCKET = 5e8  # parameters in the buffer through which a DeepSpeed engine reduces gradients; its default
_LIVE = 1e9  # parameters that ZeRO-3 keeps gathered at a time; its default
_SAMPLING_BYTES = 24  # of a logit in sampling: in float32, its log-probability, its cumulative sum in float64


@dataclass(frozen=True)
class Setting:
    """
    The part of a run's settings that decides its memory.

    Args:
        launch (`str`):
            `"single"`, `"ddp"`, `"zero2"`, `"zero3"`, `"zero3_offload"` or `"fsdp2"`, as the shipped accelerate files.
        num_gpus (`int`):
            Ranks.
        weights (`str`, *optional*, defaults to `"float32"`):
            Type that the weights are loaded in. With `bf16` it makes a difference only to those that are not trained:
            trained ones are held in float32 (under DeepSpeed all are bfloat16, beside its float32 copies).
        bf16 (`bool`, *optional*, defaults to `True`):
            Mixed precision.
        critic, reference (`bool`, *optional*):
            Whether there is one.
        lora_rank (`int`, *optional*, defaults to `0`):
            Rank of adapters on all linear layers; 0: everything is trained.
        critic_shares_base (`bool`, *optional*, defaults to `False`):
            Whether the critic's adapter stands on the policy's weights.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether only the layers' inputs are kept.
        micro_batch_tokens (`int`, *optional*, defaults to `16384`):
            Tokens of a forward and backward pass.
        cache_tokens (`int`, *optional*, defaults to `262144`):
            `rollout_cache_tokens`.
        concurrent_episodes (`int`, *optional*, defaults to `64`):
            Episodes sampled at once.
        samples_in (`str`, *optional*, defaults to `"trainer"`):
            What samples: the trainer itself, a `"worker"` process on the same GPU (`max_staleness`,
            `use_rollout_worker`), or `"vllm"` servers on other ones (`use_vllm`).
    """

    launch: LaunchKind
    num_gpus: int
    weights: Literal["float32", "bfloat16"] = "float32"
    bf16: bool = True
    critic: bool = True
    reference: bool = False
    lora_rank: int = 0
    critic_shares_base: bool = False
    gradient_checkpointing: bool = True
    micro_batch_tokens: int = 16_384
    cache_tokens: int = 262_144
    concurrent_episodes: int = 64
    samples_in: SamplesIn = "trainer"

    @property
    def shards(self) -> int:
        return self.num_gpus if self.deepspeed or self.fsdp2 else 1

    @property
    def shards_weights(self) -> bool:
        return self.launch.startswith("zero3") or self.fsdp2

    @property
    def weight_shards(self) -> int:
        return self.num_gpus if self.shards_weights else 1

    @property
    def deepspeed(self) -> bool:
        return self.launch.startswith("zero")

    @property
    def fsdp2(self) -> bool:
        return self.launch == "fsdp2"

    @property
    def loaded(self) -> str:
        """The weights' type while a run is going on: trained ones become float32 where autocast makes bfloat16."""
        becomes_float32 = self.bf16 and not self.runs_in_bf16 and not self.lora_rank
        return "float32" if becomes_float32 else self.weights

    @property
    def runs_in_bf16(self) -> bool:
        """Whether an engine gives the layers bfloat16 weights, instead of casts by autocast."""
        return self.bf16 and (self.deepspeed or self.fsdp2)


@dataclass(frozen=True)
class Plan:
    """
    Bytes on each GPU, by what they are for.

    Args:
        held (`dict[str, float]`):
            All the time.
        training (`dict[str, float]`):
            Added while a network is updated.
        rollout (`dict[str, float]`):
            Added while episodes are played.
        host (`dict[str, float]`):
            In the host's memory, for each GPU.
    """

    held: dict[str, float]
    training: dict[str, float]
    rollout: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + max(sum(self.training.values()), sum(self.rollout.values()))

    @property
    def fits(self) -> int | None:
        """The smallest GPU, in GB, that holds it with what CUDA takes for itself; `None`: none of them."""
        return next((size for size in GPU_SIZES if self.peak + RESERVED <= size * 1e9), None)


def plan(shape: Shape, setting: Setting) -> Plan:
    """
    Memory of a run on each GPU.

    Args:
        shape ([`Shape`]):
            Of the policy; the critic has its backbone.
        setting ([`Setting`]):
            The run.
    """
    from ..models.forward import LOGITS_ELEMENTS

    backbone = shape.parameters - shape.head_parameters
    policy = _network(shape, setting, shape.parameters, "policy")
    critic = _network(shape, setting, backbone + shape.hidden, "critic") if setting.critic else _Network({}, 0.0, 0.0)
    frozen = _frozen_bytes(setting)
    needs_copy = setting.reference and not setting.lora_rank
    held = policy.held | critic.held
    if needs_copy:
        held["reference"] = shape.parameters * frozen / setting.weight_shards
    if setting.deepspeed:
        trained = [shape.parameters, backbone][: 1 + setting.critic]
        held["communication buffers"] = sum(min(_BUCKET, parameters) for parameters in trained) * frozen
    gathered = 2.0 if setting.runs_in_bf16 else frozen
    live = min(_LIVE, shape.parameters) * gathered if setting.shards_weights else 0.0
    if setting.fsdp2:
        around, layer = _units(shape)
        # What is around the layers stays until the end, with its gradients; a unit's gradients are summed in float32.
        live = 2 * (around + layer) * gathered + max(around, layer) * 4.0
    training = {
        "gradients": max(policy.gradients, critic.gradients),
        "activations": _activations(shape, setting),
        "logits": float(LOGITS_ELEMENTS * _LOGITS_BYTES),
        "gathered or cast weights": max(live, _cast_bytes(shape, setting)),
    }
    host = {"optimizers": policy.host + critic.host} if policy.host + critic.host else {}
    if setting.samples_in == "vllm":
        return Plan(held, training, {}, host)
    rollout = _sampling(shape, setting)
    if setting.samples_in == "trainer":
        whole = shape.parameters * gathered if setting.shards_weights else _cast_bytes(shape, setting)
        return Plan(held, training, {**rollout, "gathered or cast weights": whole}, host)
    copy = shape.parameters * (2.0 if setting.runs_in_bf16 or setting.loaded == "bfloat16" else 4.0)
    casts = _cast_bytes(shape, setting)
    worker = {"policy": copy, "cast weights": casts, **rollout, "CUDA": RESERVED}
    held |= {f"worker's {name}": size for name, size in worker.items()}
    return Plan(held, training, {}, {**host, "weights on their way to the worker": copy})


@dataclass(frozen=True)
class _Network:
    held: dict[str, float]
    gradients: float
    host: float


def _network(shape: Shape, setting: Setting, parameters: int, name: str) -> _Network:
    """Weights, optimizer states and gradients of one network in training."""
    trained = parameters
    if setting.lora_rank:
        trained = sum(setting.lora_rank * (a + b) for a, b in shape.linear)
    # Of those that are trained.
    weight = 4.0 if setting.bf16 and not setting.deepspeed else _frozen_bytes(setting)
    base = 0 if setting.lora_rank and setting.critic_shares_base and name == "critic" else parameters
    adapter = trained if setting.lora_rank else 0
    base_weight = _frozen_bytes(setting) if setting.lora_rank else weight
    weights = (base * base_weight + adapter * weight) / setting.weight_shards
    # Adam's two moments; DeepSpeed keeps a float32 copy of the weights beside them.
    states = trained * (12.0 if setting.deepspeed else 2.0 * weight) / setting.shards
    gradients = trained * weight / setting.shards
    if setting.launch == "ddp":
        gradients *= 2  # its buckets
    if setting.launch == "zero3_offload":
        return _Network({f"{name}'s weights": weights}, gradients, states + trained * 4.0 / setting.shards)
    return _Network({f"{name}'s weights": weights, f"{name}'s optimizer": states}, gradients, 0.0)


def _sampling(shape: Shape, setting: Setting) -> dict[str, float]:
    """What a rollout needs beside the weights."""
    compute = _compute_bytes(setting)
    return {
        "generation cache": float(setting.cache_tokens * shape.layers * 2 * shape.keys * compute),
        "sampling": float(setting.concurrent_episodes * shape.vocabulary * _SAMPLING_BYTES),
    }


def _compute_bytes(setting: Setting) -> int:
    """Bytes of a number that a layer computes."""
    return 2 if setting.bf16 or setting.weights == "bfloat16" else 4


def _frozen_bytes(setting: Setting) -> float:
    """Bytes of a weight on the GPU."""
    return 2.0 if setting.loaded == "bfloat16" or (setting.deepspeed and setting.bf16) else 4.0


def _units(shape: Shape) -> tuple[float, float]:
    """Parameters that FSDP2 gathers together: all around the layers, and those of a layer."""
    layer = sum(a * b for a, b in shape.linear) / shape.layers
    return shape.parameters - layer * shape.layers, layer


def _cast_bytes(shape: Shape, setting: Setting) -> float:
    """Autocast keeps a bfloat16 copy of each weight for as long as it lasts."""
    casts = setting.bf16 and not setting.runs_in_bf16 and setting.loaded == "float32"
    return shape.parameters * 2.0 if casts else 0.0


def _activations(shape: Shape, setting: Setting) -> float:
    """
    What a backward pass needs, for all tokens of a micro-batch: of each layer, the norms' inputs in float32, the
    inputs and outputs of its linear layers, and queries, keys and values before and after their rotation.
    """
    compute = _compute_bytes(setting)
    stream = 4 if setting.loaded == "float32" and not setting.runs_in_bf16 else 2
    H, I = shape.hidden, shape.intermediate  # noqa: E741
    layer = (16 + 2 * stream) * H + compute * (2 * H + 3 * shape.queries + 4 * shape.keys + 4 * I)
    if not setting.gradient_checkpointing:
        return float(setting.micro_batch_tokens * layer * shape.layers)
    return float(setting.micro_batch_tokens * (stream * H * shape.layers + layer))
