"""A row -> an Episode: our own loop, and what is done to episodes before they are trained on."""

from .episode import EpisodeLimits, run_episode, step_seed
from .pacing import InFlight
from .play import EpisodeRequest, play_episodes
from .recording import dump_episodes, episode_file, load_episodes
from .rewards import checked_weights, score_episodes

__all__ = [
    "EpisodeLimits",
    "EpisodeRequest",
    "InFlight",
    "checked_weights",
    "dump_episodes",
    "episode_file",
    "load_episodes",
    "play_episodes",
    "run_episode",
    "score_episodes",
    "step_seed",
]
