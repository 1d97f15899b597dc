"""`trl-steppo gateway`: a real model in a process of its own."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_the_command_serves_a_model(tmp_path):
    command = [sys.executable, "-m", "trl_steppo.cli", "gateway", "--model", "mini_wiki", "--port", "0"]
    command += ["--directory", str(tmp_path), "--response_length", "12"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("serving"))
        base_url = line.split()[3].rstrip(";")
        key_file = tmp_path / "admin_key"
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        key = key_file.read_text().strip()
        assert key not in line
        admin = {"authorization": f"Bearer {key}"}
        origin = base_url.removesuffix("/v1")
        opened = httpx.post(f"{origin}/sessions", json={}, headers=admin, timeout=30).json()
        body = {"model": "m", "messages": [{"role": "user", "content": "Who?"}], "logprobs": True}
        headers = {"authorization": f"Bearer {opened['api_key']}"}
        completion = httpx.post(f"{base_url}/chat/completions", json=body, headers=headers, timeout=60).json()
        logprobs = [one["logprob"] for one in completion["choices"][0]["logprobs"]["content"]]
        recorded = httpx.get(f"{origin}/sessions/{opened['id']}/episode", headers=admin, timeout=30).json()
        assert recorded["steps"][0]["rollout_logprobs"] == logprobs
    finally:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert key not in "".join(output)
