"""Training steps: Miles' beside Megatron's own loop, and the share of the GPU's matrix rate that they reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miles_core.edges.megatron import Megatron, arguments, device, hf
from miles_core.packing import Packed
from miles_core.types import Batch, Output, Role
from torch import Tensor

from .models import SHAPES, Shape, forget, matrix_rate, rank, run_of, seconds, write
from .table import Report, Row

MICRO_BATCHES = 4  # to an optimizer step
PAIRS, STEPS = 9, 7
BAR = 0.97  # of Megatron's own loop
BARS = {("0.6B", "local"): 0.40, ("0.6B", "transformer_engine"): 0.46}
BARS |= {("4B", "local"): 0.52, ("4B", "transformer_engine"): 0.54}
ROWS = {  # how a micro-batch is made of sequences
    "0.6B": {
        "one of 8,192": [8192],
        "8 of 1,024": [1024] * 8,
        "8 of 64 to 2,048": [317, 1200, 64, 2048, 905, 777, 1500, 1381],
    },
    "4B": {"one of 4,096": [4096], "6 of 64 to 1,200": [317, 1200, 64, 905, 777, 833]},
}
NAMES = {"local": "Megatron's local layers", "transformer_engine": "TransformerEngine's layers"}


def packed(lengths: list[int], vocab: int, seed: int) -> Packed:
    """A micro-batch of random tokens, all but the first of each sequence trained on."""
    tokens = sum(lengths)
    none = np.zeros(len(lengths), dtype=np.float32)
    return Packed(
        tokens=np.random.default_rng(seed).integers(0, vocab, tokens),
        mask=np.concatenate([np.arange(n) > 0 for n in lengths]),
        lengths=np.array(lengths, dtype=np.int64),
        logprobs=np.zeros(tokens, np.float32),
        score=none,
        reward=none,
        unit=np.arange(len(lengths)),
        columns={},
    )


class Miles:
    """A step as a training rank takes it: rows to the GPU, forwards, backwards, optimizer."""

    def __init__(self, run: Any, layers: str) -> None:
        self.plugin = Megatron(Megatron.Config(transformer_impl=layers), run)
        made: Any = self.plugin.miles_model("policy", Role(trained=True))
        self.model = made
        self.parameters = sum(p.numel() for p in self.model.module.parameters())

    def forward(self, module: torch.nn.Module, batch: Batch) -> Output:
        return self.plugin.miles_forward("policy", module, batch)

    def step(self, rows: list[Packed]) -> float:
        """Returns the mean loss, once the GPU is done."""
        tokens = int(sum(row.mask.sum() for row in rows))
        where = next(self.model.module.parameters()).device
        counts: Any = {"token": tokens, "sample": 1, "unit": 1}
        losses: list[Tensor] = []

        def loss(batch: Batch, output: Output) -> Tensor:
            assert output.logprobs is not None
            losses.append(-(output.logprobs * batch.mask).sum() / batch.counts["token"])
            return losses[-1]

        self.model.run([row.to_batch(counts, 1.0, where) for row in rows], self.forward, loss)
        self.model.step(lambda norm: None)
        return sum(float(value.detach()) for value in losses)


@dataclass(frozen=True)
class Given:
    """A micro-batch as Megatron's own training script has it: everything on the GPU before the first step."""

    tokens: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    labels: Tensor  # [1, T]: the next token
    mask: Tensor  # [1, T] float32: 0 where a sequence ends
    row: Any  # the attention's own packed-sequence parameters


class Bare:
    """Megatron's model, schedule, data parallelism and optimizer, without Miles' batches, losses and log-probabilities.

    The same arguments and the same attention. Its own output layer and cross-entropy, in its fused form, which is the
    faster one; everything that can be prepared is prepared before the first step.
    """

    def __init__(self, run: Any, layers: str) -> None:
        device.install()
        build = device.import_megatron("miles_core.edges.megatron.build")
        from megatron.core.distributed import finalize_model_grads
        from miles_core.edges.megatron.weights import load_weights

        folder = run.model.path
        architecture = hf.architecture(hf.read(folder))
        args = arguments.parse(arguments.settings({"transformer_impl": layers}, run, architecture), 1)
        build.initialize(args)
        module = build.module(args, architecture)
        load_weights(module, folder)
        self.config = module.config
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.cross_entropy_loss_fusion, self.config.cross_entropy_fusion_impl = True, "native"
        self.trained = build.trained(args, module)
        self.trained.ddp.train()

    def given(self, row: Packed) -> Given:
        from miles_core.edges.megatron.attention import row as laid_out
        from miles_core.edges.megatron.forward import unwrapped

        module = self.trained.ddp
        where = next(module.parameters()).device
        ends = np.cumsum(row.lengths)
        mask = np.ones(len(row.tokens), dtype=np.float32)
        mask[ends - 1] = 0.0
        made = laid_out([0, *ends.tolist()], where)
        made.cos, made.sin = unwrapped(module).rotary(made.positions, self.config.params_dtype)  # type: ignore[operator]
        tokens, labels, weights = (
            torch.from_numpy(x).to(where)[None] for x in (row.tokens, np.roll(row.tokens, -1), mask)
        )
        assert made.positions is not None
        return Given(tokens, made.positions[None], labels, weights, made)

    def step(self, rows: list[Given]) -> float:
        """Returns the mean loss, once the GPU is done."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        ddp, optimizer, scheduler = self.trained.ddp, self.trained.optimizer, self.trained.scheduler
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        told = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(rows),
            model=ddp,
            num_microbatches=len(rows),
            seq_length=rows[0].tokens.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        scheduler.step(1)
        return float(sum(each["loss"] for each in told)) / float(sum(each["tokens"] for each in told))

    def _forward(self, rows: Iterator[Given], module: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        row = next(rows)
        losses: Tensor = module(
            input_ids=row.tokens,
            position_ids=row.positions,
            attention_mask=None,
            labels=row.labels,
            packed_seq_params=row.row,
        )
        return losses, partial(_summed, row.mask)


def _summed(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, tokens = (losses.float() * mask).sum(), mask.sum().int()
    return total, tokens, {"loss": total.detach(), "tokens": tokens}


def beside(miles: Miles, bare: Bare, lengths: list[int], vocab: int, pairs: int = PAIRS) -> tuple[float, float, float]:
    """Tokens per second of Miles and of the bare loop, medians, and the median ratio; the two take turns.

    Raises ValueError unless both have the same loss at first: else they would not compute the same model.
    """
    rows = [packed(lengths, vocab, seed) for seed in range(MICRO_BATCHES)]
    given = [bare.given(row) for row in rows]
    losses = miles.step(rows), bare.step(given)
    if abs(losses[0] - losses[1]) > 0.01 * losses[1]:
        raise ValueError(f"the loops do not train the same model: their first losses are {losses[0]} and {losses[1]}")
    for _ in range(2):
        miles.step(rows), bare.step(given)
    took = []
    for pair in range(pairs):
        work = {"miles": lambda: miles.step(rows), "bare": lambda: bare.step(given)}
        order = sorted(work, reverse=bool(pair % 2))
        spent = {name: seconds(work[name]) for name in order}
        took.append((spent["miles"], spent["bare"]))
    tokens = sum(lengths) * MICRO_BATCHES
    mine, theirs = (tokens / statistics.median(side) for side in zip(*took, strict=True))
    return mine, theirs, statistics.median(other / own for own, other in took)


def utilisation(miles: Miles, shape: Shape, lengths: list[int], steps: int = STEPS) -> tuple[float, float, float]:
    """Model FLOP/s and tokens per second of Miles' step, and the most memory it took, in GB."""
    rows = [packed(lengths, shape.vocab, seed) for seed in range(MICRO_BATCHES)]
    for _ in range(2):
        miles.step(rows)
    torch.cuda.reset_peak_memory_stats()
    took = statistics.median(seconds(lambda: miles.step(rows)) for _ in range(steps))
    work = MICRO_BATCHES * shape.flops(miles.parameters, lengths)
    return work / took, MICRO_BATCHES * sum(lengths) / took, torch.cuda.max_memory_allocated() / 1e9


def job(size: str, layers: str, names: list[str], work: Path, report: Report) -> None:
    """The rows "training" and "mfu-..." of one model and one kind of layers."""
    if layers == "transformer_engine":
        import_module("transformer_engine.pytorch")  # says at once when it is not there
    shape = SHAPES[size]
    with rank():
        run = run_of(write(work, size), "split")
        miles = Miles(run, layers)
        if "training" in names:
            report(_training(miles, Bare(run, layers), shape, layers))
            forget()
        for name in (name for name in names if name.startswith("mfu")):
            for how, lengths in ROWS[size].items():
                rate = matrix_rate()
                done, tokens, peak = utilisation(miles, shape, lengths)
                bar = BARS[size, layers]
                report(
                    Row(
                        name,
                        f"MFU of a training step, {size}, {NAMES[layers]}, rows of {how}",
                        done / 1e12,
                        "TFLOP/s",
                        rate / 1e12,
                        "bf16 product 8192^3",
                        done / rate,
                        f"at least {bar}",
                        done / rate >= bar,
                        f"{tokens:,.0f} tokens/s, at most {peak:.0f} GB; 6 N T and causal attention",
                    )
                )


def _training(miles: Miles, bare: Bare, shape: Shape, layers: str) -> Row:
    mine, theirs, ratio = beside(miles, bare, [8192], shape.vocab)
    return Row(
        "training",
        f"training, rows of 8,192 tokens, 0.6B, {NAMES[layers]}",
        mine,
        "tokens/s",
        theirs,
        "bare Megatron loop",
        ratio,
        f"at least {BAR}",
        ratio >= BAR,
        f"medians of {PAIRS} pairs of steps with {MICRO_BATCHES} micro-batches each",
    )
