"""The in-process sampler equals a plain forward pass over prompt and response, whatever shares its batch."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

from trl_steppo.compat import transformers as compat
from trl_steppo.errors import ConfigurationError, DataError, RolloutError
from trl_steppo.inference import cached_rows
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.inference.local import LocalSampler, sample_tokens
from trl_steppo.numerics import Numerics
from trl_steppo.types import StopReason

ARCHITECTURES = ["Llama", "Qwen2", "Qwen3"]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15]]
GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)
SAMPLED = SamplingParams(max_new_tokens=9)

Ask = tuple[str, Sequence[int], SamplingParams]  # episode, prompt, how


@pytest.fixture
def model(tiny_model) -> PreTrainedModel:
    return tiny_model("Qwen2")


def ask(sampler: LocalSampler, *asked: Ask) -> list[Sample]:
    """All at once; in the order of the arguments, which is also the order of admission."""

    async def gather() -> list[Sample]:
        tasks = [
            sampler.sample(prompt, params, episode_id=episode_id, order=(number,))
            for number, (episode_id, prompt, params) in enumerate(asked)
        ]
        return list(await asyncio.gather(*tasks))

    return asyncio.run(gather())


def asks(params: SamplingParams, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Ask]:
    return [(f"e{number}", prompt, replace(params, seed=number)) for number, prompt in enumerate(prompts)]


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def plain_greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def plain_logprobs(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], t: float) -> list[float]:
    logprobs = (plain_logits(model, [*prompt, *response]) / t).log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(response)]


def assert_plain(model: PreTrainedModel, prompt: Sequence[int], params: SamplingParams, sample: Sample) -> None:
    """What was sampled has the log-probabilities of a plain forward pass, and is its first choice if greedy."""
    if params.temperature == 0.0:
        assert sample.token_ids == plain_greedy(model, prompt, len(sample.token_ids))
    expected = plain_logprobs(model, prompt, sample.token_ids, params.temperature or 1.0)
    assert sample.logprobs == pytest.approx(expected, abs=1e-5)


# --- equal to a plain forward pass ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, temperature=0.6, top_k=5, top_p=0.8)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_a_plain_forward_pass(tiny_model, architecture, params, attention):
    model = tiny_model(architecture, torch.float32, attn_implementation=attention)
    sampler = LocalSampler(model)
    for (_, prompt, how), sample in zip(asks(params), ask(sampler, *asks(params)), strict=True):
        assert len(sample.token_ids) == how.max_new_tokens
        assert_plain(model, prompt, how, sample)
    assert sampler.counts.prefilled_tokens == sum(map(len, PROMPTS))
    assert sampler.counts.sampled_tokens == len(PROMPTS) * params.max_new_tokens


UNUSUAL = {
    "scaled logits": ("Granite", {"logits_scaling": 3.0}),
    "scaled logits, parallel blocks": ("Cohere", {"logit_scale": 0.3}),
    "capped logits, some windows": ("Gemma2", {"final_logit_softcapping": 2.0, "sliding_window": 4}),
    "a window": ("Mistral", {"sliding_window": 4}),
    "some windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "experts": ("Mixtral", {"num_local_experts": 4}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_equals_a_plain_forward_pass_of_unusual_models(tiny_model, name):
    architecture, settings = UNUSUAL[name]
    implementation = "eager" if architecture == "Gemma2" else "sdpa"
    model = tiny_model(architecture, torch.float32, **settings, attn_implementation=implementation)
    sampler, prompts = LocalSampler(model, allow_uncached=True), PROMPTS
    for _ in range(2):
        samples = ask(sampler, *asks(GREEDY, prompts))
        for prompt, sample in zip(prompts, samples, strict=True):
            assert_plain(model, prompt, GREEDY, sample)
        prompts = [[*prompt, *sample.token_ids, 5] for prompt, sample in zip(prompts, samples, strict=True)]


def test_a_model_without_position_ids_is_not_continued_from_storage():
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
    model = BloomForCausalLM(config).eval()
    for prompt, sample in zip(PROMPTS, ask(LocalSampler(model, allow_uncached=True), *asks(GREEDY)), strict=True):
        assert_plain(model, prompt, GREEDY, sample)


def test_sampling_without_a_cache_has_to_be_allowed(tiny_model):
    """An error names what the model lacks; where it is asked for, what it costs is counted."""
    windowed, flash = tiny_model("Mistral", sliding_window=4), tiny_model("Llama", torch.float32)
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ConfigurationError, match=r"sliding window of 4.*allow_uncached_sampling"):
        LocalSampler(windowed)
    with pytest.raises(ConfigurationError, match="'flash_attention_2' attention takes no dense mask"):
        LocalSampler(flash)
    uncached, cached = LocalSampler(windowed, allow_uncached=True), LocalSampler(tiny_model("Llama", torch.float32))
    for sampler in (uncached, cached):
        ask(sampler, *asks(GREEDY))
    assert (uncached.counts.uncached_rows, cached.counts.uncached_rows) == (uncached.counts.sampled_tokens, 0)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "state"])
def test_both_names_of_the_cache_argument_are_known(tiny_model, monkeypatch, name):
    """transformers renamed it in every forward pass; by a third name nothing is computed in silence."""
    model = tiny_model("Llama", torch.float32)
    kind, known = type(model), compat.cache_argument(model)
    original = kind.forward

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, use_cache=None, **kwargs):
        cache = {known: kwargs.pop(name)} if name in kwargs else {}
        return original(self, input_ids, attention_mask, position_ids, use_cache=use_cache, **cache, **kwargs)

    own = inspect.signature(forward)
    renamed = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    *others, keywords = own.parameters.values()
    forward.__signature__ = own.replace(parameters=[*others, renamed, keywords])
    monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(cached_rows, "_tried", {})
    if name == "state":
        with pytest.raises(ConfigurationError, match=r"takes no cache by a name that is known"):
            LocalSampler(model)
        return
    sampler = LocalSampler(model)
    for (_, prompt, how), sample in zip(asks(GREEDY), ask(sampler, *asks(GREEDY)), strict=True):
        assert_plain(model, prompt, how, sample)
    assert sampler.counts.uncached_rows == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_version_that_ignores_the_mask_is_noticed(tiny_model, monkeypatch, attention):
    """Before anything is sampled with it."""
    model = tiny_model("Llama", torch.float32, attn_implementation=attention)
    monkeypatch.setattr(cached_rows, "_tried", {})
    kind, original = type(model), type(model).forward

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        return original(self, *args, **{**kwargs, "attention_mask": None})

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(ConfigurationError, match=r"continues a row with transformers .* gives other logits"):
        LocalSampler(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_is_not_a_disagreement(tiny_model, monkeypatch, dtype, autocast):
    monkeypatch.setattr(cached_rows, "_tried", {})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for architecture in ("Llama", "Qwen2", "Mixtral"):
            for seed in range(5):
                cached_rows._tried.clear()
                LocalSampler(tiny_model(architecture, dtype, seed=seed))


def test_the_window_of_the_fallback_matters(tiny_model):
    """Otherwise the tests above would pass with a fallback that ignored it."""
    prompt = PROMPTS[1]
    windowed, full = (tiny_model("Mistral", sliding_window=window) for window in (4, None))
    assert ask(LocalSampler(windowed, allow_uncached=True), ("a", prompt, GREEDY))[0].logprobs != pytest.approx(
        ask(LocalSampler(full), ("a", prompt, GREEDY))[0].logprobs, abs=1e-3
    )


# --- a response depends on its prompt and seed alone ---


def test_does_not_depend_on_its_batch(model):
    asked = [(e, p, replace(s, max_new_tokens=3 + 2 * i)) for i, (e, p, s) in enumerate(asks(SAMPLED))]
    asked[1] = (*asked[1][:2], replace(asked[1][2], temperature=0.5, top_k=3))
    asked[2] = (*asked[2][:2], replace(asked[2][2], temperature=0.0))
    together = ask(LocalSampler(model), *asked)
    alone = [ask(LocalSampler(model), one)[0] for one in asked]
    reversed_order = ask(LocalSampler(model), *asked[::-1])[::-1]
    one_by_one_admitted = ask(LocalSampler(model, cache_tokens=16), *asked)
    for others in (alone, reversed_order, one_by_one_admitted):
        assert [s.token_ids for s in others] == [s.token_ids for s in together]
        for other, sample in zip(others, together, strict=True):
            assert other.logprobs == pytest.approx(sample.logprobs, abs=1e-6)


def test_a_late_arrival_joins_the_running_batch(model):
    sampler = LocalSampler(model)
    late: list[asyncio.Task[Sample]] = []

    async def play() -> Sample:
        def arrive(*_) -> None:
            if len(passes) == 3:
                late.append(asyncio.ensure_future(sampler.sample(PROMPTS[1], SAMPLED, episode_id="b")))
            passes.append(None)

        passes: list[None] = []
        hook = model.register_forward_hook(arrive)
        first = await sampler.sample(PROMPTS[0], SAMPLED, episode_id="a")
        assert not late[0].done()  # it started later, and both are equally long
        await late[0]
        hook.remove()
        assert len(passes) < 2 * SAMPLED.max_new_tokens
        return first

    assert asyncio.run(play()) == ask(LocalSampler(model), ("a", PROMPTS[0], SAMPLED))[0]
    assert late[0].result().token_ids == ask(LocalSampler(model), ("b", PROMPTS[1], SAMPLED))[0].token_ids


def test_seeds_differ(model):
    sampler = LocalSampler(model)
    samples = ask(sampler, *[(f"e{seed}", PROMPTS[0], replace(SAMPLED, seed=seed)) for seed in range(8)])
    assert len({tuple(sample.token_ids) for sample in samples}) == 8
    assert ask(sampler, ("e3", PROMPTS[0], replace(SAMPLED, seed=3)))[0] == samples[3]


# --- the distribution ---


def chi_square_is_plausible(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Within 5 standard deviations; rare tokens are counted as one."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5.0
    pooled = [(counts[~rare].double(), expected[~rare])]
    if rare.any():
        pooled.append((counts[rare].double().sum()[None], expected[rare].sum()[None]))
    observed, expected = (torch.cat(parts) for parts in zip(*pooled, strict=True))
    degrees = len(expected) - 1
    statistic = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    return abs(statistic - degrees) < 5.0 * math.sqrt(2.0 * degrees)


def draw(logits: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    tokens, logprobs = sample_tokens(logits.expand(count, -1), [params] * count, uniforms)
    expected = (logits.float() / params.temperature).log_softmax(-1)[tokens]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-6)  # of the whole distribution, whatever is excluded
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


def test_seeds_sample_the_models_distribution(model):
    params = SamplingParams(max_new_tokens=1, temperature=1.7)
    count = 3_000
    samples = ask(LocalSampler(model), *asks(params, [PROMPTS[0]] * count))
    counts = torch.bincount(torch.tensor([sample.token_ids[0] for sample in samples]), minlength=64)
    probabilities = (plain_logits(model, PROMPTS[0])[-1] / params.temperature).softmax(-1)
    assert chi_square_is_plausible(counts, probabilities)
    assert not chi_square_is_plausible(counts, (plain_logits(model, PROMPTS[0])[-1]).softmax(-1))


@pytest.mark.parametrize(
    ("restriction", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [3, 1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [3]),
        ({"top_p": 0.41}, [3, 1]),
        ({"top_p": 0.81}, [3, 1, 2, 0]),
        ({"top_p": 1e-9}, [3]),
        ({"top_p": 0.81, "top_k": 3}, [3, 1, 2]),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_restricts_to_the_most_likely_and_renormalises(restriction, kept, temperature):
    probabilities = torch.tensor([0.1, 0.25, 0.15, 0.4, 0.1 - 1e-3])  # sum to 1 - 1e-3
    logits = probabilities.log() * temperature
    counts = draw(logits, SamplingParams(1, temperature=temperature, **restriction), 4_000)
    expected = torch.zeros(5)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert set(counts.nonzero().flatten().tolist()) == set(kept)
    assert len(kept) == 1 or chi_square_is_plausible(counts[kept], expected[kept])


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_draws_at_both_ends_of_the_interval_pick_possible_tokens(uniform):
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    (token,), (logprob,) = sample_tokens(logits, [SamplingParams(1)], [uniform])
    assert token == (1 if uniform == 0.0 else 2)
    assert math.isfinite(logprob)


def test_an_unrestricted_row_is_sampled_the_same_beside_restricted_ones():
    """In float32 the sum of the most likely tokens reaches 1 before the tail is counted."""
    logits = torch.cat([torch.zeros(1_000), torch.full((1_000,), -15.0)])[None]
    uniform = 1.0 - 1e-9  # in the tail
    params = SamplingParams(1)
    alone, _ = sample_tokens(logits, [params], [uniform])
    beside, _ = sample_tokens(logits.expand(2, -1), [params, replace(params, top_k=5)], [uniform, 0.5])
    assert beside[0] == alone[0] >= 1_000


# --- where a response ends ---


def test_stops_behind_the_first_stop_token(model):
    free = ask(LocalSampler(model), ("a", PROMPTS[0], SAMPLED))[0]
    stop = free.token_ids[4]
    first = free.token_ids.tolist().index(stop)
    params = replace(SAMPLED, stop_token_ids=(stop, 999))
    stopped, other = ask(LocalSampler(model), ("a", PROMPTS[0], params), ("b", PROMPTS[1], SAMPLED))
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.stop_reason is StopReason.STOP
    assert (free.stop_reason, len(free.token_ids)) == (StopReason.LENGTH, SAMPLED.max_new_tokens)
    assert len(other.token_ids) == SAMPLED.max_new_tokens


def test_a_stop_token_at_the_budget_is_a_stop(model):
    free = ask(LocalSampler(model), ("a", PROMPTS[0], replace(SAMPLED, max_new_tokens=1)))[0]
    params = replace(SAMPLED, max_new_tokens=1, stop_token_ids=(free.token_ids[0],))
    assert ask(LocalSampler(model), ("a", PROMPTS[0], params))[0].stop_reason is StopReason.STOP


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], SAMPLED, DataError),
        ([1], replace(SAMPLED, max_new_tokens=0), ConfigurationError),
        ([1] * 12, SAMPLED, ConfigurationError),
        ([1], replace(SAMPLED, temperature=1e-50), ConfigurationError),
        ([1], replace(SAMPLED, temperature=float("nan")), ConfigurationError),
        ([1], replace(SAMPLED, top_p=0.0), ConfigurationError),
        ([1], replace(SAMPLED, top_k=-1), ConfigurationError),
        ([1], replace(SAMPLED, seed=-1), ConfigurationError),
        ([1], replace(SAMPLED, seed=2**200), ConfigurationError),
    ],
)
def test_an_impossible_request_fails_alone(model, prompt, params, error):
    sampler = LocalSampler(model, cache_tokens=20)

    async def both() -> tuple[Sample, Sample | BaseException]:
        good = sampler.sample([1, 2], SAMPLED, episode_id="good")
        bad = sampler.sample(prompt, params, episode_id="bad")
        results = await asyncio.gather(good, bad, return_exceptions=True)
        return results[0], results[1]

    good, bad = asyncio.run(both())
    assert isinstance(bad, error)
    assert_plain(model, [1, 2], SAMPLED, good)


def test_the_bound_has_to_be_positive(model):
    with pytest.raises(ConfigurationError, match="rollout_cache_tokens"):
        LocalSampler(model, cache_tokens=0)


# --- members of a group ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_group_prefills_its_prompt_once(tiny_model, architecture):
    model = tiny_model(architecture)
    sampler = LocalSampler(model)
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    asked = asks(SAMPLED, prompts)
    samples = ask(sampler, *asked)
    for (_, prompt, how), sample in zip(asked, samples, strict=True):
        assert_plain(model, prompt, how, sample)
    assert sampler.counts.prefilled_tokens == len(PROMPTS[0]) + len(PROMPTS[1])
    assert len({tuple(sample.token_ids) for sample in samples}) == len(samples), "each member has its own numbers"
    alone = [ask(LocalSampler(model), asked_alone)[0] for asked_alone in asked]
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in alone]


def test_members_of_a_group_go_on_by_themselves(model):
    sampler = LocalSampler(model)
    prompts = [PROMPTS[1]] * 3
    samples = ask(sampler, *asks(SAMPLED, prompts))
    longer = [[*p, *s.token_ids, 20 + i] for i, (p, s) in enumerate(zip(prompts, samples, strict=True))]
    for prompt, sample in zip(longer, ask(sampler, *asks(GREEDY, longer)), strict=True):
        assert_plain(model, prompt, GREEDY, sample)
    assert sampler.counts.prefilled_tokens == len(PROMPTS[1]) + 3 * 2


def test_a_member_that_comes_back_does_not_lead_its_group(model):
    """Its cache holds an older, longer row; the others begin at the prompt all the same."""
    sampler = LocalSampler(model)
    ask(sampler, ("e0", PROMPTS[1], GREEDY))
    samples = ask(sampler, *asks(GREEDY, [PROMPTS[1]] * 3))
    for sample in samples:
        assert_plain(model, PROMPTS[1], GREEDY, sample)
    assert sampler.counts.prefilled_tokens == 2 * len(PROMPTS[1]) + 1


# --- from step to step ---


def play_steps(sampler: LocalSampler, next_prompt: Callable, num_steps: int = 3) -> list[tuple[list[int], Sample]]:
    """Every episode's steps, and the prompts they were given."""
    prompts, steps = [list(prompt) for prompt in PROMPTS], []
    for step in range(num_steps):
        samples = ask(sampler, *asks(GREEDY, prompts))
        steps += list(zip(prompts, samples, strict=True))
        prompts = [next_prompt(step, p, s.token_ids.tolist()) for p, s in zip(prompts, samples, strict=True)]
    return steps


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_continues_without_prefilling_again(tiny_model, architecture):
    model = tiny_model(architecture)
    sampler = LocalSampler(model)
    steps = play_steps(sampler, lambda step, prompt, response: [*prompt, *response, 20 + step, 30])
    for prompt, sample in steps:
        assert_plain(model, prompt, GREEDY, sample)
    # Besides the first prompts: a step's last token, which was sampled and never forwarded, and the two behind it.
    assert sampler.counts.prefilled_tokens == sum(map(len, PROMPTS)) + 2 * len(PROMPTS) * 3


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_a_rewritten_prompt_shares_what_it_kept(model, kept):
    sampler = LocalSampler(model)
    first = [1, 2, 3, 4, 5, 6]
    ask(sampler, ("a", first, GREEDY))
    before = sampler.counts.prefilled_tokens
    second = [*first[:kept], 40, 41, 42]
    (sample,) = ask(sampler, ("a", second, GREEDY))
    assert_plain(model, second, GREEDY, sample)
    assert sampler.counts.prefilled_tokens - before == 3


@pytest.mark.parametrize("shorter", [[1, 2, 3], [1, 2, 3, 4, 5, 6]])
def test_a_prompt_that_is_all_stored_forwards_its_last_token(model, shorter):
    sampler = LocalSampler(model)
    ask(sampler, ("a", [1, 2, 3, 4, 5, 6], GREEDY))
    (sample,) = ask(sampler, ("a", shorter, GREEDY))
    assert_plain(model, shorter, GREEDY, sample)
    assert sampler.counts.prefilled_tokens == 6 + 1


def test_two_requests_of_one_episode_may_run_at_once(model):
    """An agent may ask for two continuations at once: the storage serves one of them."""
    sampler = LocalSampler(model)
    ask(sampler, ("a", [1, 2, 3, 4], GREEDY))
    for prompt, sample in zip(
        ([1, 2, 3, 4, 9], [1, 2, 3, 8]),
        ask(sampler, ("a", [1, 2, 3, 4, 9], GREEDY), ("a", [1, 2, 3, 8], GREEDY)),
        strict=True,
    ):
        assert_plain(model, prompt, GREEDY, sample)


@pytest.mark.parametrize("forget", [lambda s: s.release("a"), lambda s: s.reset_cache()])
def test_a_released_episode_is_prefilled_again(model, forget):
    sampler = LocalSampler(model)
    (first,) = ask(sampler, ("a", [1, 2, 3], GREEDY))
    forget(sampler)
    sampler.release("unknown")
    assert ask(sampler, ("a", [1, 2, 3], GREEDY)) == [first]
    assert sampler.counts.prefilled_tokens == 6


def test_after_a_reset_new_weights_are_used(tiny_model):
    model, other = tiny_model("Llama"), tiny_model("Llama", seed=1)
    sampler = LocalSampler(model)
    (before,) = ask(sampler, ("a", [1, 2, 3], GREEDY))
    model.load_state_dict(other.state_dict())
    sampler.reset_cache()
    sampler.policy_version = 7
    (after,) = ask(sampler, ("a", [1, 2, 3, *before.token_ids], GREEDY))
    assert_plain(other, [1, 2, 3, *before.token_ids], GREEDY, after)
    assert (before.policy_version, after.policy_version) == (0, 7)


# --- the bound ---


@pytest.mark.parametrize("cache_tokens", [31, 40, 60, 90, None])
def test_the_bound_changes_only_what_is_prefilled(model, cache_tokens):
    """31 is what the longest step alone takes."""
    sampler, free = LocalSampler(model, cache_tokens=cache_tokens), LocalSampler(model)
    next_prompt = lambda step, prompt, response: [*prompt, *response, 20 + step, 30, 31]  # noqa: E731
    bounded, unbounded = play_steps(sampler, next_prompt), play_steps(free, next_prompt)
    assert [s.token_ids for _, s in bounded] == [s.token_ids for _, s in unbounded]
    if cache_tokens is not None and cache_tokens < 60:
        assert sampler.counts.prefilled_tokens > free.counts.prefilled_tokens
    elif cache_tokens is None:
        assert sampler.counts.prefilled_tokens == free.counts.prefilled_tokens


def test_storage_stays_within_the_bound(model):
    """Many short rows, then a few long ones, are not stored as many long ones."""
    sampler, largest = LocalSampler(model, cache_tokens=200), 0

    def measure(*_) -> None:
        nonlocal largest
        rows, tokens = sampler._rows.cursor.capacity
        largest = max(largest, rows * tokens)

    hook = model.register_forward_hook(measure)
    short, long = [[number] for number in range(30)], [list(range(30)), list(range(40))]
    for prompts in (short, long, short):
        for prompt, sample in zip(prompts, ask(sampler, *asks(GREEDY, prompts)), strict=True):
            assert_plain(model, prompt, GREEDY, sample)
    hook.remove()
    assert largest <= 200


def test_storage_is_made_in_one_go_after_the_first_rollout(model):
    sampler, sizes = LocalSampler(model), []
    hook = model.register_forward_hook(lambda *_: sizes.append(sampler._rows.cursor.capacity))
    for _ in range(2):
        for length in (5, 30):
            ask(sampler, *asks(GREEDY, [list(range(1, length))] * 2))
        sampler.reset_cache()
        assert not any(layer.is_initialized for layer in sampler._rows.layers)  # nothing is held meanwhile
    hook.remove()
    first, second = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
    assert len(set(first)) > 1
    assert set(second) == {first[-1]}


def test_an_episode_does_not_evict_itself_from_the_cache(model):
    """Its stored tokens become its row; they are not held twice."""
    sampler = LocalSampler(model, cache_tokens=20)
    (first,) = ask(sampler, ("a", [1, 2, 3], GREEDY))
    ask(sampler, ("a", [1, 2, 3, *first.token_ids, 7], GREEDY))
    assert sampler.counts.prefilled_tokens == 3 + 2


# --- failures ---


def fail_at(model: PreTrainedModel, number: int, error: BaseException) -> torch.utils.hooks.RemovableHandle:
    passes: list[None] = []

    def fail(*_) -> None:
        passes.append(None)
        if len(passes) == number:
            raise error

    return model.register_forward_pre_hook(fail)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("cache_tokens", [None, 30])
def test_an_exception_reaches_every_caller(model, number, cache_tokens):
    """Whether it comes in the prefill or later, and whether a response runs or still waits for its turn."""
    sampler = LocalSampler(model, cache_tokens=cache_tokens)
    hook = fail_at(model, number, RuntimeError("out of memory"))

    async def gather() -> list[Sample | BaseException]:
        calls = [sampler.sample(p, how, episode_id=e, order=(i,)) for i, (e, p, how) in enumerate(asks(GREEDY))]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=5)

    results = asyncio.run(gather())
    assert [str(result) for result in results] == ["out of memory"] * len(PROMPTS)
    hook.remove()
    for prompt, sample in zip(PROMPTS, ask(sampler, *asks(GREEDY)), strict=True):
        assert_plain(model, prompt, GREEDY, sample)


def test_a_torn_down_loop_leaves_a_usable_sampler(model):
    sampler = LocalSampler(model)
    hook = fail_at(model, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        ask(sampler, *asks(GREEDY))
    hook.remove()
    for prompt, sample in zip(PROMPTS, ask(sampler, *asks(GREEDY)), strict=True):
        assert_plain(model, prompt, GREEDY, sample)


def test_a_driver_that_never_ended_does_not_hold_the_next_loop(model):
    sampler = LocalSampler(model)

    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    loop = asyncio.new_event_loop()
    sampler.pace(never)
    caller = loop.create_task(sampler.sample(PROMPTS[0], GREEDY, episode_id="a"))
    loop.run_until_complete(asyncio.sleep(0.01))
    for task in [caller, *asyncio.all_tasks(loop)]:
        task.cancel()
    loop.close()  # at once: nothing has seen its cancellation
    sampler.pace(None)
    (sample,) = ask(sampler, ("b", PROMPTS[1], GREEDY))
    assert_plain(model, PROMPTS[1], GREEDY, sample)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_diverged_weights_are_named(model, temperature):
    model.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(RolloutError, match="not finite"):
        ask(LocalSampler(model), ("a", PROMPTS[0], replace(SAMPLED, temperature=temperature)))


@pytest.mark.parametrize("cache_tokens", [None, 20])
def test_a_cancelled_request_leaves_the_others_alone(model, cache_tokens):
    """Running, or still waiting for room (`cache_tokens` 20 runs one response at a time)."""
    sampler, passes = LocalSampler(model, cache_tokens=cache_tokens), []

    async def play() -> list[Sample | BaseException]:
        tasks = [
            asyncio.ensure_future(sampler.sample(p, how, episode_id=e, order=(i,)))
            for i, (e, p, how) in enumerate(asks(SAMPLED))
        ]

        def cancel(*_) -> None:
            passes.append(None)
            if len(passes) == 3:
                tasks[1].cancel()
                sampler.release("e1")

        hook = model.register_forward_hook(cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        hook.remove()
        return results

    results = asyncio.run(play())
    assert isinstance(results[1], asyncio.CancelledError)
    for number in (0, 2, 3):
        assert results[number] == ask(LocalSampler(model), asks(SAMPLED)[number])[0]
    # It was released before it left the batch, and is not kept.
    before = sampler.counts.prefilled_tokens
    (again,) = ask(sampler, asks(SAMPLED)[1])
    assert sampler.counts.prefilled_tokens - before == len(PROMPTS[1])
    assert_plain(model, PROMPTS[1], SAMPLED, again)


# --- mixed precision ---

BF16 = Numerics(autocast=torch.bfloat16)


@pytest.fixture
def float_model(tiny_model) -> PreTrainedModel:
    """Autocast leaves float64 as it is."""
    return tiny_model("Qwen2").float()


@torch.no_grad()
def move(model: PreTrainedModel) -> None:
    """New weights, in place, as an optimizer makes them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixed_precision_is_that_of_autocast(tiny_model, tied, attention):
    """Weights are cast once instead of in every pass; the numbers are the same."""
    model = tiny_model("Qwen2", tie_word_embeddings=tied, attn_implementation=attention).float()
    inside = LocalSampler(model, numerics=BF16)

    class Plain(LocalSampler):
        def _forward_pass(self):
            return torch.autocast("cpu", torch.bfloat16)

    assert ask(inside, *asks(SAMPLED)) == ask(Plain(model), *asks(SAMPLED))
    assert ask(inside, *asks(SAMPLED)) != ask(LocalSampler(model), *asks(SAMPLED))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("numerics", [None, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("outer", [False, True], ids=["", "within-autocast"])
def test_new_weights_are_sampled_from(float_model, numerics, outer):
    """Also where the thread is in an autocast context of its own, which keeps casts of old weights until it ends."""
    model = float_model
    sampler, other = LocalSampler(model, numerics=numerics), copy.deepcopy(model)
    move(other)
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        before = ask(sampler, *asks(SAMPLED))
        move(model)
        sampler.reset_cache()
        after = ask(sampler, *asks(SAMPLED))
    assert after == ask(LocalSampler(other, numerics=numerics), *asks(SAMPLED))
    assert after != before


def test_weights_that_change_while_a_cancelled_request_still_runs(float_model):
    model = float_model
    sampler, other = LocalSampler(model, numerics=BF16), copy.deepcopy(model)
    move(other)

    async def play() -> Sample:
        passed = asyncio.Event()
        hook = model.register_forward_hook(lambda *_: passed.set())
        cancelled = asyncio.ensure_future(sampler.sample([1, 2], replace(SAMPLED, max_new_tokens=50), episode_id="x"))
        await passed.wait()
        hook.remove()
        cancelled.cancel()
        move(model)  # what drives the batch has not noticed yet
        sampler.reset_cache()
        return await sampler.sample(PROMPTS[0], SAMPLED, episode_id="y")

    assert asyncio.run(play()) == ask(LocalSampler(other, numerics=BF16), ("y", PROMPTS[0], SAMPLED))[0]


def test_autocast_is_active_in_forward_passes_only(float_model):
    """What else runs in the thread meanwhile, such as an async tool, computes as it would."""
    model, seen = float_model, []
    sampler = LocalSampler(model, numerics=BF16)

    async def look() -> None:
        while len(seen) < 5:
            seen.append((torch.is_autocast_enabled("cpu"), model.lm_head.weight.dtype))
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(sampler.sample(PROMPTS[0], SAMPLED, episode_id="a"), look())

    asyncio.run(both())
    assert set(seen) == {(False, torch.float32)}


def test_a_pass_runs_with_its_device_as_the_current_one(monkeypatch):
    """With stand-ins for a GPU: another thread begins with the first one as its current device."""
    entered: list[torch.device] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    with Numerics(torch.device("cuda", 3)).forward_pass(), Numerics().forward_pass():
        pass
    assert entered == [torch.device("cuda", 3)]


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_restored(tiny_model, training):
    model = tiny_model("Llama", attention_dropout=0.5).train(training)
    model.model.layers[0].train(not training)  # as frozen layers may be
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []
    hook = model.register_forward_hook(lambda module, *_: seen.append(module.training))
    (sample,) = ask(LocalSampler(model), ("a", PROMPTS[0], GREEDY))
    hook.remove()
    assert [module.training for module in model.modules()] == modes
    assert not any(seen)
    assert_plain(model.eval(), PROMPTS[0], GREEDY, sample)


# --- prefill ---


def test_a_prefill_is_split_without_a_difference(model, monkeypatch):
    prompts = [list(range(1, 2 + 7 * (i % 5))) for i in range(12)]
    whole = ask(LocalSampler(model), *asks(SAMPLED, prompts))
    for name in ("_PREFILL_TOKENS", "_PREFILL_PADDING", "_MASK_ELEMENTS"):
        with monkeypatch.context() as patch:
            patch.setattr(f"trl_steppo.inference.cached_rows.{name}", 20)
            widths: list[torch.Size] = []
            hook = model.register_forward_pre_hook(
                lambda _, __, kwargs, widths=widths: widths.append(kwargs["input_ids"].shape), with_kwargs=True
            )
            assert [s.token_ids for s in ask(LocalSampler(model), *asks(SAMPLED, prompts))] == [
                s.token_ids for s in whole
            ]
            hook.remove()
            assert len(widths) > SAMPLED.max_new_tokens  # several passes over the prompts
