"""Remote scorers: one request a sample, many at once, each with a budget and bounded retries."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx

from .kinds import Http

if TYPE_CHECKING:
    from ...types import Sample
    from .pool import Outcome

FIRST_WAIT_S = 0.1


async def ask(scorer: Http, samples: list[Sample]) -> list[Outcome]:
    """One outcome a sample, in order."""
    gate = asyncio.Semaphore(scorer.concurrency)
    async with httpx.AsyncClient(timeout=scorer.budget_s) as client:

        async def one(sample: Sample) -> Outcome:
            async with gate:
                try:
                    async with asyncio.timeout(scorer.budget_s):
                        return await _post(client, scorer, sample)
                except TimeoutError:
                    return None, f"{scorer.url} did not answer within its budget of {scorer.budget_s:g} s"

        return list(await asyncio.gather(*map(one, samples)))


async def _post(client: httpx.AsyncClient, scorer: Http, sample: Sample) -> Outcome:
    body: dict[str, Any] = {"prompt": sample.prompt, "response": sample.response, "info": sample.info}
    body["answer"] = sample.info.get(scorer.answer)
    problem = ""
    for attempt in range(scorer.retries + 1):
        if attempt:
            await asyncio.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        try:
            response = await client.post(scorer.url, json=body)
        except httpx.TransportError as error:
            problem = f"{type(error).__name__}: {error}".removesuffix(": ")
            continue
        if response.status_code == 429 or response.status_code >= 500:
            problem = f"status {response.status_code}"
            continue
        if response.status_code != 200:
            return None, f"{scorer.url} answered status {response.status_code}: {response.text[:200]}"
        try:
            return response.json()["reward"], None
        except (ValueError, KeyError, TypeError):
            return None, f'{scorer.url} answered {response.text[:200]!r}, not {{"reward": number}}'
    return None, f"{scorer.url} failed {scorer.retries + 1} times, at last with {problem}"
