"""The clients of `gateway.py`, in a process of their own: work as JSON on standard input, what they saw on output."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import httpx


async def talk(http: httpx.AsyncClient, work: dict[str, Any], index: int) -> list[str]:
    """One session: asks until it is answered, for as many steps as there are; what it was answered."""
    rng, trouble = random.Random(index), random.Random(-1 - index)
    headers = {"authorization": f"Bearer {work['keys'][index]}"}
    messages: list[Any] = [{"role": "user", "content": f"session {index}"}]
    said: list[str] = []
    while len(said) < work["num_steps"]:
        await asyncio.sleep(rng.random() * work["delay_s"])
        body = {"model": "m", "messages": messages}
        goes_away = work["trouble"] and trouble.random() < 0.05
        try:
            response = await http.post(
                "/v1/chat/completions", json=body, headers=headers, timeout=trouble.random() if goes_away else 120.0
            )
        except httpx.TimeoutException:
            continue
        if response.status_code != 200:
            continue
        if work["trouble"] and trouble.random() < 0.05:
            again = await http.post("/v1/chat/completions", json=body, headers=headers)
            assert again.content == response.content
        message = response.json()["choices"][0]["message"]
        said.append(message["content"])
        messages += [message, {"role": "user", "content": f"session {index}"}]
    return said


async def main() -> None:
    """Play all sessions at once."""
    work = json.load(sys.stdin)
    count = len(work["keys"])
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
    async with httpx.AsyncClient(base_url=work["origin"], limits=limits, timeout=120) as http:
        start = time.perf_counter()
        said = await asyncio.gather(*(talk(http, work, index) for index in range(count)))
        seconds = time.perf_counter() - start
    json.dump({"seconds": seconds, "said": said}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
