"""Generalized advantage estimation over packed sequences, without a loop over tokens.

With values V, rewards r, discount g and decay l, over the tokens of one sequence that the policy wrote:

    delta_t = r_t + g V_{t+1} - V_t        A_t = delta_t + g l A_{t+1}        V = A = 0 after the last token

(Schulman et al. 2015, arXiv:1506.02438, eqs. 11 and 16). By hand, with g = 1, l = 0.5, r = (0, 0, 1) and V = (0.5, 0.5,
0.5): delta = (0, 0, 0.5), A = (0.125, 0.25, 0.5).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16  # of a row; the work is so many times the number of tokens, in a matrix product


def gae(
    values: Tensor, rewards: Tensor, mask: Tensor, seq: Tensor, gamma: float, lam: float, skip: bool = True
) -> Tensor:
    """Advantages [T] in the dtype of ``values``, 0 off the mask.

    All are [T]: ``values`` of the state that a token was drawn in, ``rewards`` for drawing it, ``mask`` of tokens that
    the policy wrote, ``seq`` the sequence of each, ascending. With ``skip`` other tokens are as if they were not there;
    else they discount, with value and reward 0.
    """
    if not len(seq):
        return torch.zeros_like(values)
    starts = torch.searchsorted(seq, torch.arange(int(seq[-1]) + 2, device=seq.device))  # of each sequence; then T
    if skip:
        taken = mask.nonzero().squeeze(1)
        starts = torch.searchsorted(taken, starts)
        v, delta = values.index_select(0, taken), rewards.index_select(0, taken)
    else:
        v, delta = values * mask, rewards * mask
    if not len(v):
        return torch.zeros_like(values)
    counts, last = starts.diff(), starts[1:] - 1  # of an empty sequence that of the one before, or of all
    at_last = delta.sub_(v)[last]
    delta[:-1].add_(v[1:], alpha=gamma)
    delta[last] = at_last
    chunks = -(-counts // CHUNK)
    place, size = _places(counts, chunks, len(v))
    rows = delta.new_zeros(size).index_copy_(0, place, delta).view(-1, CHUNK)
    found = _sums(rows, chunks, gamma * lam).view(-1).index_select(0, place)
    return torch.zeros_like(values).index_copy_(0, taken, found) if skip else found * mask


def _places(counts: Tensor, chunks: Tensor, n: int) -> tuple[Tensor, int]:
    """Where each of ``n`` numbers, in stretches of ``counts``, lies once every stretch begins a chunk of its own."""
    shift = CHUNK * (chunks.cumsum(0) - chunks) - (counts.cumsum(0) - counts)
    place = torch.repeat_interleave(shift, counts, output_size=n)
    return place.add_(torch.arange(n, device=place.device)), CHUNK * int(chunks.sum())


def _sums(rows: Tensor, chunks: Tensor, decay: float) -> Tensor:
    """``y_t = x_t + decay y_{t+1}`` within each stretch, x being ``rows`` [C, CHUNK], of which stretch s has
    ``chunks[s]``: within chunks by one matrix product, then, the same way, over their heads."""
    step = torch.arange(CHUNK, device=rows.device)
    gap = (step[:, None] - step).to(rows.dtype)  # powers[j, i] is what x_j counts for y_i
    local = rows @ torch.where(gap >= 0, decay ** gap.clamp(min=0), 0.0)
    if int(chunks.max()) <= 1:
        return local
    above = -(-chunks // CHUNK)
    place, size = _places(chunks, above, len(rows))
    heads = rows.new_zeros(size).index_copy_(0, place, local[:, 0])
    whole = _sums(heads.view(-1, CHUNK), above, decay**CHUNK).view(-1)[place]  # y at the head of each chunk
    following = torch.cat([whole[1:], whole.new_zeros(1)])
    following[chunks.cumsum(0) - 1] = 0.0
    return local.addcmul_(following[:, None], (decay ** (CHUNK - step).to(rows.dtype))[None])
