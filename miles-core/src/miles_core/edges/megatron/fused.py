"""Chains of elementwise operations, each compiled into one kernel on a GPU. None of them runs on a CPU.

A GPU spends most of such a chain on moving tensors between its memory and itself, once an operation. Each function is
compiled at its first use in a process, for any number of rows and for each width apart: a width that is not known makes
every index a division.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LAYOUTS = 64  # of the arguments of one function, compiled apart; beyond them it would silently not be compiled


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = LAYOUTS
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


def _rows(*tensors: Tensor) -> None:
    """Say that the first dimension of each changes from call to call."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``layers.RMSNorm``; x [..., H], weight [H]."""
    _rows(x)
    out: Tensor = _compiled(_rms_norm)(x, weight, eps)
    return out


def swiglu(x: Tensor) -> Tensor:
    """See ``layers.SwiGLU``; x [..., 2 F] -> [..., F]."""
    _rows(x)
    out: Tensor = _compiled(_swiglu)(x)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``rotary.rotate``."""
    _rows(x, cos, sin)
    out: Tensor = _compiled(_rotate)(x, cos, sin)
    return out


def softmax_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row z = logits / temperature [n, V]: m = max z, sum exp(z - m) and sum exp(z - m) (z - m), float32."""
    _rows(logits)
    sums: tuple[Tensor, Tensor, Tensor] = _compiled(_softmax_sums)(logits, temperature)
    return sums


def grad_logits(
    logits: Tensor, tokens: Tensor, log_sum: Tensor, entropy: Tensor, by_logprob: Tensor, by_entropy: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """The gradient of ``logits`` [n, V] by the formulas of ``logprobs``; ``tokens`` count from this rank's column 0."""
    _rows(logits, tokens, log_sum, entropy, by_logprob, by_entropy)
    grad: Tensor = _compiled(_grad_logits)(logits, tokens, log_sum, entropy, by_logprob, by_entropy, temperature)
    return grad


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[..., : cos.shape[-1] // 2].float(), sin.float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _softmax_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.float() / temperature
    most = z.amax(dim=1)
    z = z - most[:, None]
    e = z.exp()
    return most, e.sum(dim=1), (e * z).sum(dim=1)


def _grad_logits(
    logits: Tensor, tokens: Tensor, log_sum: Tensor, entropy: Tensor, by_logprob: Tensor, by_entropy: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    log_p = logits.float() / temperature - log_sum[:, None]
    chosen = torch.arange(logits.shape[1], device=logits.device)[None] == tokens[:, None]
    grad = chosen * by_logprob[:, None] - log_p.exp() * (
        by_logprob[:, None] + by_entropy[:, None] * (log_p + entropy[:, None])
    )
    return (grad / temperature).to(logits.dtype)
