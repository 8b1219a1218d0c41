"""Groups of ragged sequences twice over: packed, as plugins get them, and padded [B, L], as references want them.

Every number is a multiple of 2^-12, hence exact in float32 too: where a reference casts its inputs, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from miles_core import Plugin
from miles_core.config import RunConfig
from miles_core.packing import count, pack
from miles_core.types import Batch, Group, Mean, Output, Sample
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MAX_TOKENS = 16
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

# The same examples on every machine, and no deadline: a busy machine is no failure.
examples = settings(max_examples=15, derandomize=True, deadline=None)


def build[P: Plugin](plugin: type[P], batch: dict[str, Any] | None = None, **keys: Any) -> P:
    """A plugin with these keys of its table, in a run that is otherwise as it is by default."""
    tables = {"algorithm": "any", "model": {"path": "model"}, "rollout": {"max_tokens": MAX_TOKENS}}
    return plugin(plugin.Config.model_validate(keys), RunConfig.model_validate(tables | {"batch": batch or {}}))


class Case:
    """``groups`` says of each sequence how many tokens its prompt has, and which later ones are trained on."""

    LOGPROBS = ("logprobs", "old", "ref", "rollout")
    OTHERS = ("entropy", "values", "new_values", "token_advantage", "returns")

    def __init__(self, groups: Sequence[Sequence[tuple[int, Sequence[bool]]]], seed: int, spread: float = 0.4):
        self.draw = torch.Generator().manual_seed(seed)
        shapes = [shape for group in groups for shape in group]
        self.index = [g for g, group in enumerate(groups) for _ in group]
        self.prompts = [prompt for prompt, _ in shapes]
        self.masks = [torch.tensor([*[False] * prompt, *mask]) for prompt, mask in shapes]
        self.rewards = (torch.randint(-4, 5, (len(shapes),), generator=self.draw) / 4).tolist()  # with ties
        self.advantage = self.numbers(len(shapes))
        self.rows: dict[str, list[Tensor]] = {name: [] for name in (*self.LOGPROBS, *self.OTHERS)}
        for mask in self.masks:
            base = -3 * self.numbers(len(mask)).abs()
            for name in self.LOGPROBS:
                noise = 0.0 if name == "logprobs" else spread * self.numbers(len(mask))
                self.rows[name].append(self.exact((base + noise) * mask))
            for name in self.OTHERS:  # off the mask stands what nothing may look at
                self.rows[name].append(self.numbers(len(mask)))
        self.counts = count([self.samples()])

    @staticmethod
    def exact(x: Tensor) -> Tensor:
        return (x * 4096).round() / 4096

    def numbers(self, n: int) -> Tensor:
        return self.exact(torch.randn(n, generator=self.draw, dtype=torch.float64))

    # -- as plugins get it -----------------------------------------------------------------------------------------

    def samples(self) -> list[Sample]:
        return [
            Sample(tokens=[0] * len(mask), mask=mask.tolist(), logprobs=[0.0] * len(mask), reward=reward, score=0.0)
            for mask, reward in zip(self.masks, self.rewards, strict=True)
        ]

    def groups(self) -> list[Group]:
        groups: dict[int, list[Sample]] = {}
        for g, sample in zip(self.index, self.samples(), strict=True):
            groups.setdefault(g, []).append(sample)
        return [Group(g, samples) for g, samples in groups.items()]

    def packed(self, which: Sequence[int] | None = None, advantage: str = "advantage") -> tuple[Batch, Output]:
        """The sequences ``which``, in that order, as one micro-batch of this update; in float64."""
        which = range(len(self.masks)) if which is None else which
        samples = self.samples()
        batch = pack([[samples[i]] for i in which], {}).to_batch(self.counts, 1.0, "cpu")

        def cat(name: str) -> Tensor:
            return torch.cat([torch.empty(0, dtype=torch.float64), *(self.rows[name][i] for i in which)])

        batch.rollout_logprobs, batch.old_logprobs = cat("rollout"), cat("old")
        batch.score = batch.reward = batch.reward.double()
        batch.columns = {name: cat(name) for name in ("values", "returns", "token_advantage")}
        batch.columns |= {"ref_logprobs": cat("ref"), "advantage": self.advantage[list(which)][batch.seq]}
        batch.columns["advantage"] = batch.columns[advantage]
        leaves = {"logprobs": "logprobs", "entropy": "entropy", "values": "new_values"}
        return batch, Output(**{field: cat(name).requires_grad_() for field, name in leaves.items()})

    # -- as references want it -------------------------------------------------------------------------------------

    def padded(self, name: str) -> Tensor:
        """[B, L] of what follows the prompts, ragged on the right."""
        return self.cut(self.rows[name]).requires_grad_(name in ("logprobs", "entropy", "new_values"))

    def cut(self, rows: Sequence[Tensor]) -> Tensor:
        return pad_sequence([row[n:] for row, n in zip(rows, self.prompts, strict=True)], batch_first=True)

    def repad(self, x: Tensor) -> Tensor:
        """[T], as ``packed()`` orders it, as [B, L]."""
        return self.cut(x.split([len(mask) for mask in self.masks]))

    @property
    def mask(self) -> Tensor:
        """[B, L] float64."""
        return self.cut([mask.double() for mask in self.masks])

    @property
    def last(self) -> Tensor:
        """[B, L] float64: 1 on the last trained token of each sequence."""
        ahead = self.mask.flip(1).cumsum(1).flip(1)
        return self.mask * (ahead == 1)


def total(plugin: Any, batch: Batch, output: Output, role: str = "policy") -> Tensor:
    """What the loop descends: the loss and its penalties, each over its global count."""
    terms: list[Mean] = [plugin.miles_loss(role=role, batch=batch, output=output)]
    if hasattr(plugin, "miles_penalty"):
        terms += plugin.miles_penalty(role=role, batch=batch, output=output).values()
    return torch.stack([term.sum / batch.counts[term.per] for term in terms]).sum()


def means(plugin: Any, batch: Batch, output: Output, role: str = "policy") -> dict[str, float]:
    """The metrics of the loss, as the loop reports them."""
    found = plugin.miles_loss(role=role, batch=batch, output=output).metrics
    return {name: float(mean.sum) / batch.counts[mean.per] for name, mean in found.items()}


def agree(ours: Any, theirs: Any) -> None:
    ours, theirs = (torch.as_tensor(x).detach().double() for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def differ(ours: Any, theirs: Any) -> None:
    """By far more than rounding: what a test says of a disagreement stays true."""
    ours, theirs = (torch.as_tensor(x).detach().double() for x in (ours, theirs))
    assert (ours - theirs).abs().max() > 1e-3


def agree_with_gradients(case: Case, ours: Tensor, leaf: Tensor, theirs: Tensor, padded: Tensor) -> None:
    """Two losses, and their gradients to our ``leaf`` [T] and to the reference's ``padded`` [B, L]."""
    agree(ours, theirs)
    (mine,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    (their,) = torch.autograd.grad(theirs, padded, retain_graph=True)
    agree(case.repad(mine), their)


def grouped(size: int | None = None, gaps: bool = True, most: int = 9) -> st.SearchStrategy[list]:
    """Groups of ``size`` sequences each, or of any size above 1; with ``gaps``, a tool wrote some of the tokens."""
    mask = st.lists(st.booleans(), max_size=most - 1).map(lambda m: [*m, True])
    if not gaps:
        mask = st.integers(1, most).map(lambda n: [True] * n)
    sequence = st.tuples(st.integers(1, 3), mask)
    group = st.lists(sequence, min_size=size or 2, max_size=size or 4)
    return st.lists(group, min_size=1, max_size=3)


def cases(**shape: Any) -> st.SearchStrategy[Case]:
    return st.builds(Case, grouped(**shape), st.integers(0, 2**31))
