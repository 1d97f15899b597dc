"""The networks: one forward pass -> per-token log-probabilities, or state values."""

from .critic import build_critic, check_critic
from .forward import Critic, PolicyScorer
from .reward import score_sequences

__all__ = ["Critic", "PolicyScorer", "build_critic", "check_critic", "score_sequences"]
