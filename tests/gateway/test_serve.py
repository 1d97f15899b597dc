"""A gateway in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")


def test_a_gateway_with_a_scripted_sampler_loads_no_torch():
    code = """
import sys, httpx
from transformers import PreTrainedTokenizerFast
before = set(sys.modules)  # transformers has imported torch itself in some versions
from tests.gateway.gateway_policy import Policy, echo, make_spec, start
server = start(Policy(echo))
_, key = server.call(server.gateway.open_session(make_spec()))
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}
httpx.post(server.base_url + "/chat/completions", json=body, headers={"x-api-key": key}).raise_for_status()
server.close()
found = [name for name in ("torch", "trl", "accelerate") if name in set(sys.modules) - before]
sys.exit(str(found) if found else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
