"""A tiny Qwen3 in float32, in any number of versions, and what a server says of it beside what transformers does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miles_core.config import RunConfig
from miles_core.edges.protocols import Completion, Request, Sampling
from miles_core.edges.sglang import SGLang
from serving import START_S
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

CPU = Path(__file__).with_name("cpu.toml")  # arguments of the server
SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
BUCKET = 1 << 20  # bytes: a third of the model
CLOSE = 1e-4  # most difference of any log-probability, both in float32


class Weights:
    """Version n's are drawn with the seed n."""

    def __init__(self) -> None:
        self._made: dict[int, Qwen3ForCausalLM] = {}

    def of(self, version: int) -> Qwen3ForCausalLM:
        if version not in self._made:
            torch.manual_seed(version)
            self._made[version] = Qwen3ForCausalLM(Qwen3Config(**SHAPE, initializer_range=0.1)).float().eval()
        return self._made[version]

    def tensors(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.of(version).state_dict().items()

    @torch.no_grad()
    def logprobs(self, version: int, request: Request, completion: Completion) -> list[float]:
        """Those that version's weights give the tokens of a completion."""
        tokens = request.tokens + completion.tokens
        [logits] = self.of(version)(torch.tensor([tokens])).logits[:, len(request.tokens) - 1 : -1].float()
        scores = (logits / (request.sampling.temperature or 1.0)).log_softmax(-1)
        return scores.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0].tolist()

    @torch.no_grad()
    def in_place(self, request: Request, completion: Completion, found_after: int) -> list[float]:
        """Those of tokens where each version's weights read on over the keys and values of the one before.

        ``found_after``: steps behind an update from which on the last token before it counts as old weights read it;
        0 for never. Until then it counts as the new ones did, to write the first token.
        """
        tokens, past, before = request.tokens + completion.tokens, DynamicCache(), -1
        logits: list[torch.Tensor] = []

        def read(version: int, end: int, past: DynamicCache) -> torch.Tensor:
            ids = torch.tensor([tokens[past.get_seq_length() : end]])
            return self.of(version)(ids, past_key_values=past, use_cache=True).logits[0].float()

        for version, wrote in groupby(completion.versions):
            start = past.get_seq_length()
            end = (start or len(request.tokens) - 1) + len(list(wrote))  # the last one is read by whoever goes on
            if start and found_after:
                read(before, start + 1, old := copy.deepcopy(past))
                logits += read(version, start + found_after, past)
                for mine, theirs in zip(past.layers, old.layers, strict=True):
                    mine.keys[:, :, start], mine.values[:, :, start] = theirs.keys[:, :, -1], theirs.values[:, :, -1]
            logits += read(version, end, past)[0 if start else len(request.tokens) - 1 :]
            before = version
        scores = (torch.stack(logits) / (request.sampling.temperature or 1.0)).log_softmax(-1)
        return scores.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0].tolist()


def arguments(folder: Path, table: dict[str, Any]) -> tuple[Any, ...]:
    """What a run on a CPU would construct its engine with."""
    given = {"algorithm": "none", "model": {"path": folder}, "steps": 1, "placement": {"layout": "cpu"}}
    run = RunConfig.model_validate(given | {"rollout": {"timeout_s": START_S}})
    [process] = SGLang(SGLang.Config(**table), run).miles_engines().processes
    return process.args


def group(number: int, attempts: int, tokens: int, **sampling: Any) -> list[Request]:
    """Requests with one prompt; another number, another prompt."""
    prompt = np.random.default_rng(number).integers(0, SHAPE["vocab_size"], 16).tolist()
    return [Request(f"{number}/{i}", prompt, Sampling(tokens, **sampling), seed=i) for i in range(attempts)]


def apart(weights: Weights, request: Request, completion: Completion) -> float:
    """Most difference of a log-probability from what the weights that wrote the token give it there."""
    expected = {version: weights.logprobs(version, request, completion) for version in set(completion.versions)}
    assert len(completion.tokens) == len(completion.logprobs) == len(completion.versions)
    told = zip(completion.logprobs, completion.versions, strict=True)
    return max((abs(logprob - expected[version][i]) for i, (logprob, version) in enumerate(told)), default=0.0)


def assert_right(weights: Weights, requests: list[Request], completions: list[Completion], versions: set[int]) -> None:
    """Every token asked for is there, written by the weights of these versions and none before its turn."""
    for request, completion in zip(requests, completions, strict=True):
        assert completion.finish == "length" and len(completion.tokens) == request.sampling.max_tokens
        assert set(completion.versions) == versions and completion.versions == sorted(completion.versions)
        assert apart(weights, request, completion) < CLOSE
