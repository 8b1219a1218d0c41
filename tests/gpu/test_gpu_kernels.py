"""Triton kernels, compiled for this GPU, beside the formulas that run on a CPU."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("check", ["norm", "swiglu", "rotation", "softmax", "logprobs"])
def test_a_kernel_agrees_with_its_formula(check: str, dtype: torch.dtype) -> None:
    from core.megatron import kernel_checks

    torch.manual_seed(0)
    getattr(kernel_checks, f"check_{check}")(("cuda", dtype))
