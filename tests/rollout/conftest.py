import sys
from pathlib import Path

import pytest
from scripted import LookEnvironment, make_tokenizer

from trl_steppo.chat import ChatFormat
from trl_steppo.environments import make_playable

sys.path.append(str(Path(__file__).parents[1] / "chat"))  # trl_templates.py


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    """With the tools of `LookEnvironment`."""
    return ChatFormat(make_tokenizer(), tools=make_playable(LookEnvironment()).tools)
