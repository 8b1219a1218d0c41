"""Prompts of random tokens, responses of lengths that are drawn, and a reward that any model learns to raise."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

from miles_core import Plugin, hookimpl
from miles_core.edges.protocols import Engine, Request, Sampling
from miles_core.types import Group, Sample


class Workload(Plugin):
    """A response ends at a length that is drawn for its attempt, and nowhere else: the same in every mode."""

    class Config(Plugin.Config):
        prompt: int = 32  # tokens
        median: float = 256.0  # tokens of a response, rollout.max_tokens at most
        sigma: float = 0.0  # of the logarithm of its length; 0: all of them have the same

    config: Config

    @hookimpl
    def miles_prompts(self, split: str, start: int) -> Iterator[Sample]:
        vocab = self._vocab()
        while True:
            start += 1
            draw = random.Random(f"{self.run.seed}/{split}/{start}")
            yield Sample(tokens=[draw.randrange(vocab) for _ in range(self.config.prompt)])

    @hookimpl
    async def miles_rollout(self, group: Group, engine: Engine, evaluating: bool) -> Group:
        asked = [
            Request(sample.id, sample.tokens, Sampling(self._length(sample), self.run.rollout.temperature), sample.seed)
            for sample in group.samples
        ]
        for sample, completion in zip(group.samples, await engine.generate(asked), strict=True):
            given, written = len(sample.tokens), len(completion.tokens)
            sample.tokens = sample.tokens + completion.tokens
            sample.mask = [False] * given + [True] * written
            sample.logprobs = [0.0] * given + completion.logprobs
            sample.versions = [-1] * given + completion.versions
            sample.finish = completion.finish
        return group

    @hookimpl
    async def miles_reward(self, group: Group, evaluating: bool) -> dict[str, list[float]]:
        """The share of a response's tokens that are of the lower half of the vocabulary."""
        half = self._vocab() // 2
        return {"lower": [sum(t < half for t in _response(s)) / len(_response(s)) for s in group.samples]}

    def _length(self, sample: Sample) -> int:
        drawn = random.Random(sample.seed).lognormvariate(math.log(self.config.median), self.config.sigma)
        return max(1, min(self.run.rollout.max_tokens, round(drawn)))

    def _vocab(self) -> int:
        return int(json.loads((self.run.model.path / "config.json").read_text())["vocab_size"])


def _response(sample: Sample) -> list[int]:
    return [token for token, written in zip(sample.tokens, sample.mask, strict=True) if written]
