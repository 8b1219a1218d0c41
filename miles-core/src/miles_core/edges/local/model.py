"""A batched decoder over a KV cache that is allocated once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .architecture import Architecture
from .weights import Layer, Weights

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v), each [tokens, heads, head_dim]


class Decoder:
    """Computes next-token states for sequences that live in numbered rows of the cache.

    ``prefill`` starts sequences in any rows; ``decode`` extends those in rows 0 to n - 1 by one token each. A row is
    not cleared when a sequence leaves it: what lies beyond a sequence's own tokens is never read.
    """

    def __init__(self, weights: Weights, rows: int, context: int) -> None:
        self.weights, self.arch, self.rows, self.context = weights, weights.arch, rows, context
        a = self.arch
        # Zeros, not garbage: a masked value is multiplied by 0, and 0 times NaN is NaN.
        self.cache = torch.zeros(a.layers, 2, rows, a.kv_heads, context, a.head_dim)
        flat = self.cache.view(a.layers, 2, rows * a.kv_heads, context, a.head_dim)
        self._keys, self._values = list(flat[:, 0]), list(flat[:, 1])  # [rows * kv_heads, context, head_dim] a layer
        self._lines = [tuple(line.view(-1, a.head_dim) for line in layer) for layer in flat]
        # Where (row, kv head, position 0) stands among those lines, and which row a (row, kv head) pair belongs to.
        self._starts = torch.arange(rows * a.kv_heads).view(rows, a.kv_heads) * context
        self._columns = torch.arange(context)
        self._rotation = rotation(a, context)
        self._scale = 1.0 / math.sqrt(a.head_dim)

    def head(self, states: Tensor) -> Tensor:
        """Logits [n, vocab] of states [n, hidden]."""
        return F.linear(states, self.weights.head)

    def prefill(self, prompts: list[list[int]], rows: list[int]) -> Tensor:
        """Compute ``prompts`` from their first token into ``rows``; states [n, hidden] after their last tokens.

        Prompts of different lengths are packed end to end, and padded on the right for attention alone: a causal
        query never reaches the padding behind it.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest, total = max(lengths), sum(lengths)
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        ends = torch.tensor(lengths).cumsum(0)
        sequence = torch.arange(len(prompts)).repeat_interleave(torch.tensor(lengths))
        positions = torch.arange(total) - (ends - torch.tensor(lengths))[sequence]
        lines = (self._starts[torch.tensor(rows)[sequence]] + positions[:, None]).flatten()
        padded = None if total == longest * len(prompts) else sequence * longest + positions
        shape = (len(prompts), longest)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, lines, k, v)
            q, k, v = (_pad(x, shape, padded).transpose(1, 2) for x in (q, k, v))
            grouped = self.arch.heads != self.arch.kv_heads
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale, enable_gqa=grouped)
            out = out.transpose(1, 2).reshape(shape[0] * shape[1], -1)
            return out if padded is None else out[padded]

        return self._forward(tokens, positions, attend, ends - 1)

    def decode(self, tokens: Tensor, positions: Tensor, shortest: int, longest: int) -> Tensor:
        """Extend rows 0 to n - 1 by ``tokens`` [n] at ``positions`` [n] int64; states [n, hidden] after them.

        ``shortest`` and ``longest`` are the least and the greatest position.
        """
        a, n = self.arch, len(tokens)
        pairs, group, width = n * a.kv_heads, a.heads // a.kv_heads, longest + 1
        lines = (self._starts[:n] + positions[:, None]).flatten()
        if shortest == longest:
            mask = torch.zeros(1, 1, 1)
        else:
            beyond = self._columns[:width] > positions[:, None]
            mask = torch.zeros(n, width).masked_fill_(beyond, -torch.inf)
            mask = mask.repeat_interleave(a.kv_heads, 0).unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._write(layer, lines, k, v)
            keys, values = self._keys[layer][:pairs, :width], self._values[layer][:pairs, :width]
            q = q.reshape(pairs, group, a.head_dim)
            scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=self._scale)
            return torch.bmm(torch.softmax(scores, -1), values).view(n, -1)

        return self._forward(tokens, positions, attend, None)

    def copy(self, sources: list[int], rows: list[int], length: int) -> None:
        """Copy the first ``length`` tokens of rows ``sources`` over those of ``rows``; no row may be in both."""
        self.cache[:, :, rows, :, :length] = self.cache[:, :, sources, :, :length]

    def clear(self) -> None:
        """Forget everything: after weights that were not finite, the cache is not either."""
        self.cache.zero_()

    def _write(self, layer: int, lines: Tensor, k: Tensor, v: Tensor) -> None:
        keys, values = self._lines[layer]
        keys.index_copy_(0, lines, k.reshape(-1, self.arch.head_dim))
        values.index_copy_(0, lines, v.reshape(-1, self.arch.head_dim))

    def _forward(self, tokens: Tensor, positions: Tensor, attend: Attend, last: Tensor | None) -> Tensor:
        """[tokens] -> [tokens, hidden], or of the tokens at ``last`` only."""
        a = self.arch
        h = F.embedding(tokens, self.weights.embedding)
        turn = self._rotation[positions].unsqueeze(1)
        for i, layer in enumerate(self.weights.layers):
            x = F.rms_norm(h, (a.hidden,), layer.input_norm, a.eps)
            x = attend(i, *self._qkv(layer, F.linear(x, layer.qkv, layer.qkv_bias), turn))
            if last is not None and i == a.layers - 1:
                h, x = h[last], x[last]
            h = h + F.linear(x, layer.output, layer.output_bias)
            x = F.rms_norm(h, (a.hidden,), layer.mlp_norm, a.eps)
            gate, up = F.linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            h = h + F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)
        return F.rms_norm(h, (a.hidden,), self.weights.norm, a.eps)

    def _qkv(self, layer: Layer, qkv: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the fused projection, then normalize and rotate queries and keys together."""
        a = self.arch
        heads = qkv.view(len(qkv), -1, a.head_dim)
        qk, v = heads[:, : a.heads + a.kv_heads], heads[:, a.heads + a.kv_heads :]
        if layer.qk_norm is not None:
            qk = F.rms_norm(qk, (a.head_dim,), None, a.eps) * layer.qk_norm
        pairs = torch.view_as_complex(qk.view(len(qk), -1, a.head_dim // 2, 2))
        turned = torch.view_as_real(pairs * turn).flatten(-2)
        return turned[:, : a.heads], turned[:, a.heads :], v


def _pad(x: Tensor, shape: tuple[int, int], padded: Tensor | None) -> Tensor:
    """[tokens, heads, dim] -> [sequences, longest, heads, dim]: each token to its place in ``padded``, or in order."""
    if padded is None:
        return x.reshape(*shape, *x.shape[1:])
    room = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    return room.index_copy_(0, padded, x).view(*shape, *x.shape[1:])


def rotation(arch: Architecture, context: int) -> Tensor:
    """[context, head_dim / 2] complex64: e^(i m theta_j) of RoFormer (arXiv 2104.09864, eq. 15).

    With Llama 3.1's scaling of the frequencies where the model asks for it (arXiv 2407.21783, section 3.4.2 and its
    reference code): long wavelengths are stretched, short ones kept, those between are blended.
    """
    frequencies = arch.rope_theta ** -(torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim)
    if (scaling := arch.rope_scaling) is not None:
        original = scaling.original_max_position_embeddings
        turns = original * frequencies / (2 * math.pi)  # full turns within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = torch.arange(context).float()[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)
