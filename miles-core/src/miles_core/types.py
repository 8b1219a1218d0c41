"""What flows through a run: Sample -> Group -> Batch -> Output -> Loss.

Two conventions hold everywhere. Per-token lists and tensors run the length of ``tokens``, prompt included, and the
value at index ``t`` is about token ``t`` itself: ``logprobs[t]`` is log p(tokens[t] | the tokens before it in its
sequence). Version ``v`` of the weights is the policy after ``v`` training steps; version 0 is the model on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Per = Literal["token", "sample", "unit"]
Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(slots=True)
class Sample:
    """One attempt at one prompt, in plain Python, so that it crosses processes cheaply."""

    prompt: str | list[Message] = ""  # text, or chat messages for the tokenizer's template
    info: dict[str, Any] = field(default_factory=dict)  # the dataset row; rewards read it, the loss never does
    id: str = ""  # "GROUP/ATTEMPT", given by the loop
    seed: int = 0  # of this attempt's sampling, given by the loop
    tokens: list[int] = field(default_factory=list)  # prompt, then everything after it
    mask: list[bool] = field(default_factory=list)  # per token: written by the policy, hence trained on
    logprobs: list[float] = field(default_factory=list)  # per token: under the sampling policy; 0.0 off the mask
    versions: list[int] = field(default_factory=list)  # per token: the weights that wrote it; -1 off the mask
    response: str = ""  # the decoded text of what follows the prompt
    finish: str = ""  # "stop", "length" or "abort"
    rewards: dict[str, float] = field(default_factory=dict)  # by name
    reward: float = 0.0  # their weighted sum
    score: float | None = None  # credit given by the algorithm; None keeps the sample out of the batch
    columns: dict[str, list[float]] = field(default_factory=dict)  # recorded by a rollout, per token


@dataclass(slots=True)
class Group:
    """Attempts at the same prompt, kept together by an explicit id."""

    id: int
    samples: list[Sample]

    @property
    def rewards(self) -> list[float]:
        return [sample.reward for sample in self.samples]


class Refused(Exception):
    """The user's input cannot work. The message is all a person needs; the command ends with status 2."""


@dataclass(slots=True)
class Batch:
    """Sequences packed end to end into one row of T tokens: S sequences, never padded, never mixed."""

    tokens: Tensor  # [T] int64
    mask: Tensor  # [T] bool: trained on; the first token of a sequence never is
    starts: Tensor  # [S + 1] int32: where each sequence begins, then T
    seq: Tensor  # [T] int64: which sequence a token belongs to
    positions: Tensor  # [T] int64: place of a token within its sequence
    rollout_logprobs: Tensor | None  # [T] float32: what the engine said; 0 off the mask. None where none drew them
    old_logprobs: Tensor | None  # [T] float32: of the policy before this step's first update; None until known
    score: Tensor  # [S] float32
    reward: Tensor  # [S] float32
    unit: Tensor  # [S] int64: which unit, within this batch, a sequence belongs to
    temperature: float  # that the sequences were sampled at; the trainer's logits are divided by it
    counts: dict[Per, int]  # over every micro-batch of every rank in this update: the denominators of every loss
    columns: dict[str, Tensor] = field(default_factory=dict)  # [T] float32, from miles_columns and miles_advantage
    weight: Tensor | None = None  # [T] float32: factor of each token's policy-gradient term; None is 1 everywhere
    weighed_by: Tensor | None = None  # the weight that ``weighed`` has applied
    host: Any = None  # the same rows in numpy, for who would wait for a GPU to read them; None where there are none

    def by_seq(self, x: Tensor) -> Tensor:
        """[T] -> [S]: the sum of ``x`` over each sequence's trained tokens."""
        return x.new_zeros(len(self.score)).index_add(0, self.seq, x * self.mask)

    def per_token(self, x: Tensor) -> Tensor:
        """[S] -> [T]: each sequence's value on every one of its tokens."""
        return x[self.seq]

    def weighed(self, x: Tensor) -> Tensor:
        """[T], terms of a policy gradient under the run's off-policy correction; as they are where it has none."""
        self.weighed_by = self.weight
        return x if self.weight is None else x * self.weight

    @property
    def lengths(self) -> Tensor:
        """[S] float32: how many trained tokens each sequence has."""
        return self.by_seq(self.mask.float())


@dataclass(slots=True)
class Output:
    """What a forward pass says of a batch. On all but the last pipeline stage only ``hidden`` is set."""

    logprobs: Tensor | None = None  # [T] float32, 0 off the mask
    entropy: Tensor | None = None  # [T] float32, of the distribution each token was drawn from; 0 off the mask
    values: Tensor | None = None  # [T] float32
    hidden: Tensor | None = None  # what the next pipeline stage receives


@dataclass(slots=True)
class Mean:
    """A sum over this batch, and what to divide the global sum by."""

    sum: Tensor  # scalar
    per: Per = "token"


@dataclass(slots=True)
class Loss(Mean):
    """A ``Mean`` to descend. The loop divides by the global count of ``per``, so no plugin ever averages."""

    metrics: dict[str, Mean] = field(default_factory=dict)


@dataclass(slots=True)
class Weight:
    """Factors of the policy-gradient terms, and what to report of them."""

    factor: Tensor  # [T] float32, without gradient
    metrics: dict[str, Mean] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Role:
    """A model of the run. Who names "policy" says how that one is trained."""

    trained: bool = False
    head: Literal["token", "value"] = "token"
    path: str | None = None  # a folder of Hugging Face weights; the policy's own when None
    optim: dict[str, Any] = field(default_factory=dict)  # keys of [optim] that it has of its own
    start: int = 1  # the first step that trains it
    cache: str | None = None  # a folder that keeps what a frozen one said of each sequence, for later steps and runs


@dataclass(frozen=True, slots=True)
class Column:
    """A per-token value the loss needs: computed by a role's forward pass, or recorded by the rollout."""

    role: str | None = None  # None: read from Sample.columns
    field: Literal["logprobs", "entropy", "values"] = "logprobs"
    pad: float = 0.0  # where a sample recorded nothing


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one training rank stands. Ranks of one ``dp_rank`` see the same data."""

    rank: int
    world: int
    dp_rank: int
    dp_size: int
    last_stage: bool  # holds the output layer, so computes losses
    reports: bool  # one rank per dp_rank, on the last stage: its metrics count, the others repeat them


Complain = Callable[[str, str], None]  # (key such as "data.train", what is wrong and what to do)
