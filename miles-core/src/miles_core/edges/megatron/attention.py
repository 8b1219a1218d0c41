"""Attention over packed rows, as a module of Megatron's layer specification.

A micro-batch is one row of tokens, its sequences laid end to end, with what several of them share only once.
Megatron's own packed path (``thd``) needs Transformer Engine and loops over sequences in Python for rotary embeddings.
Here ``Row`` rides through Megatron as its packed-sequence parameters, with ``qkv_format`` left unset. Attention rotates
queries and keys by each token's own position, and gives every sequence what it shares. A GPU has a kernel for rows of
several lengths. On a CPU sequences are padded on the right: under a causal mask a token never looks to its right, so
the padding needs no mask of its own and PyTorch's fused kernel applies.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass
class Row(PackedSeqParams):
    """Where the sequences of a packed row are, worked out once per micro-batch and shared by every layer."""

    positions: Tensor | None = None  # [T] int64: place of each token within its sequence
    padded: Tensor | None = None  # [P] int64: the token at each place attention sees; None where they are the row
    packed: Tensor | None = None  # [T] int64: a place of each token there; None likewise
    blocks: tuple[tuple[int, int], ...] = ()  # (sequences, padded length) of each block, in padded order
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
    cuts = [0]
    while cuts[-1] < len(lengths):
        cuts.append(int(np.searchsorted(-lengths, -(lengths[cuts[-1]] / 2), side="right")))
    blocks = tuple((stop - start, int(lengths[start])) for start, stop in pairwise(cuts))
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
    if device.type == "cuda":  # its kernel needs no padding
        padded = packed = np.arange(int(ends[-1]))
    if seen is not None:
        first = np.unique(seen, return_index=True)[1]
        positions, padded, packed = positions[first], seen[padded], packed[first]
    result = Row(
        positions=torch.from_numpy(positions).to(device),
        blocks=blocks,
        starts=torch.from_numpy(ends.astype(np.int32)).to(device),
        longest=int(lengths.max(initial=0)),
    )
    if not np.array_equal(padded, np.arange(len(packed))):  # else they are in order already
        result.padded, result.packed = (torch.from_numpy(x).to(device) for x in (padded, packed))
    return result


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
            q, k, v = (x.index_select(0, row.padded) for x in (q, k, v))
        out = self._on_gpu(q, k, v, row) if query.is_cuda else self._by_blocks(q, k, v, row)
        if row.packed is not None:
            out = out.index_select(0, row.packed)
        return out.unsqueeze(1)

    def _by_blocks(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        blocks, place = [], 0
        for rows, width in row.blocks:
            stop = place + rows * width
            block_q, block_k, block_v = (
                x[place:stop].view(rows, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
            )
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

    def _on_gpu(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # it asks for the GPU when imported

        scale, longest = self.softmax_scale, row.longest
        out = varlen_attn(q, k, v, row.starts, row.starts, longest, longest, scale=scale, window_size=(-1, 0))  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out.flatten(1)
