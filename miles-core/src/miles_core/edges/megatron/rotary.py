"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34) at given positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .hf import Architecture, Llama3Scaling


class Rotary(torch.nn.Module):
    """Angles of each rotated pair: position times ``theta ** (-2 i / width)``. Nothing of it is trained or saved."""

    def __init__(self, width: int, model: Architecture, device: torch.device) -> None:
        super().__init__()
        powers = torch.arange(0, width, 2, dtype=torch.int64).float() / width
        frequencies = 1.0 / model.rope_theta**powers
        if model.scaling:
            frequencies = _scaled(frequencies, model.scaling)
        self.frequencies = frequencies.to(device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines [T, 1, width] and sines [T, 1, width / 2] at ``positions`` [T], computed in float32."""
        angles = torch.outer(positions.float(), self.frequencies)[:, None]
        return torch.cat((angles, angles), dim=-1).cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended linearly."""
    context = scaling.original_max_position_embeddings
    turns = context * frequencies / (2 * math.pi)  # how often a pair turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [T, heads, width] with the pair (i, i + width / 2) of each head rotated by its token's angle i."""
    if x.is_cuda:
        from .kernels import rotate as on_gpu

        return on_gpu(x, cos, sin)
    rotated: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """Three passes over memory each way, where the same formula in plain operations takes eight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return y
