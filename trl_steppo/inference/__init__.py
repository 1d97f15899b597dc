"""Token ids in, token ids and log-probabilities out: samplers, and the engine that a trainer samples with."""

from ..types import StopReason, TokenIds
from .base import Counts, Sample, Sampler, SamplingParams
from .engine import CountingSampler, Engine, FixedEngine, SamplerEngine, VersionedSampler, counts_of

__all__ = [
    "CountingSampler",
    "Counts",
    "Engine",
    "FixedEngine",
    "Sample",
    "Sampler",
    "SamplerEngine",
    "SamplingParams",
    "StopReason",
    "TokenIds",
    "VersionedSampler",
    "counts_of",
]
