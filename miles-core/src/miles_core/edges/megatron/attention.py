"""Attention over packed rows, as a module of Megatron's layer specification.

A micro-batch is one row of T tokens, its sequences laid end to end. Megatron's own packed path (``thd``) needs
Transformer Engine and loops over sequences in Python for rotary embeddings. Here ``Row`` rides through Megatron as
its packed-sequence parameters, with ``qkv_format`` left unset. Attention rotates queries and keys by each token's own
position. A GPU has a kernel for rows of several lengths. On a CPU sequences are padded on the right: under a causal
mask a token never looks to its right, so the padding needs no mask of its own and PyTorch's fused kernel applies.
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
    padded: Tensor | None = None  # [P] int64: the token at each padded place; None when packed and padded are one
    packed: Tensor | None = None  # [T] int64: the padded place of each token; None likewise
    blocks: tuple[tuple[int, int], ...] = ()  # (sequences, padded length) of each block, in padded order
    starts: Tensor | None = None  # [S + 1] int32: where each sequence begins, then T
    longest: int = 0  # of the sequences
    cos: Tensor | None = None  # [T, 1, width] of the rotary angles
    sin: Tensor | None = None  # [T, 1, width / 2]


def row(starts: Sequence[int], device: torch.device) -> Row:
    """The row whose sequences begin at ``starts``, which ends with the number of tokens.

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
    result = Row(
        positions=torch.from_numpy(positions).to(device),
        blocks=blocks,
        starts=torch.from_numpy(ends.astype(np.int32)).to(device),
        longest=int(lengths.max(initial=0)),
    )
    if device.type != "cuda" and not np.array_equal(padded, np.arange(len(packed))):  # else they are in order already
        result.padded, result.packed = torch.from_numpy(padded), torch.from_numpy(packed)
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
        if query.is_cuda:
            return self._of_a_row(q, k, v, row)[:, None]
        if row.padded is not None:
            q, k, v = (x.index_select(0, row.padded) for x in (q, k, v))
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
                enable_gqa=query.shape[2] != key.shape[2],
            )
            blocks.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
            place = stop
        out = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        if row.packed is not None:
            out = out.index_select(0, row.packed)
        return out.unsqueeze(1)

    def _of_a_row(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # it asks for the GPU when imported

        scale, longest = self.softmax_scale, row.longest
        out = varlen_attn(q, k, v, row.starts, row.starts, longest, longest, scale=scale, window_size=(-1, 0))  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out.flatten(1)
