"""Norm and activation, as modules of Megatron's layer specification. Each takes few passes over memory on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4).

    Computed in float32. The norm that Megatron falls back to refuses sequence parallelism. Under it each rank sees a
    part of the row, so the weight is marked for Megatron to add its gradient up over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_options: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            from .kernels import rms_norm

            return rms_norm(x, self.weight, self.eps)
        normed: Tensor = _RMSNorm.apply(x.float(), self.weight.float(), self.eps)  # type: ignore[no-untyped-call]
        return normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """With n = x * r, r = (mean(x^2) + eps)^(-1/2) and g = dy * weight: dx = r (g - n mean(g n)), dw = sum dy n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale: Tensor = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        scaled = grad * weight
        mean = torch.linalg.vecdot(scaled, normed).div_(x.shape[-1])[..., None]
        return scaled.addcmul_(normed, mean, value=-1).mul_(scale), grad_weight, None


class SwiGLU(torch.nn.Module):
    """``silu(gate) * up`` of ``[gate, up]``, halves of the last dimension (Shazeer 2020, arxiv.org/abs/2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            from .kernels import swiglu

            return swiglu(x)
        out: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
        return out


class _SwiGLU(torch.autograd.Function):
    """Writes the gradient over its input, which nobody else keeps: no memory to find, no halves to join.

    A second backward pass through it raises, because PyTorch sees that the saved tensor has changed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        gate, up = x.chunk(2, dim=-1)
        grad_silu = grad * up
        torch.mul(torch.nn.functional.silu(gate), grad, out=up)
        torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=gate)
        return x


class ValueHead(torch.nn.Module):
    """One number a token: ``hidden`` [N, H] -> [N] float32. Every tensor-parallel rank holds all of it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.float().t()).squeeze(1)
