"""How a client would like its response sampled: what of it holds, what is refused, and what the client is told."""

from __future__ import annotations

import math
from dataclasses import replace

from ..inference.base import MIN_TEMPERATURE, SamplingParams, step_seed
from .conversation import ModelRequest, RequestError, Wishes
from .sessions import SessionSpec


def check_wishes(spec: SessionSpec, wishes: Wishes) -> None:
    """Refuse, with a `RequestError`, what could not be scored exactly, or not be sampled."""
    if not spec.training:
        if wishes.temperature is not None and 0 < wishes.temperature < MIN_TEMPERATURE:
            problem = f"`temperature` is {wishes.temperature}; give 0, or at least {MIN_TEMPERATURE:g}"
            raise RequestError(400, problem, param="temperature")
        return
    for name, is_restricted in (("top_p", (wishes.top_p or 1.0) < 1.0), ("top_k", (wishes.top_k or 0) > 0)):
        if is_restricted:
            raise RequestError(
                400,
                f"`{name}` restricts sampling, so that a training session could not score its steps exactly; "
                "leave it out (a session that was opened with `training` false takes it)",
                param=name,
            )


def unmet_wishes(spec: SessionSpec, request: ModelRequest) -> dict[str, str]:
    """What of a request does not hold, by the name of the field: what its client is told."""
    wishes, sampling = request.wishes, spec.sampling
    unmet = {name: f"{name} is not used" for name in request.ignored}
    if wishes.max_tokens is not None and wishes.max_tokens > sampling.max_new_tokens:
        unmet["max_tokens"] = f"a response has at most {sampling.max_new_tokens} tokens"
    if spec.training:
        if wishes.temperature is not None and wishes.temperature != sampling.temperature:
            unmet["temperature"] = f"temperature is {sampling.temperature:g}, as the run samples"
        if wishes.seed is not None:
            unmet["seed"] = "seed is the run's own"
    return unmet


def sampling_params(
    spec: SessionSpec,
    wishes: Wishes,
    *,
    prompt_length: int,
    context: int | None,
    stop_token_ids: tuple[int, ...],
    seed_index: int,
) -> SamplingParams:
    """
    How a response is sampled.

    Args:
        spec ([`SessionSpec`]), wishes ([`Wishes`]):
            What the session is allowed, and what the client would like.
        prompt_length (`int`):
            Tokens of the prompt.
        context (`int`, *optional*):
            Maximum number of tokens of a prompt with its response that the policy can read.
        stop_token_ids (`tuple[int, ...]`):
            Where a response ends if the session has no stop tokens of its own.
        seed_index (`int`):
            Which of the session's seeds it is sampled with.
    """
    sampling = spec.sampling
    budget = min(sampling.max_new_tokens, wishes.max_tokens or sampling.max_new_tokens)
    for max_tokens in (spec.limits.max_episode_tokens, context):
        if max_tokens is not None:
            budget = min(budget, max_tokens - prompt_length)
    seed = step_seed(spec.run_seed, spec.stream_position, spec.generation_index, seed_index)
    stop = sampling.stop_token_ids or stop_token_ids
    params = replace(sampling, max_new_tokens=budget, stop_token_ids=stop, seed=seed)
    return params if spec.training else _as_wished(params, wishes)


def _as_wished(params: SamplingParams, wishes: Wishes) -> SamplingParams:
    return replace(
        params,
        temperature=params.temperature if wishes.temperature is None else wishes.temperature,
        top_p=params.top_p if wishes.top_p is None else wishes.top_p,
        top_k=params.top_k if wishes.top_k is None else wishes.top_k,
        seed=params.seed if wishes.seed is None else wishes.seed & (2**63 - 1),  # a client's may be negative
    )


def episode_budget_cuts(spec: SessionSpec, wishes: Wishes, params: SamplingParams, prompt_length: int) -> bool:
    """Whether a response that was cut was cut by the episode's budget of tokens, and not by its own."""
    max_tokens = spec.limits.max_episode_tokens
    response_budget = min(spec.sampling.max_new_tokens, wishes.max_tokens or math.inf)
    if max_tokens is None or params.max_new_tokens >= response_budget:
        return False
    return prompt_length + params.max_new_tokens >= max_tokens
