"""Log-probability and entropy of drawn tokens over a vocabulary split among tensor-parallel ranks.

For a token y drawn from softmax(z), z = W h / temperature:

    log p(y) = z_y - log sum_v exp z_v                 H = log sum_v exp z_v - sum_v p_v z_v
    d log p(y) / d z_v = [v = y] - p_v                 d H / d z_v = -p_v (log p_v + H)

Rows are taken in chunks, so that the [rows, vocabulary] logits never exist as a whole, in either direction.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}  # logits alive at once: 64 MiB and 1 GiB in float32


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    temperature: float,
    group: dist.ProcessGroup | None = None,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of the distribution it was drawn from, both [N] float32.

    ``hidden`` [N, H] is what each token was drawn from, ``weight`` [V / ranks, H] this rank's slice of the output
    layer, ``tokens`` [N] int64 in the whole vocabulary. ``group`` holds the tensor-parallel ranks in the order of
    their slices. Both results are differentiable; the gradient of ``hidden`` is this rank's share, to be summed over
    ``group``.
    """
    rows = max(1, (chunk_elements or CHUNK_ELEMENTS[hidden.device.type]) // weight.shape[0])
    group = group if group is not None and group.size() > 1 else None
    kind = _FusedTokenLogprobs if hidden.is_cuda else _TokenLogprobs
    both: tuple[Tensor, Tensor] = kind.apply(  # type: ignore[no-untyped-call]
        hidden, weight, tokens, temperature, group, rows
    )
    return both


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        local = tokens - weight.shape[0] * (group.rank() if group else 0)
        logprobs, entropy, log_sums = hidden.new_empty(3, len(tokens), dtype=torch.float32)
        log_p = None
        for start in range(0, len(tokens), rows):
            part = slice(start, start + rows)
            log_p, log_sums[part] = _log_softmax(hidden[part], weight, temperature, group)
            mine, index = _mine(local[part], weight.shape[0])
            logprobs[part] = torch.where(mine, log_p.gather(1, index).squeeze(1), 0.0)
            entropy[part] = -torch.linalg.vecdot(log_p.exp(), log_p)
        if group:
            both = torch.stack((logprobs, entropy))
            dist.all_reduce(both, group=group)
            logprobs, entropy = both.unbind()
        # The last chunk is the first that backward needs: its log-probabilities are kept, the others' made again.
        ctx.save_for_backward(hidden, weight, local, log_sums, entropy, log_p)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, local, log_sums, entropy, log_p = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for start in reversed(range(0, len(local), ctx.rows)):
            part = slice(start, start + ctx.rows)
            if log_p is None:
                log_p = _logits(hidden[part], weight, ctx.temperature) - log_sums[part, None]
            grad = _grad_logits(
                log_p,
                local[part],
                entropy[part],
                None if grad_logprobs is None else grad_logprobs[part],
                None if grad_entropy is None else grad_entropy[part],
            )
            grad = (grad / ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight.addmm_(grad.t(), hidden[part])
            log_p = None
        return grad_hidden, grad_weight, None, None, None, None


class _FusedTokenLogprobs(torch.autograd.Function):
    """The same on a GPU: logits stay in the model's precision, and each row is read once or twice, not ten times."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        from . import kernels

        local = tokens - weight.shape[0] * (group.rank() if group else 0)
        logprobs, entropy, log_sums = hidden.new_empty(3, len(tokens), dtype=torch.float32)
        logits = None
        for start in range(0, len(tokens), rows):
            part = slice(start, start + rows)
            logits = hidden[part] @ weight.t()
            most, total, weighed = kernels.softmax_sums(logits, temperature)
            if group:
                own = most.clone()
                dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
                shift = own - most
                both = torch.stack((total, weighed + total * shift)) * shift.exp()
                dist.all_reduce(both, group=group)
                total, weighed = both.unbind()
            log_sums[part], entropy[part] = total.log() + most, total.log() - weighed / total
            mine, index = _mine(local[part], weight.shape[0])
            drawn = logits.gather(1, index).squeeze(1).float() / temperature - log_sums[part]
            logprobs[part] = torch.where(mine, drawn, 0.0)
        if group:
            dist.all_reduce(logprobs, group=group)
        ctx.save_for_backward(hidden, weight, local, log_sums, entropy, logits)
        ctx.temperature, ctx.rows = temperature, rows
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        from . import kernels

        hidden, weight, local, log_sums, entropy, logits = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for start in reversed(range(0, len(local), ctx.rows)):
            part = slice(start, start + ctx.rows)
            if logits is None:
                logits = hidden[part] @ weight.t()
            grad = kernels.grad_logits(
                logits, local[part], log_sums[part], entropy[part], grad_logprobs[part], grad_entropy[part],
                ctx.temperature,
            )  # fmt: skip
            grad_hidden[part] = grad @ weight
            grad_weight.addmm_(grad.t(), hidden[part])
            logits = None
        return grad_hidden, grad_weight, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _log_softmax(
    hidden: Tensor, weight: Tensor, temperature: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """This rank's columns of the log-softmax [n, V / ranks], and the logarithm of each row's sum of exponentials."""
    logits = _logits(hidden, weight, temperature)
    if group is None:
        log_sum = logits.logsumexp(dim=1)
    else:
        most = logits.amax(dim=1)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        total = (logits - most[:, None]).exp_().sum(dim=1)
        dist.all_reduce(total, group=group)
        log_sum = total.log_().add_(most)
    return logits.sub_(log_sum[:, None]), log_sum


def _mine(local: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which tokens fall into this rank's columns, and the column [n, 1] of each, 0 for the others."""
    mine = (local >= 0) & (local < width)
    return mine, torch.where(mine, local, 0)[:, None]


def _grad_logits(
    log_p: Tensor, local: Tensor, entropy: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """Gradient of the scaled logits, in the formulas above. ``log_p`` is used up."""
    p = log_p.exp()
    by_p = torch.zeros_like(entropy) if grad_logprobs is None else -grad_logprobs
    if grad_entropy is None:
        grad = p.mul_(by_p[:, None])
    else:
        factor = log_p.add_(entropy[:, None]).mul_(-grad_entropy[:, None]).add_(by_p[:, None])
        grad = p.mul_(factor)
    if grad_logprobs is not None:
        mine, index = _mine(local, log_p.shape[1])
        grad.scatter_add_(1, index, torch.where(mine, grad_logprobs, 0.0)[:, None])
    return grad
