"""The networks: one forward pass -> per-token log-probabilities, or state values."""

from pathlib import Path

from .critic import build_critic, check_critic
from .forward import Critic, PolicyScorer
from .reward import score_sequences

__all__ = ["MINI_WIKI_POLICY", "Critic", "PolicyScorer", "build_critic", "check_critic", "score_sequences"]

MINI_WIKI_POLICY = str(Path(__file__).parent / "mini_wiki")
"""Directory of the built-in policy, made by `examples/make_mini_wiki_policy.py`."""
