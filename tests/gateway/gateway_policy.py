"""A scripted policy and a whole gateway around it, in a thread or (run as a program) in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_steppo.gateway import EpisodeSpec, GatewayServer
from trl_steppo.gateway.sampling import SamplerLoop
from trl_steppo.gateway.tokens import ChatFormats
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.types import EpisodeLimits, StopReason, TokenIds

END = "<|im_end|>"
ADMIN = "admin-key-of-the-tests"

# ChatML with tool calls in the form of Hermes.
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- for tool in tools %}{{ tool.function.name + ' ' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\n' }}
{{- '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": "<|pad|>"})
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = make_tokenizer()


def call(name: str, **arguments: Any) -> str:
    body = str(arguments).replace("'", '"')
    return f'<tool_call>\n{{"name": "{name}", "arguments": {body}}}\n</tool_call>'


class Policy:
    """
    Says `script(prompt_text, order)` and ends its turn, one token each `token_s`; fails and waits as it is told.

    A token's log-probability is minus its place in the response, minus one hundredth of the step's.
    """

    def __init__(self, script: Callable[[str, tuple[int, ...]], str], *, token_s: float = 0.0) -> None:
        self.script = script
        self.token_s = token_s
        self.asked: list[tuple[list[int], SamplingParams, tuple[int, ...]]] = []
        self.released: list[str] = []
        self.failures = 0  # calls that are to fail
        self.gate: asyncio.Event | None = None

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        self.asked.append((list(prompt_ids), params, order))
        if self.failures:
            self.failures -= 1
            raise OSError("the engine is broken")
        if self.gate is not None:
            await self.gate.wait()
        ids = TOKENIZER.encode(self.script(TOKENIZER.decode(list(prompt_ids)), order) + END)[: params.max_new_tokens]
        if self.token_s:
            await asyncio.sleep(self.token_s * len(ids))
        reason = StopReason.STOP if ids[-1] in params.stop_token_ids else StopReason.LENGTH
        logprobs = tuple(-float(i) - order[2] / 100 for i in range(len(ids)))
        return Sample(TokenIds(ids), logprobs, reason, policy_version=3)

    def release(self, episode_id: str) -> None:
        self.released.append(episode_id)

    def pace(self, settled: Any) -> None:
        pass


def echo(prompt: str, order: tuple[int, ...]) -> str:
    """Says which step of which prompt it is; a response that belongs elsewhere is found out."""
    return f"{order[2]}:{zlib.crc32(prompt.encode()):08x}"


def start(policy: Policy, *, spec: EpisodeSpec | None = None, **settings: Any) -> GatewayServer:
    """A gateway that serves the policy, which runs in the gateway's own loop."""
    settings.setdefault("admin_key", ADMIN)
    server = GatewayServer(ChatFormats(TOKENIZER), default=spec or make_spec(), **settings).start()
    server.resume(SamplerLoop(policy))
    return server


def make_spec(**changes: Any) -> EpisodeSpec:
    limits = {"max_interaction_steps": changes.pop("max_interaction_steps", 100)}
    limits |= {name: changes.pop(name) for name in list(changes) if name.startswith("max_")}
    sampling = SamplingParams(max_new_tokens=changes.pop("response_length", 200))
    return EpisodeSpec(EpisodeLimits(**limits), sampling, **changes)


def serve(port: int, store: Path) -> None:
    """Serve until a signal ends it; after a kill, the next one goes on from its store."""
    server = start(Policy(echo, token_s=0.002), port=port, store=store)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    print("ready", flush=True)
    server.wait()
    server.close()


def main() -> None:
    """Start a process that serves, whenever a line comes in; imports are done once, and it is there at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                serve(args.port, args.store)
            except BaseException as error:
                print(f"failed: {error}", flush=True)
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
