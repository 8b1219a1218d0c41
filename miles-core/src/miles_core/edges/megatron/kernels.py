"""Triton kernels for what a GPU would otherwise do in many passes over its memory. Imported only where there is one.

Each reads its inputs once, computes in float32 and writes its outputs in the precision of the inputs. A tensor whose
rows are evenly spaced, such as the keys inside a fused projection, is read where it lies.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 8  # of rows that one program adds up before it writes their sum
COLUMNS = 4096  # of a row of logits read at once


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` [..., W], copied where its rows are not evenly spaced, and the elements between two of them."""
    spacing = expected = 0
    for size, step in reversed(list(zip(x.shape[:-1], x.stride()[:-1], strict=True))):
        if size == 1:
            continue
        spacing = spacing or step
        if x.stride(-1) != 1 or step != (expected or spacing):
            return x.contiguous(), x.shape[-1]
        expected = step * size
    return x, spacing or x.shape[-1]


# -- norm ------------------------------------------------------------------------------------------------------------


@triton.jit
def _norm_forward(x, weight, out, scale, rows, spacing, eps, W: tl.constexpr, B: tl.constexpr, P: tl.constexpr):
    row = tl.program_id(0) * B + tl.arange(0, B)
    column = tl.arange(0, P)
    here = (row < rows)[:, None] & (column < W)[None]
    place = row.to(tl.int64)[:, None]
    v = tl.load(x + place * spacing + column[None], here, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 1) / W + eps)
    w = tl.load(weight + column, column < W, 0.0).to(tl.float32)
    tl.store(out + place * W + column[None], v * r[:, None] * w[None], here)
    tl.store(scale + row, r, row < rows)


@triton.jit
def _norm_backward(
    x, weight, scale, grad, grad_x, parts, rows, spacing,
    W: tl.constexpr, B: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, P)
    w = tl.load(weight + column, column < W, 0.0).to(tl.float32)
    part = tl.zeros((P,), tl.float32)
    for i in range(N):
        row = (tl.program_id(0) * N + i) * B + tl.arange(0, B)
        here = (row < rows)[:, None] & (column < W)[None]
        place = row.to(tl.int64)[:, None]
        r = tl.load(scale + row, row < rows, 0.0)[:, None]
        n = tl.load(x + place * spacing + column[None], here, 0.0).to(tl.float32) * r
        g = tl.load(grad + place * W + column[None], here, 0.0).to(tl.float32)
        part += tl.sum(g * n, 0)
        g = g * w[None]
        tl.store(grad_x + place * W + column[None], r * (g - n * (tl.sum(g * n, 1) / W)[:, None]), here)
    tl.store(parts + tl.program_id(0) * P + column, part)


class _RMSNorm(torch.autograd.Function):
    """As ``layers._RMSNorm``: dx = r (g - n mean(g n)) with g = dy * weight, dw = sum dy n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, spacing = _rows(x)
        width = x.shape[-1]
        rows, padded = x.numel() // width, triton.next_power_of_2(width)
        block = max(1, 2048 // padded)
        out, scale = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(rows, dtype=torch.float32)
        if rows:
            grid = (triton.cdiv(rows, block),)
            _norm_forward[grid](x, weight, out, scale, rows, spacing, eps, width, block, padded)
        ctx.save_for_backward(x, weight, scale)
        ctx.sizes = rows, spacing, width, block, padded
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows, spacing, width, block, padded = ctx.sizes
        programs = max(1, triton.cdiv(rows, block * BLOCKS))
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = x.new_empty(programs, padded, dtype=torch.float32)
        _norm_backward[(programs,)](
            x, weight, scale, grad.contiguous(), grad_x, parts, rows, spacing, width, block, padded, BLOCKS
        )
        return grad_x, parts[:, :width].sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``layers.RMSNorm``; x [..., H], weight [H]."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


# -- activation ------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_forward(x, out, F, B: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    here = column < F
    gate = tl.load(x + row * 2 * F + column, here, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + column, here, 0.0).to(tl.float32)
    tl.store(out + row * F + column, gate * tl.sigmoid(gate) * up, here)


@triton.jit
def _swiglu_backward(x, grad, grad_x, F, B: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    here = column < F
    gate = tl.load(x + row * 2 * F + column, here, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * F + F + column, here, 0.0).to(tl.float32)
    g = tl.load(grad + row * F + column, here, 0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(grad_x + row * 2 * F + column, g * up * s * (1 + gate * (1 - s)), here)
    tl.store(grad_x + row * 2 * F + F + column, g * gate * s, here)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // 2
        out, rows = x.new_empty(*x.shape[:-1], width), x.numel() // (2 * width)
        block = min(1024, triton.next_power_of_2(width))
        ctx.grid, ctx.block = (rows, triton.cdiv(width, block)), block
        if rows:
            _swiglu_forward[ctx.grid](x, out, width, block)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        if x.numel():
            _swiglu_backward[ctx.grid](x, grad.contiguous(), grad_x, x.shape[-1] // 2, ctx.block)
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """See ``layers.SwiGLU``; x [..., 2 F] -> [..., F]."""
    out: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return out


# -- rotation --------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate(x, cos, sin, out, heads, spacing, sign, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    token, head, i = tl.program_id(0).to(tl.int64), tl.arange(0, N)[:, None], tl.arange(0, P)[None]
    pair = tl.arange(0, P)
    c = tl.load(cos + token * 2 * H + pair, pair < H, 0.0).to(tl.float32)[None]
    s = tl.load(sin + token * H + pair, pair < H, 0.0).to(tl.float32)[None] * sign
    here = (head < heads) & (i < H)
    row = token * heads + head
    first = tl.load(x + row * spacing + i, here, 0.0).to(tl.float32)
    second = tl.load(x + row * spacing + H + i, here, 0.0).to(tl.float32)
    tl.store(out + row * 2 * H + i, first * c - second * s, here)
    tl.store(out + row * 2 * H + H + i, second * c + first * s, here)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x, spacing = _rows(x)
    tokens, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        sizes = width // 2, triton.next_power_of_2(heads), triton.next_power_of_2(width // 2)
        _rotate[(tokens,)](x, cos, sin, out, heads, spacing, sign, *sizes)
    return out


class _Rotate(torch.autograd.Function):
    """The gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``rotary.rotate``; x [T, heads, width], cos [T, 1, width], sin [T, 1, width / 2]."""
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


# -- log-probabilities -----------------------------------------------------------------------------------------------


@triton.jit
def _softmax_sums(logits, most, total, weighed, warmth, V: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m, s, w = tl.full((), -1e30, tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, V, B):
        column = start + tl.arange(0, B)
        z = tl.load(logits + row * V + column, column < V, float("-inf")).to(tl.float32) * warmth
        higher = tl.maximum(m, tl.max(z, 0))
        fade = tl.exp(m - higher)
        w = (w + s * (m - higher)) * fade
        e = tl.exp(z - higher)
        s = s * fade + tl.sum(e, 0)
        w += tl.sum(tl.where(column < V, e * (z - higher), 0.0), 0)
        m = higher
    tl.store(most + row, m)
    tl.store(total + row, s)
    tl.store(weighed + row, w)


def softmax_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row z = logits / temperature [n, V]: m = max z, sum exp(z - m) and sum exp(z - m) (z - m), float32."""
    n, width = logits.shape
    sums: Tensor = logits.new_empty(3, n, dtype=torch.float32)
    if n:
        _softmax_sums[(n,)](logits, *sums, 1 / temperature, width, COLUMNS, num_warps=8)
    most, total, weighed = sums
    return most, total, weighed


@triton.jit
def _grad_logits(logits, tokens, log_sum, entropy, by_logprob, by_entropy, grad, V, warmth, B: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    here = column < V
    log_p = tl.load(logits + row * V + column, here, 0.0).to(tl.float32) * warmth - tl.load(log_sum + row)
    gl, gh = tl.load(by_logprob + row), tl.load(by_entropy + row)
    chosen = (column == tl.load(tokens + row)).to(tl.float32)
    g = chosen * gl - tl.exp(log_p) * (gl + gh * (log_p + tl.load(entropy + row)))
    tl.store(grad + row * V + column, g * warmth, here)


def grad_logits(
    logits: Tensor, tokens: Tensor, log_sum: Tensor, entropy: Tensor, by_logprob: Tensor, by_entropy: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """The gradient of ``logits`` [n, V] by the formulas of ``logprobs``; ``tokens`` count from this rank's column 0."""
    n, width = logits.shape
    grad = torch.empty_like(logits)
    if n:
        rows = (x.contiguous() for x in (tokens, log_sum, entropy, by_logprob, by_entropy))
        _grad_logits[(n, triton.cdiv(width, COLUMNS))](logits, *rows, grad, width, 1 / temperature, COLUMNS)
    return grad
