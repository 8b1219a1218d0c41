"""Each Triton kernel beside the formulas that run on a CPU, forwards and backwards.

``test_kernels.py`` runs this file in Triton's interpreter, ``tests/gpu`` calls the checks on a GPU. A check takes the
device and the precision of its inputs; what it is compared with is always computed in float32, on the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from miles_core.edges.megatron import device, kernels, rotary
from miles_core.edges.megatron.logprobs import _FusedTokenLogprobs, _TokenLogprobs
from torch import Tensor

layers = device.import_megatron("miles_core.edges.megatron.layers")

# Most difference, relative and absolute: one rounding of the result, and of gradients that pass two.
CLOSE = {torch.float32: 5e-5, torch.bfloat16: 2e-2}
Where = tuple[str, torch.dtype]


def randn(where: Where, *shape: int) -> Tensor:
    return torch.randn(*shape, device=where[0]).to(where[1])


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype or found.dtype == torch.float32
    size = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found.float(), expected.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype] * size)


def same(kernel: Callable[..., Tensor], formula: Callable[..., Tensor], where: Where, *inputs: Tensor) -> None:
    """Results and gradients of every input agree; ``formula`` sees the inputs in float32."""
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.float().clone().requires_grad_() for x in inputs]
    found, expected = kernel(*mine), formula(*theirs)
    close(found, expected, where[1])
    sent = torch.randn_like(expected).to(where[1])
    for a, b in zip(
        torch.autograd.grad(found, mine, sent), torch.autograd.grad(expected, theirs, sent.float()), strict=True
    ):
        close(a, b, where[1])


def check_norm(where: Where) -> None:
    """Also where the rows are a part of a wider tensor, where they are transposed, and where there are none."""

    def formula(x: Tensor, w: Tensor) -> Tensor:
        out: Tensor = layers._RMSNorm.apply(x, w, 1e-5)
        return out

    for shape in ((5, 1, 24), (3, 1, 4, 16), (300, 64), (0, 1, 8)):
        weight = randn(where, shape[-1])
        same(lambda x, w: kernels.rms_norm(x, w, 1e-5), formula, where, randn(where, *shape), weight)
    wide = randn(where, 6, 1, 4, 3 * 16)
    same(
        lambda x, w: kernels.rms_norm(x[..., 16:32], w, 1e-5),
        lambda x, w: formula(x[..., 16:32], w),
        where,
        wide,
        randn(where, 16),
    )
    same(
        lambda x, w: kernels.rms_norm(x.transpose(0, 2), w, 1e-5),
        lambda x, w: formula(x.transpose(0, 2), w),
        where,
        wide,
        randn(where, 48),
    )


def check_swiglu(where: Where) -> None:
    """Widths that fill no block, one and several; the formula writes over its input, so it gets a copy."""
    for shape in ((7, 1, 50), (3, 2100), (0, 1, 8)):
        same(lambda x: kernels.swiglu(x * 1.0), lambda x: layers._SwiGLU.apply(x * 1.0), where, randn(where, *shape))


def check_rotation(where: Where) -> None:
    """Of whole heads, and of those inside a fused projection; three heads, so not a power of two."""
    half = torch.rand(6, 1, 8, device=where[0])
    angles = [x.to(where[1]) for x in (torch.cat((half, half), -1), torch.rand(6, 1, 8, device=where[0]))]
    exact = [x.float() for x in angles]
    for heads in (3, 4):
        same(
            lambda x: kernels.rotate(x, *angles),
            lambda x: rotary._Rotate.apply(x, *exact),
            where,
            randn(where, 6, heads, 16),
        )
    same(
        lambda x: kernels.rotate(x[:, 0, :, 16:32], *angles),
        lambda x: rotary._Rotate.apply(x[:, 0, :, 16:32], *exact),
        where,
        randn(where, 6, 1, 4, 48),
    )
    none = [x[:0] for x in angles]
    assert kernels.rotate(randn(where, 0, 3, 16), *none).shape == (0, 3, 16)


def check_softmax(where: Where) -> None:
    """A vocabulary wider than the part of a row that is read at once; no rows at all."""
    for rows, vocab in ((9, 5000), (0, 50)):
        hidden, weight = randn(where, rows, 8), randn(where, vocab, 8)
        logits = hidden @ weight.t()
        tokens = torch.randint(0, vocab, (rows,), device=where[0])
        for temperature in (1.0, 0.7):
            most, total, weighed = kernels.softmax_sums(logits, temperature)
            scaled = (logits.float() / temperature).requires_grad_()
            log_p = scaled.log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            close(most + total.log(), scaled.logsumexp(-1), torch.float32)
            close(total.log() - weighed / total, entropy, torch.float32)
            by_logprob, by_entropy = torch.randn(2, rows, device=where[0])
            drawn = log_p.gather(1, tokens[:, None])[:, 0]
            (expected,) = torch.autograd.grad((drawn * by_logprob + entropy * by_entropy).sum(), scaled)
            log_sums = scaled.detach().logsumexp(-1)
            found = kernels.grad_logits(logits, tokens, log_sums, entropy.detach(), by_logprob, by_entropy, temperature)
            close(found, expected / temperature, where[1])


def check_logprobs(where: Where) -> None:
    """Fused as on a GPU beside unfused as on a CPU, whole and in chunks of rows."""
    vocab = 5000
    given = [randn(where, 9, 64) / 4, randn(where, vocab, 64) / 4]
    tokens, sent = torch.randint(0, vocab, (9,), device=where[0]), torch.randn(2, 9, device=where[0])
    for rows in (100, 9, 4):
        results = []
        for kind, inputs in ((_FusedTokenLogprobs, given), (_TokenLogprobs, [x.float() for x in given])):
            hidden, weight = (x.clone().requires_grad_() for x in inputs)
            both = kind.apply(hidden, weight, tokens, 0.8, None, rows)
            total = sum((x * s).sum() for x, s in zip(both, sent, strict=True))
            results.append((*both, *torch.autograd.grad(total, (hidden, weight))))
        for found, expected in zip(*results, strict=True):
            close(found, expected, where[1])


CHECKS = (check_norm, check_swiglu, check_rotation, check_softmax, check_logprobs)

if __name__ == "__main__":
    torch.manual_seed(0)
    for check in CHECKS:
        for dtype in CLOSE:
            check((sys.argv[1], dtype))
            print(check.__name__, dtype)
