"""
The clients of `gateway.py`, in a separate process: work as JSON on standard input, their results on output.

They use aiohttp: with hundreds of connections httpx, which OpenAI's and Anthropic's clients are built on, takes more
processor time than what it talks to, and would be all that is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import aiohttp


async def talk(http: aiohttp.ClientSession, work: dict[str, Any], index: int) -> list[str]:
    """One session: asks until it is answered, for as many steps as there are; what it was answered."""
    rng, trouble = random.Random(index), random.Random(-1 - index)
    headers = {"authorization": f"Bearer {work['keys'][index]}"}
    messages: list[Any] = [{"role": "user", "content": f"session {index}"}]
    said: list[str] = []
    while len(said) < work["num_steps"]:
        await asyncio.sleep(rng.random() * work["delay_s"])
        body = {"model": "m", "messages": messages}
        goes_away = work["trouble"] and trouble.random() < 0.05
        answer = await ask(http, body, headers, timeout_s=trouble.random() if goes_away else 120.0)
        if answer is None:
            continue
        if work["trouble"] and trouble.random() < 0.05:
            assert await ask(http, body, headers, timeout_s=120.0) == answer, "a retry is told the same"
        message = json.loads(answer)["choices"][0]["message"]
        said.append(message["content"])
        messages += [message, {"role": "user", "content": f"session {index}"}]
    return said


async def ask(
    http: aiohttp.ClientSession, body: dict[str, Any], headers: dict[str, str], *, timeout_s: float
) -> bytes | None:
    """One request; `None` where it was not answered."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with http.post("/v1/chat/completions", json=body, headers=headers, timeout=timeout) as response:
            answer = await response.read()
    except asyncio.TimeoutError:
        return None
    return answer if response.status == 200 else None


async def main() -> None:
    """Play all sessions at once."""
    work = json.load(sys.stdin)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(work["origin"], connector=connector) as http:
        start, cpu_start = time.perf_counter(), time.process_time()
        said = await asyncio.gather(*(talk(http, work, index) for index in range(len(work["keys"]))))
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    json.dump({"seconds": seconds, "client_cpu_s": cpu_s, "said": said}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
