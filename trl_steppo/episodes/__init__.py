"""One episode: its settings, its record, and its JSON form, for our own loop and for the gateway."""

from .observation import as_messages, as_observation
from .record import EpisodeRecord, Notes, RecordedStep
from .spec import EpisodeSpec, step_seed

__all__ = [
    "EpisodeRecord",
    "EpisodeSpec",
    "Notes",
    "RecordedStep",
    "as_messages",
    "as_observation",
    "step_seed",
]
