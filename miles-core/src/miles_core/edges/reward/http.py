"""Remote scorers: one request a sample, many at once, each with a budget and bounded retries."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import aiohttp

from ..http import Connections
from .kinds import Http, Outcome, outcome

if TYPE_CHECKING:
    from ...types import Sample

FIRST_WAIT_S = 0.1
BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ClientResponseError)  # may mend


class Remote:
    """One remote scorer, its connections kept open between groups. Use it in one event loop."""

    def __init__(self, scorer: Http) -> None:
        self._scorer, self._gate = scorer, asyncio.Semaphore(scorer.concurrency)
        self._connections = Connections(trust_env=True)  # a scorer may be outside, behind a proxy

    async def score(self, samples: list[Sample]) -> list[Outcome]:
        """One outcome a sample, in order."""
        return list(await asyncio.gather(*map(self._one, samples)))

    async def _one(self, sample: Sample) -> Outcome:
        async with self._gate:  # the budget counts from here, not from when its turn was waited for
            try:
                async with asyncio.timeout(self._scorer.budget_s):
                    return await self._ask(sample)
            except TimeoutError:
                return None, f"{self._scorer.url} did not answer within its budget of {self._scorer.budget_s:g} s"

    async def _ask(self, sample: Sample) -> Outcome:
        url = self._scorer.url
        answer = sample.info.get(self._scorer.answer)
        body = {"prompt": sample.prompt, "response": sample.response, "answer": answer, "info": sample.info}
        content = json.dumps(body, default=str).encode()  # a row of parquet may hold dates
        problem = ""
        for attempt in range(self._scorer.retries + 1):
            if attempt:
                await asyncio.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                async with asyncio.timeout(self._scorer.timeout_s):
                    status, told = await self._connections.ask("POST", url, content)
            except TimeoutError:
                problem = f"no answer within timeout_s = {self._scorer.timeout_s:g}"
                continue
            except BROKEN as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            except (aiohttp.ClientError, ValueError) as error:
                return None, f"{url}: {type(error).__name__}: {error}"
            if status == 429 or status >= 500:
                problem = f"status {status}"
                continue
            text = told.decode(errors="replace")[:200]
            if status != 200:
                return None, f"{url} answered status {status}: {text}"
            try:
                return outcome(json.loads(told)["reward"])
            except (ValueError, KeyError, TypeError):
                return None, f'{url} answered {text!r}, not {{"reward": number}}'
        return None, f"{url} failed {self._scorer.retries + 1} times, at last with {problem}"
