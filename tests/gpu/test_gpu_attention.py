"""Attention over packed rows beside PyTorch's plain attention of one sequence at a time, on each path that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gpu_cases import error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.gpu
HEADS, GROUPS, WIDTH = 8, 4, 128


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    dense: bool  # by the kernel for equal lengths
    padded: bool = False  # which then needs padding
    shared: int = 0  # tokens of a prompt that the first two have in common


CASES = {
    "one": Case((2048,), dense=True),
    "one, not of the grain": Case((1500,), dense=True, padded=True),
    "equal": Case((1024, 1024, 1024), dense=True),
    "alike": Case((1300, 1290, 1280), dense=True, padded=True),
    "ragged": Case((317, 1200, 64, 905, 1), dense=False),
    "short": Case((64,) * 16, dense=False),
    "shared": Case((1536, 1536, 1100), dense=False, shared=1024),
}


def laid_out(case: Case) -> tuple[Any, np.ndarray[Any, Any]]:
    """The row, and which of its tokens each sequence sees, one after another."""
    from miles_core.edges.megatron import attention, hf
    from miles_core.edges.megatron.rotary import Rotary

    cuda = torch.device("cuda")
    starts = [0, *accumulate(case.lengths)]
    seen = np.arange(starts[-1])
    if case.shared:  # the second sequence's prompt is the first's
        seen[starts[1] + case.shared :] -= case.shared
        seen[starts[1] : starts[1] + case.shared] = np.arange(case.shared)
    row = attention.row(starts, cuda, seen if case.shared else None)
    model = hf.Architecture({}, 1, 1e6, None)
    row.cos, row.sin = Rotary(WIDTH, model, cuda)(row.positions, torch.bfloat16)
    return row, seen


def reference(q: Tensor, k: Tensor, v: Tensor, row: Any, seen: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """In float32, with the rotation written out."""

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        cos, sin = row.cos.float(), torch.cat((row.sin, row.sin), -1).float()
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    q, k = turned(q), turned(k)
    out = []
    for tokens in seen.split(list(lengths)):
        with sdpa_kernel(SDPBackend.MATH):
            one = scaled_dot_product_attention(
                *(x[tokens].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.1, enable_gqa=True
            )
        out.append(one[0].transpose(0, 1).flatten(1))
    return torch.cat(out)


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_attend_as_their_sequences_do(name: str) -> None:
    from miles_core.edges.megatron import attention

    case = CASES[name]
    row, seen = laid_out(case)
    assert bool(row.blocks) == case.dense and (row.padded is not None) == (case.padded or bool(case.shared))
    torch.manual_seed(0)
    total = int(seen.max()) + 1
    inputs = [torch.randn(total, heads, WIDTH, device="cuda").bfloat16() for heads in (HEADS, GROUPS, GROUPS)]
    mine, theirs = ([x.to(kind).clone().requires_grad_() for x in inputs] for kind in (torch.bfloat16, torch.float32))
    module = attention.PackedAttention(SimpleNamespace(), softmax_scale=0.1)
    found = module(*(x[:, None] for x in mine), None, packed_seq_params=row).squeeze(1)
    # Where a token is seen by several sequences it has one query, so its result is that of the first of them.
    places = torch.from_numpy(np.unique(seen, return_index=True)[1]).cuda()
    expected = reference(*theirs, row, torch.from_numpy(seen).cuda(), case.lengths)[places]
    sent = torch.randn_like(expected).bfloat16()
    assert found.dtype == torch.bfloat16 and error(found, expected) < 1e-2
    for a, b in zip(
        torch.autograd.grad(found, mine, sent), torch.autograd.grad(expected, theirs, sent.float()), strict=True
    ):
        assert error(a, b) < 2e-2
