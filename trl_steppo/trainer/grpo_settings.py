"""The settings of TRL's `GRPOConfig`, and the counterpart of each in a `StepPOConfig`, in one table."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from math import ceil
from typing import TYPE_CHECKING, TypeVar

import transformers
from transformers import TrainingArguments

from ..errors import ConfigurationError
from ..finite import shown
from ..learning.estimators import ESTIMATORS
from ..types import JsonObject

if TYPE_CHECKING:
    from trl import GRPOConfig

Config = TypeVar("Config", bound=type)

logger = transformers.utils.logging.get_logger(__name__)


@dataclass(frozen=True)
class Counterpart:
    """
    What takes the place of a setting of `GRPOConfig`.

    Args:
        words (`str`):
            What to set instead, or why there is nothing; for messages and the documentation.
        field (`str`, *optional*):
            The field of `StepPOConfig` that takes the value as it is.
        taken (`bool`, *optional*, defaults to `True`):
            Whether values are converted ([`converted`] says how), or need no conversion. `False`: any value but the
            default is refused.
        harmless (`tuple`, *optional*):
            Other values that are not refused.
    """

    words: str
    field: str | None = None
    taken: bool = True
    harmless: tuple[object, ...] = ()


def _as(field: str, words: str = "") -> Counterpart:
    return Counterpart(f"`{field}`{words}", field)


def _refused(words: str, *harmless: object) -> Counterpart:
    return Counterpart(words, taken=False, harmless=harmless)


_SERVERS = "an option of the server: `vllm serve "
_ADAPTIVE = "there is no adaptive entropy bonus; set `entropy_coef`"
_SOFT = "belongs to a `loss_type` that there is not here"
_NO_SYNC = "the reference model stays as it is; there is nothing in its place"

COUNTERPARTS: dict[str, Counterpart] = {
    # Models
    "model_init_kwargs": _as("model_init_kwargs"),
    "trust_remote_code": Counterpart("`model_init_kwargs`, with `trust_remote_code`"),
    "router_aux_loss_coef": _refused("there is no auxiliary loss for routers; set it to 0", None, 0, 0.0),
    "disable_dropout": Counterpart("dropout is always off"),
    "cast_lm_head_to_fp32": _refused("logits are computed in the model's type, their log-probabilities in float32"),
    # Data
    "num_generations": _as(
        "num_generations",
        ", a divisor of the episodes that one rank plays for an update (`per_device_train_batch_size` × the larger of "
        "`gradient_accumulation_steps` and `steps_per_generation`), since a row's episodes stay on one rank",
    ),
    "num_generations_eval": _refused("an evaluation plays each row once, greedily", 1),
    "max_completion_length": Counterpart(
        "`response_length`, which is the budget of each response; that of a whole episode, its prompt and its "
        "observations included, is `max_episode_tokens`"
    ),
    "ds3_gather_for_generation": _as("ds3_gather_for_generation"),
    "shuffle_dataset": _refused("rows are always shuffled, by `data_seed`", None),
    "pad_to_multiple_of": Counterpart("rows are packed, not padded to a multiple"),
    "generation_batch_size": Counterpart(
        "`per_device_train_batch_size` × `gradient_accumulation_steps` × ranks, the episodes of an update"
    ),
    "steps_per_generation": Counterpart(
        "`gradient_accumulation_steps`, the micro-batches of an update, of which `num_mini_batches` equal optimizer "
        "steps are made; it and `gradient_accumulation_steps` of GRPOConfig must divide one another"
    ),
    # Sampling
    "temperature": _as("temperature"),
    "top_p": _as("top_p"),
    "top_k": Counterpart("`top_k`"),
    "min_p": _refused("there is no `min_p`; `top_p` and `top_k` restrict sampling", 0.0),
    "generation_kwargs": _refused("set `temperature`, `top_p`, `top_k`, `response_length` and `stop_token_id`", {}),
    "chat_template_kwargs": _as("chat_template_kwargs"),
    "repetition_penalty": _refused("responses are sampled from the distribution that is trained"),
    "cache_implementation": _refused("the sampler has its own cache; see `rollout_cache_tokens`"),
    "use_transformers_continuous_batching": Counterpart("the sampler always batches continuously"),
    "use_transformers_paged": Counterpart("the sampler always batches continuously"),
    "transformers_continuous_batching_config": _refused("see `rollout_cache_tokens`, `max_concurrent_episodes`", {}),
    # vLLM
    "use_vllm": Counterpart("`use_vllm`"),
    "vllm_mode": Counterpart(
        "`use_vllm` for 'server', with servers that `vllm serve` started; the in-process sampler takes the place of "
        "'colocate'"
    ),
    "vllm_server_base_url": Counterpart("`vllm_server_base_url`"),
    "vllm_server_host": Counterpart("`vllm_server_base_url`"),
    "vllm_server_port": Counterpart("`vllm_server_base_url`"),
    "vllm_server_timeout": Counterpart("`vllm_server_timeout`"),
    "vllm_group_port": Counterpart("weights are sent as `vllm_weight_transfer` says, on a port that is found"),
    "vllm_model_impl": Counterpart(f"{_SERVERS}--model-impl`"),
    "vllm_enable_sleep_mode": Counterpart(f"{_SERVERS}--enable-sleep-mode`"),
    "vllm_structured_outputs_regex": _refused("responses are sampled from the distribution that is trained"),
    "vllm_gpu_memory_utilization": Counterpart(f"{_SERVERS}--gpu-memory-utilization`"),
    "vllm_max_model_length": Counterpart(f"{_SERVERS}--max-model-len`"),
    "vllm_tensor_parallel_size": Counterpart(f"{_SERVERS}--tensor-parallel-size`"),
    "vllm_importance_sampling_correction": Counterpart("`rollout_correction`"),
    "vllm_importance_sampling_mode": Counterpart(
        "`rollout_correction` and `rollout_correction_level`; a mask here leaves out what is below "
        "1 / `rollout_correction_cap`, too"
    ),
    "vllm_importance_sampling_clip_max": Counterpart("`rollout_correction_cap`"),
    "vllm_importance_sampling_clip_min": _refused("the lower bound of a mask is 1 / `rollout_correction_cap`"),
    "vllm_importance_sampling_cap": Counterpart("`rollout_correction_cap`"),
    # The algorithm
    "beta": _as("kl_loss_coef", ", the coefficient of the KL in the loss; `kl_coef` is that of the KL in the reward"),
    "use_bias_correction_kl": Counterpart(
        "`kl_loss_estimator`: 'k2', whose gradient is the same before the weights have moved, or 'k3' without"
    ),
    "num_iterations": _as("num_ppo_epochs"),
    "epsilon": _as("cliprange"),
    "epsilon_high": _as("cliprange_high"),
    "delta": _refused("the ratio has one clip range on each side, `cliprange` and `cliprange_high`"),
    "importance_sampling_level": Counterpart("`importance_sampling_level`: 'token', or 'step' for 'sequence'"),
    "loss_type": Counterpart(
        "`loss_aggregation`: 'token' for 'dapo' and 'bnpo', 'episode' for 'grpo'; there is no other loss here"
    ),
    "scale_rewards": Counterpart(
        "`advantage_estimator`: 'grpo' divides by the standard deviation of a row's episodes; 'rloo' does not"
    ),
    "reward_weights": _as("reward_weights"),
    "multi_objective_aggregation": _refused("weighted rewards are added up before they are normalized"),
    "mask_truncated_completions": _as("mask_truncated_completions"),
    "entropy_coef": _as("entropy_coef"),
    "use_adaptive_entropy": _refused(_ADAPTIVE),
    "entropy_coef_min": _refused(_ADAPTIVE),
    "entropy_coef_max": _refused(_ADAPTIVE),
    "entropy_coef_delta": _refused(_ADAPTIVE),
    "entropy_target": _refused(_ADAPTIVE),
    "top_entropy_quantile": _refused("the loss is of all action tokens"),
    "off_policy_mask_threshold": _refused("there is `rollout_correction`"),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _refused(_NO_SYNC)),
    **dict.fromkeys(
        ("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
        _refused(_SOFT),
    ),
    "vespo_lambda_neg": _refused(_SOFT),
    # Episodes
    "max_tool_calling_iterations": Counterpart(
        "`max_interaction_steps`, which counts responses: one more than turns with tool calls; `None` is no limit"
    ),
    # Logging
    "log_completions": Counterpart("`num_sample_generations`, and `log_episodes` for `trl-steppo report`"),
    "num_completions_to_print": Counterpart("`log_episodes`"),
    "log_multimodal": Counterpart("there are no images to log"),
    "log_unique_prompts": Counterpart("all of a row's episodes are shown"),
    "log_completions_hub_repo": _refused("`log_episodes` writes to `output_dir`, which `push_to_hub` uploads"),
}
"""Every setting of `GRPOConfig` besides those of `TrainingArguments`, of all versions of TRL that can be used."""

_LOSSES = {"dapo": "token", "bnpo": "token", "grpo": "episode"}
_LEVELS = {"token": "token", "sequence": "step"}
_COUNTED_IN_STEPS = ("max_steps", "warmup_steps", "logging_steps", "eval_steps", "save_steps")
_COUNTED_IN_STEPS_BY_SCHEDULES = ("num_decay_steps", "num_stable_steps")
_TRL_CORRECTION = ("sequence_mask", 3.0)
"""TRL's default mode and cap. With these, the run has this trainer's own default correction, which is per token."""


def converted(args: GRPOConfig, *, advantage_estimator: str) -> JsonObject:
    """
    Convert the settings of a `GRPOConfig` to those of a `StepPOConfig` that mean the same.

    Args:
        args ([`~trl.GRPOConfig`]):
            TRL's configuration.
        advantage_estimator (`str`):
            The estimator of the new configuration.

    Returns:
        `dict[str, Any]`: Every field that differs, or may differ, from its default, and the fields of
        `TrainingArguments`.

    Raises:
        ConfigurationError: If some settings have values without a counterpart. The message lists all of them.
    """
    values = {f.name: getattr(args, f.name) for f in fields(TrainingArguments) if f.init}
    faults = _unusable(args)
    values |= {c.field: getattr(args, name) for name, c in COUNTERPARTS.items() if c.field and hasattr(args, name)}
    if args.trust_remote_code:
        values["model_init_kwargs"] = {"trust_remote_code": True, **(values["model_init_kwargs"] or {})}
    for convert in (_batches, _responses, _loss, _vllm):
        convert(args, values, faults)
    estimator = ESTIMATORS.get(advantage_estimator)  # an unknown name is refused with the new configuration
    if estimator is not None and estimator.usual_ratio == "step":  # unless another ratio or average is asked for
        defaults = {f.name: f.default for f in fields(args)}
        if args.importance_sampling_level == defaults["importance_sampling_level"]:
            del values["importance_sampling_level"]
        if args.loss_type == defaults["loss_type"]:
            del values["loss_aggregation"]
    compares_episodes = estimator is not None and estimator.compares_episodes
    if args.scale_rewards != "group" and (
        advantage_estimator == "grpo" or (args.scale_rewards == "batch" and compares_episodes)
    ):
        faults["scale_rewards"] = args.scale_rewards
    if faults:
        lines = (f"- `{name}`={shown(value)}: {COUNTERPARTS[name].words}" for name, value in faults.items())
        raise ConfigurationError(
            "these settings of the GRPOConfig have no place in a StepPOConfig as they are; change them there, and "
            "set what is named here:\n" + "\n".join(lines)
        )
    return values


def _unusable(args: GRPOConfig) -> dict[str, object]:
    """The settings that are refused, with their values."""
    unusable: dict[str, object] = {}
    for field in fields(args):
        counterpart = COUNTERPARTS.get(field.name)
        if counterpart is None or counterpart.taken:
            continue
        value = getattr(args, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default and value not in counterpart.harmless:
            unusable[field.name] = value
    return unusable


def _batches(args: GRPOConfig, values: JsonObject, faults: dict[str, object]) -> None:
    """
    Convert sizes and intervals. An update here is what GRPOTrainer samples at a time: `steps_per_generation`
    micro-batches, which make optimizer steps of `gradient_accumulation_steps` each; or several times that, where an
    optimizer step has more micro-batches.
    """
    generated, accumulated = args.steps_per_generation, args.gradient_accumulation_steps
    assert generated is not None, "GRPOConfig fills it in"
    values["gradient_accumulation_steps"] = max(generated, accumulated)
    values["num_mini_batches"] = max(1, generated // accumulated)
    repeats = generated < accumulated and args.num_iterations > 1  # within one optimizer step
    if max(generated, accumulated) % min(generated, accumulated) or repeats:
        faults["steps_per_generation"] = generated
    if args.per_device_train_batch_size * values["gradient_accumulation_steps"] % args.num_generations:
        faults["num_generations"] = args.num_generations
    # In a GRPOConfig a step is an optimizer step, here it is an update.
    steps = values["num_mini_batches"] * args.num_iterations
    for name in _COUNTED_IN_STEPS:
        value = values[name]
        if value is not None and value >= 1:  # below 1 it is a part of the run, and -1 means no limit
            values[name] = value // steps if name == "warmup_steps" else ceil(value / steps)
    if values["eval_strategy"] == "steps":
        values["eval_delay"] = ceil((values["eval_delay"] or 0) / steps)
    of_schedule = values["lr_scheduler_kwargs"]
    if isinstance(of_schedule, dict):
        values["lr_scheduler_kwargs"] = {
            name: ceil(value / steps) if name in _COUNTED_IN_STEPS_BY_SCHEDULES and value else value
            for name, value in of_schedule.items()
        }


def _responses(args: GRPOConfig, values: JsonObject, faults: dict[str, object]) -> None:
    if args.max_completion_length is None:
        faults["max_completion_length"] = None
    values["response_length"] = args.max_completion_length
    values["top_k"] = max(args.top_k or 0, 0)
    turns = args.max_tool_calling_iterations
    values["max_interaction_steps"] = None if turns is None else turns + 1
    if not args.log_completions:
        values["num_sample_generations"] = 0
    else:
        played = args.per_device_train_batch_size * values["gradient_accumulation_steps"]
        wanted = args.num_completions_to_print
        values["log_episodes"] = played if wanted is None else min(wanted, played)


def _loss(args: GRPOConfig, values: JsonObject, faults: dict[str, object]) -> None:
    for name, field, names in (
        ("loss_type", "loss_aggregation", _LOSSES),
        ("importance_sampling_level", "importance_sampling_level", _LEVELS),
    ):
        values[field] = names.get(getattr(args, name))
        if values[field] is None:
            faults[name] = getattr(args, name)
    if args.beta:
        values["kl_loss_estimator"] = "k2" if args.use_bias_correction_kl else "k3"


def _vllm(args: GRPOConfig, values: JsonObject, faults: dict[str, object]) -> None:
    values["use_vllm"] = args.use_vllm and args.vllm_mode == "server"
    if not values["use_vllm"]:
        if args.use_vllm:
            logger.warning(f"`vllm_mode` is {args.vllm_mode!r}; the in-process sampler takes the place of vLLM")
        return
    host = "localhost" if args.vllm_server_host in ("0.0.0.0", "::") else args.vllm_server_host
    values["vllm_server_base_url"] = args.vllm_server_base_url or f"http://{host}:{args.vllm_server_port}"
    values["vllm_server_timeout"] = args.vllm_server_timeout
    mode, cap = args.vllm_importance_sampling_mode, args.vllm_importance_sampling_clip_max
    level, _, kind = mode.partition("_")
    if not args.vllm_importance_sampling_correction:
        values["rollout_correction"] = "none"
    elif (level, kind) == ("token", "truncate") and cap is not None:
        values |= {"rollout_correction": kind, "rollout_correction_level": "token", "rollout_correction_cap": cap}
    elif (mode, cap) != _TRL_CORRECTION:
        # The weight of a step is here the geometric mean over its tokens, and there their product: no cap fits both.
        faults["vllm_importance_sampling_mode" if cap is not None else "vllm_importance_sampling_clip_max"] = (
            mode if cap is not None else cap
        )


# -- unknown settings -------------------------------------------------------------------------------------------------


def explain_unknown(names: Iterable[str], known: Iterable[str]) -> str:
    """
    Describe what to set instead of settings that do not exist, one a line.

    Args:
        names (`Iterable[str]`):
            Names of settings that do not exist.
        known (`Iterable[str]`):
            Names of all settings.
    """
    known = list(known)
    lines = []
    for name in names:
        close = difflib.get_close_matches(name, known, n=1)
        if name in COUNTERPARTS:
            lines.append(f"- `{name}` (of GRPOConfig): {COUNTERPARTS[name].words}")
        else:
            lines.append(f"- `{name}`" + (f": did you mean `{close[0]}`?" if close else ""))
    return "\n".join(lines)


def names_unknown_settings(config: Config) -> Config:
    """Class decorator: the constructor of a dataclass names all unknown settings at once, and what to set instead."""
    init: Callable[..., None] = config.__init__  # type: ignore[misc]
    known = [f.name for f in fields(config) if f.init]

    @functools.wraps(init)
    def checked_init(self: object, *args: object, **settings: object) -> None:
        _refuse_unknown(config.__name__, settings, known)
        init(self, *args, **settings)

    config.__init__ = checked_init  # type: ignore[misc]
    return config


def _refuse_unknown(config: str, settings: Mapping[str, object], known: list[str]) -> None:
    unknown = [name for name in settings if name not in known]
    if unknown:
        source = "; `StepPOConfig.from_grpo_config` converts those of a GRPOConfig"
        raise ConfigurationError(
            f"{config} does not have these settings{source if COUNTERPARTS.keys() & unknown else ''}:\n"
            + explain_unknown(unknown, known)
        )
