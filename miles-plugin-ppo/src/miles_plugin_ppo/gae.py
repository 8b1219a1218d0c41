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
    trained = mask.nonzero().squeeze(1)
    at = trained if skip else torch.arange(len(mask), device=mask.device)
    v, r = ((x * mask)[at].double() for x in (values, rewards))
    after = torch.cat([seq[at][1:] == seq[at][:-1], mask.new_zeros(1)])[: len(at)]  # the same sequence goes on
    following = torch.cat([v[1:], v.new_zeros(1)])[: len(at)] * after
    advantages = discounted_sums(r + gamma * following - v, after, gamma * lam)
    found = torch.zeros_like(values).index_copy(0, at, advantages.to(values.dtype))
    return found * mask


def discounted_sums(x: Tensor, after: Tensor, decay: float) -> Tensor:
    """``y_t = x_t + decay y_{t+1}`` within each stretch of [N] float64; ``after`` [N] bool says that t + 1 belongs to
    it.

    The sums run through all stretches first; what came from beyond its end is then taken off each.
    """
    if not len(x):
        return x
    through = _scan(x, decay)
    place = torch.arange(len(x), device=x.device)
    ends = (~after).nonzero().squeeze(1)
    end = ends[torch.searchsorted(ends, place)]
    beyond = torch.cat([through, through.new_zeros(1)])[end + 1]
    return through - decay ** (end + 1 - place).double() * beyond


def _scan(x: Tensor, decay: float) -> Tensor:
    """``y_t = x_t + decay y_{t+1}`` over all of ``x``: within chunks by one matrix product, then over their heads."""
    chunks = -(-len(x) // CHUNK)
    rows = torch.nn.functional.pad(x, (0, chunks * CHUNK - len(x))).view(chunks, CHUNK)
    step = torch.arange(CHUNK, device=x.device)
    gap = step[:, None] - step  # powers[j, i] is what x_j counts for y_i
    powers = torch.where(gap >= 0, decay ** gap.clamp(min=0).double(), 0.0)
    local = rows @ powers
    if chunks > 1:
        heads = _scan(local[:, 0].contiguous(), decay**CHUNK)  # y at the head of each chunk
        local[:-1] += heads[1:, None] * decay ** (CHUNK - step).double()
    return local.view(-1)[: len(x)]
