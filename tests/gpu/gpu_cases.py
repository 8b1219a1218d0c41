"""Models, rows and comparisons that tests on a GPU share."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miles_core.config import RunConfig
from miles_core.edges.megatron import Megatron, hf
from miles_core.packing import Packed
from miles_core.types import Batch, Output, Role

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "rope_theta": 1e6, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
Sequences = list[tuple[list[int], list[float]]]  # tokens, and the weight of each in the loss: 0 for a prompt's


def write_model(folder: Path, **shape: Any) -> Path:
    """Random weights, as transformers draws them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | shape)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def run_of(folder: Path, layout: str | None = None, trainers: int = 1, engines: int = 1, **tables: Any) -> RunConfig:
    place = {"layout": layout or ("split" if torch.cuda.is_available() else "cpu")}
    place |= {"trainers": trainers, "engines": engines}
    given = {"algorithm": "none", "model": {"path": folder}, "steps": 1000, "seed": 3, "placement": place}
    return RunConfig.model_validate(given | {"optim": {"lr": 1e-3, "max_norm": 0.0}} | tables)


class Trainer:
    """A policy as one training rank holds it, with its plugin."""

    def __init__(self, run: RunConfig, trained: bool = True, **megatron: Any) -> None:
        self.folder = run.model.path
        self.plugin = Megatron(Megatron.Config(**megatron), run)
        self.model: Any = self.plugin.miles_model("policy", Role(trained=trained))

    def forward(self, module: torch.nn.Module, batch: Batch) -> Output:
        return self.plugin.miles_forward("policy", module, batch)

    def logprobs(self, batches: list[Batch]) -> list[torch.Tensor]:
        return [output.logprobs for output in self.model.run(batches, self.forward, None)]

    def learn(self, batches: list[Batch]) -> None:
        """Forwards and backwards; gradients add up."""
        self.model.run(batches, self.forward, weighted)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those of every weight so far, under its Hugging Face name."""
        from miles_core.edges.megatron import weights

        named = weights.export_weights(self.model.module, hf.read(self.folder), lambda p: p.main_grad)
        return {name: gradient.float().clone() for name, gradient in named}

    def export(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.export()}


@contextmanager
def trainer(run: RunConfig, trained: bool = True, **megatron: Any) -> Iterator[Trainer]:
    """One that leaves no memory behind."""
    made = Trainer(run, trained, **megatron)
    try:
        yield made
    finally:
        if turns := made.model._turns:
            turns.of_this_rank.remove(turns)  # there for as long as a rank lives, and its memory with it
        del made.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def weighted(batch: Batch, output: Output) -> torch.Tensor:
    """A loss that uses both results: every token counts as much as its column says."""
    assert output.logprobs is not None and output.entropy is not None
    return (batch.columns["weight"] * (output.logprobs + 0.3 * output.entropy)).sum()


def sequences(lengths: Sequence[int], vocab: int, prompt: int = 16, shared: int = 0) -> Sequences:
    """Random ones, the first ``shared`` with one prompt. Weights are positive, so that little of a gradient cancels."""
    draw = np.random.default_rng(0)
    common = draw.integers(0, vocab, prompt).tolist()
    made = []
    for i, length in enumerate(lengths):
        tokens = draw.integers(0, vocab, length).tolist()
        first = min(prompt, length - 1)
        if i < shared:
            tokens[:first] = common[:first]
        weights = np.abs(1 + 0.5 * draw.standard_normal(length)) / 100
        weights[:first] = 0.0
        made.append((tokens, weights.tolist()))
    return made


def pack(rows: Sequences, logprobs: Sequence[float] | None = None, temperature: float = 1.0) -> Batch:
    """One micro-batch, on the GPU where there is one; tokens of weight 0 are not trained on."""
    lengths = np.array([len(tokens) for tokens, _ in rows], dtype=np.int64)
    tokens = np.array([t for tokens, _ in rows for t in tokens], dtype=np.int64)
    weight = np.array([w for _, weights in rows for w in weights], dtype=np.float32)
    told = np.zeros(len(tokens)) if logprobs is None else np.array(logprobs)
    none = np.zeros(len(rows), dtype=np.float32)
    packed = Packed(
        tokens=tokens,
        mask=weight != 0,
        lengths=lengths,
        logprobs=told.astype(np.float32),
        score=none,
        reward=none,
        unit=np.arange(len(rows)),
        columns={"weight": weight},
    )
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return packed.to_batch({"token": 1, "sample": 1, "unit": 1}, temperature, where)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the whole tensor, relative to its size."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def optimizer_state(model: Any) -> list[torch.Tensor]:
    """Every fp32 weight and every tensor of Adam's, in an order that never changes; not copied."""
    found = []
    for part in model._trained.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                kept = part.optimizer.state.get(parameter, {})
                moments = [kept[key] for key in sorted(kept) if isinstance(kept[key], torch.Tensor) and kept[key].dim()]
                found += [parameter.data, *moments]
    return found


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: error(found[name], tensor) for name, tensor in expected.items()}


def free() -> int:
    """Bytes that nobody holds on the GPU; what this process keeps for later is given back first."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def free_everywhere() -> int:
    """The same of every GPU, added up."""
    free()
    return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))
