"""Attention over packed rows, as a module of Megatron's layer specification.

A micro-batch is one row of tokens, its sequences laid end to end, with what several of them share only once.
Megatron's own packed path (``thd``) needs Transformer Engine and loops over sequences in Python for rotary embeddings.
Here ``Row`` rides through Megatron as its packed-sequence parameters, with ``qkv_format`` left unset. Attention rotates
queries and keys by each token's own position, and gives every sequence what it shares. Sequences are padded on the
right: under a causal mask a token never looks to its right, so the padding needs no mask of its own and PyTorch's fused
kernels apply. A GPU has a kernel for rows of several lengths, too, half as fast; it takes the rows that padding would
blow up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from .rotary import rotate

LONG = 1024  # tokens from which on the GPU's kernel for equal lengths is worth the plan it makes for each new shape
GRAIN = 256  # lengths are rounded up to a multiple of this, so that shapes repeat
WASTE = 1.5  # most work on padding and tokens beside that on tokens alone; the other kernel is 1.9 times slower


@dataclass
class Row(PackedSeqParams):
    """Where the sequences of a packed row are, worked out once per micro-batch and shared by every layer."""

    positions: Tensor | None = None  # [T] int64: place of each token within its sequence
    padded: Tensor | None = None  # [P] int64: the token at each place attention sees; None where they are the row
    packed: Tensor | None = None  # [T] int64: a place of each token there; None likewise
    blocks: tuple[tuple[int, int], ...] = ()  # (sequences, padded length) of each, in padded order; none: by starts
    shares: bool = False  # whether some token stands in several sequences
    starts: Tensor | None = None  # [S + 1] int32: where each sequence begins, shared prompts in each, then the end
    longest: int = 0  # of the sequences
    cos: Tensor | None = None  # [T, 1, width] of the rotary angles
    sin: Tensor | None = None  # [T, 1, width / 2]


def row(starts: Sequence[int], device: torch.device, seen: np.ndarray[Any, Any] | None = None) -> Row:
    """The row of the sequences that begin at ``starts``, which ends with their length together.

    ``seen`` says which of the row's tokens their tokens are; left out, every one is a token of its own.
    Sequences are laid out longest first in blocks, and a block ends where a sequence would be padded to more than
    twice its length; padding thus never doubles the work, however the lengths are spread.
    """
    ends = np.asarray(starts, dtype=np.int64)
    begins, lengths = ends[:-1], np.diff(ends)
    begins, lengths = begins[lengths > 0], lengths[lengths > 0]
    order = np.argsort(-lengths, kind="stable")
    begins, lengths = begins[order], lengths[order]
    shares = seen is not None and not np.array_equal(seen, np.arange(len(seen)))
    cuts, grain = _cuts(lengths, shares, device.type)
    blocks = tuple((stop - start, -(-int(lengths[start]) // grain) * grain) for start, stop in pairwise(cuts))
    positions, packed = np.empty((2, int(ends[-1])), dtype=np.int64)
    padded = np.zeros(sum(rows * width for rows, width in blocks), dtype=np.int64)
    place = 0
    for (start, stop), (rows, width) in zip(pairwise(cuts), blocks, strict=True):
        columns = np.arange(width)
        real = columns < lengths[start:stop, None]
        tokens = (begins[start:stop, None] + columns)[real]
        places = (place + np.arange(rows * width).reshape(rows, width))[real]
        padded[places], packed[tokens] = tokens, places
        positions[tokens] = np.broadcast_to(columns, real.shape)[real]
        place += rows * width
    if not blocks:
        padded = packed = np.arange(int(ends[-1]))
        positions = packed - np.repeat(ends[:-1], np.diff(ends))
    if seen is not None:
        first = np.unique(seen, return_index=True)[1]
        positions, padded, packed = positions[first], seen[padded], packed[first]
    result = Row(
        positions=to_device(positions, device),
        blocks=blocks,
        starts=to_device(ends.astype(np.int32), device),
        longest=int(lengths.max(initial=0)),
        shares=shares,
    )
    if not np.array_equal(padded, np.arange(len(packed))):  # else they are in order already
        result.padded, result.packed = (to_device(x, device) for x in (padded, packed))
    return result


def to_device(x: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy on a GPU that nobody waits for, or the memory of ``x`` itself."""
    there = torch.from_numpy(x)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there


def _cuts(lengths: np.ndarray[Any, Any], shares: bool, kind: str) -> tuple[list[int], int]:
    """Where the blocks of sequences of falling ``lengths`` begin, then their number; what lengths are rounded up to.

    On a GPU one block or none.
    """
    if kind == "cuda":
        longest = int(lengths.max(initial=0))
        width = -(-longest // GRAIN) * GRAIN
        dense = longest >= LONG and not shares and len(lengths) * width**2 <= WASTE * int((lengths**2).sum())
        return ([0, len(lengths)] if dense else [0]), GRAIN
    cuts = [0]
    while cuts[-1] < len(lengths):
        cuts.append(int(np.searchsorted(-lengths, -(lengths[cuts[-1]] / 2), side="right")))
    return cuts, 1


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a row, by PyTorch's fused kernels."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_options: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Row,
        **_options: Any,
    ) -> Tensor:
        """``query`` [T, 1, heads, width], ``key`` and ``value`` [T, 1, groups, width] of this tensor-parallel rank.

        Returns [T, 1, heads * width].
        """
        row = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        q, k = (rotate(x, row.cos, row.sin) for x in (q, k))  # type: ignore[arg-type]
        if row.padded is not None:
            spread = _Spread.apply if not row.shares else lambda x, padded, _: x.index_select(0, padded)
            q, k, v = (spread(x, row.padded, row.packed) for x in (q, k, v))  # type: ignore[no-untyped-call]
        out = self._by_blocks(q, k, v, row) if row.blocks else self._by_starts(q, k, v, row)
        if row.packed is not None:
            out = _Collect.apply(out, row.packed) if not row.shares else out.index_select(0, row.packed)  # type: ignore[no-untyped-call]
        return out.unsqueeze(1)

    def _by_blocks(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        blocks, place = [], 0
        for rows, width in row.blocks:
            stop = place + rows * width
            block_q, block_k, block_v = (
                x[place:stop].view(rows, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
            )
            with _kernel(q.device.type):
                out = torch.nn.functional.scaled_dot_product_attention(
                    block_q,
                    block_k,
                    block_v,
                    is_causal=True,
                    scale=self.softmax_scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            blocks.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
            place = stop
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _by_starts(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        out: Tensor = _Varlen.apply(q, k, v, row.starts, row.longest, self.softmax_scale)  # type: ignore[no-untyped-call]
        return out.flatten(1)


def _kernel(kind: str) -> AbstractContextManager[None]:
    """cuDNN's, on a GPU: PyTorch would take the one for several lengths there, too."""
    if kind != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


class _Varlen(torch.autograd.Function):
    """The operator behind ``torch.nn.attention.varlen_attn``, which spends twice its time on the CPU.

    It looks at nothing on the GPU, so the CPU may run ahead.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float | None) -> Tensor:
        out, log_sums, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, log_sums, starts, seed, unused)
        ctx.longest, ctx.scale = longest, scale
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, starts, seed, unused = ctx.saved_tensors
        longest = ctx.longest
        grads = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, log_sums, starts, starts, longest, longest, 0.0, True, seed, unused, scale=ctx.scale
        )
        return (*grads, None, None, None)


class _Spread(torch.autograd.Function):
    """Rows to their places; every row has one, so the gradient is looked up, too, and not added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padded: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return x.index_select(0, padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """And back; padding has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.rows = len(x)
        return x.index_select(0, packed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        places = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return places.index_copy_(0, ctx.saved_tensors[0], grad), None
