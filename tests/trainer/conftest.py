import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from trl_steppo.trainer import player


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _warm(warm_workers: None) -> None:
    """Most tests with a sampler in a process of its own are about what it says, not about its start."""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="transformers")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler waits however long a thread stalls: else its batches differ, and with them its last digits."""
    monkeypatch.setattr(player, "play_episodes", partial(player.play_episodes, grace_s=60.0))
