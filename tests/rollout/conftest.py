import pytest

from tests.rollout.scripted import LookEnvironment, make_tokenizer
from trl_steppo.chat import ChatFormat
from trl_steppo.environments import make_playable


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    """With the tools of `LookEnvironment`."""
    return ChatFormat(make_tokenizer(), tools=make_playable(LookEnvironment()).tools)
