"""The default rollout: a prompt is tokenized once, what the engine samples is kept as it is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ...tokens import load_tokenizer, stop_tokens, tokenize
from ...types import Group, Refused, Sample
from ..protocols import Completion, Request, Sampling

if TYPE_CHECKING:
    from ...config import RunConfig
    from ..protocols import Engine


class SingleTurn:
    """One completion a sample. Holds the tokenizer; one a process."""

    def __init__(self, run: RunConfig) -> None:
        self._tokenizer = load_tokenizer(run.model.path)
        stops = stop_tokens(self._tokenizer, run.model.path, run.rollout.stop_tokens)
        draw = run.rollout
        self._sampling = {
            False: Sampling(draw.max_tokens, draw.temperature, draw.top_p, draw.top_k, stops),
            True: Sampling(draw.max_tokens, run.eval.temperature, stop_tokens=stops),
        }
        limit = json.loads((run.model.path / "config.json").read_text()).get("max_position_embeddings")
        self._context = run.model.context or limit

    async def roll(self, group: Group, engine: Engine, evaluating: bool) -> Group:
        """Raises Refused, naming the sample, when its prompt leaves no room for an answer."""
        sampling, first = self._sampling[evaluating], group.samples[0]
        tokens = first.tokens or tokenize(self._tokenizer, first.prompt)
        if not tokens:
            raise Refused(f"sample {first.id}: its prompt has no tokens")
        if self._context and len(tokens) + sampling.max_tokens > self._context:
            raise Refused(
                f"sample {first.id}: its prompt has {len(tokens)} tokens; with rollout.max_tokens = "
                f"{sampling.max_tokens} that exceeds the model's context of {self._context}"
            )
        requests = [Request(sample.id, tokens, sampling, sample.seed) for sample in group.samples]
        for sample, completion in zip(group.samples, await engine.generate(requests), strict=True):
            self._fill(sample, tokens, completion, sampling.stop_tokens)
        return group

    def _fill(self, sample: Sample, prompt: list[int], completion: Completion, stops: tuple[int, ...]) -> None:
        before, written = len(prompt), len(completion.tokens)
        sample.tokens = prompt + completion.tokens
        sample.mask = [False] * before + [True] * written
        sample.logprobs = [0.0] * before + completion.logprobs
        sample.versions = [-1] * before + completion.versions
        sample.finish = completion.finish
        ended = written and completion.tokens[-1] in stops  # the stop is trained on, but is no part of the answer
        said = completion.tokens[:-1] if ended else completion.tokens
        sample.response = self._tokenizer.decode(said, skip_special_tokens=True)
