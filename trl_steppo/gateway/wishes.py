"""Sampling settings that clients ask for: which hold, which are refused, and what the client is told."""

from __future__ import annotations

from dataclasses import replace

from ..episodes import EpisodeSpec
from ..inference.base import MIN_TEMPERATURE, SamplingParams
from .conversation import ModelRequest, RequestError, Wishes

_JSON_IS_ASKED_FOR = "the response is sampled freely: it is JSON only if the prompt has the policy write it"
_WHY_IGNORED = {name: f"{name} is not used: {_JSON_IS_ASKED_FOR}" for name in ("response_format", "text.format")}


def check_wishes(spec: EpisodeSpec, wishes: Wishes) -> None:
    """Raise a `RequestError` for settings that could not be sampled, or not be scored exactly in training."""
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


def unmet_wishes(spec: EpisodeSpec, request: ModelRequest) -> dict[str, str]:
    """What a client is told of the settings that do not hold, by the name of their field."""
    wishes, sampling = request.wishes, spec.sampling
    unmet = {name: _WHY_IGNORED.get(name, f"{name} is not used") for name in request.ignored}
    if wishes.max_tokens is not None and wishes.max_tokens > sampling.max_new_tokens:
        unmet["max_tokens"] = f"a response has at most {sampling.max_new_tokens} tokens"
    if spec.training:
        if wishes.temperature is not None and wishes.temperature != sampling.temperature:
            unmet["temperature"] = f"temperature is {sampling.temperature:g}, as the run samples"
        if wishes.seed is not None:
            unmet["seed"] = "seed is the run's own"
    return unmet


def sampling_params(
    spec: EpisodeSpec,
    wishes: Wishes,
    seed_index: int,
    prompt_length: int,
    *,
    stop_token_ids: tuple[int, ...] = (),
    context: int | None = None,
) -> SamplingParams:
    """Sampling parameters of a response: those of [`EpisodeSpec.params`], and outside of training the client's."""
    max_tokens = wishes.max_tokens
    params = spec.params(
        seed_index, prompt_length, stop_token_ids=stop_token_ids, max_tokens=max_tokens, context=context
    )
    if spec.training:
        return params
    return replace(
        params,
        temperature=params.temperature if wishes.temperature is None else wishes.temperature,
        top_p=params.top_p if wishes.top_p is None else wishes.top_p,
        top_k=params.top_k if wishes.top_k is None else wishes.top_k,
        seed=params.seed if wishes.seed is None else wishes.seed & (2**63 - 1),  # a client's may be negative
    )
