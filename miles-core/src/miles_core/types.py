"""What flows through a run: Sample -> Group -> Batch -> Output -> Loss, and the protocols the edges answer to.

Two conventions hold everywhere. Per-token lists and tensors run the length of ``tokens``, prompt included, and the
value at index ``t`` is about token ``t`` itself: ``logprobs[t]`` is log p(tokens[t] | the tokens before it in its
sequence). Version ``v`` of the weights is the policy after ``v`` training steps; version 0 is the model on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

Per = Literal["token", "sample", "unit"]
Message = dict[str, str]  # {"role": ..., "content": ...}


# -- rollout side: plain Python, so that it crosses processes cheaply -----------------------------------------------


@dataclass(slots=True)
class Sample:
    """One attempt at one prompt."""

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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw tokens. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1.0 keep the whole vocabulary."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample. Requests with equal ``tokens`` share their prefill."""

    id: str
    tokens: list[int]
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What was sampled: token ids and, of each, its log-probability and the version of the weights that wrote it.

    ``logprobs`` are under the distribution actually sampled from (after temperature, top-k and top-p). A greedy
    completion has none to speak of: they are those of temperature 1.
    """

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: str


class Engine(Protocol):
    """What a rollout talks to: every engine of the run behind one object."""

    async def generate(self, requests: list[Request]) -> list[Completion]:
        """Completions in the order of the requests. Raises EngineError when no engine can answer."""
        ...


class Refused(Exception):
    """The user's input cannot work. The message is all a person needs; the command ends with status 2."""


class EngineError(Exception):
    """An engine failed a request in a way that a retry did not mend."""


# -- trainer side ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Batch:
    """Sequences packed end to end into one row of T tokens: S sequences, never padded, never mixed."""

    tokens: Tensor  # [T] int64
    mask: Tensor  # [T] bool: trained on; the first token of a sequence never is
    starts: Tensor  # [S + 1] int32: where each sequence begins, then T
    seq: Tensor  # [T] int64: which sequence a token belongs to
    positions: Tensor  # [T] int64: place of a token within its sequence
    rollout_logprobs: Tensor  # [T] float32: what the engine said; 0 off the mask
    old_logprobs: Tensor | None  # [T] float32: of the policy before this step's first update; None until known
    score: Tensor  # [S] float32
    reward: Tensor  # [S] float32
    unit: Tensor  # [S] int64: which unit, within this batch, a sequence belongs to
    temperature: float  # that the sequences were sampled at; the trainer's logits are divided by it
    counts: dict[Per, int]  # over every micro-batch of every rank in this update: the denominators of every loss
    columns: dict[str, Tensor] = field(default_factory=dict)  # [T] float32, from miles_columns and miles_advantage

    def by_seq(self, x: Tensor) -> Tensor:
        """[T] -> [S]: the sum of ``x`` over each sequence's trained tokens."""
        return x.new_zeros(len(self.score)).index_add(0, self.seq, x * self.mask)

    def per_token(self, x: Tensor) -> Tensor:
        """[S] -> [T]: each sequence's value on every one of its tokens."""
        return x[self.seq]

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


@dataclass(frozen=True, slots=True)
class Role:
    """A model beside the policy."""

    trained: bool = False
    head: Literal["token", "value"] = "token"
    path: str | None = None  # a folder of Hugging Face weights; the policy's own when None


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


Forward = Callable[["nn.Module", Batch], Output]


class Model(Protocol):
    """One role's model as this training rank holds it. Every method is a collective: all ranks call it together."""

    layout: Layout

    def run(
        self, batches: list[Batch], forward: Forward, loss: Callable[[Batch, Output], Tensor] | None
    ) -> list[Output]:
        """Forward every micro-batch, and backward where ``loss`` is given; gradients add up until ``step``.

        ``loss`` returns a scalar already divided by its global denominator: gradients are summed over micro-batches
        and data-parallel ranks, never averaged. Outputs come back detached on the last stage, empty elsewhere.
        """
        ...

    def step(self, veto: Callable[[float], str | None]) -> tuple[dict[str, float], str | None]:
        """Clip, ask ``veto`` with the gradient norm, then step the optimizer and the schedule, and clear gradients.

        Returns metrics (``grad_norm``, ``lr``) and the reason the step was skipped, or None.
        """
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def save_hf(self, folder: Path) -> None:
        """Write the weights in Hugging Face format, with the configuration and tokenizer they came with."""
        ...


# -- what outlives a process ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class RunState:
    """All that the driver needs to go on from where it stopped; the ranks keep theirs beside it."""

    step: int = 0
    cursor: int = 0  # prompts taken from the data
    waiting: list[tuple[list[Group], dict[str, float]]] = field(default_factory=list)  # sampled for later steps
    plugins: dict[str, Any] = field(default_factory=dict)  # what miles_state answered
    seconds: float = 0.0  # of this run, over every process that worked on it


class Store(Protocol):
    """Keeps checkpoints. Raises OSError where it cannot write."""

    def claim(self, resume: bool) -> Path | None:
        """Make the run folder this run's. A run found there is moved aside, never overwritten; returns where to."""
        ...

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint into. It counts only after ``commit``."""
        ...

    def commit(self, folder: Path, state: RunState) -> Path:
        """Make it whole and durable, then forget the oldest ones; returns its final place."""
        ...

    def newest(self, say: Callable[[str], None]) -> tuple[Path, RunState] | None:
        """The newest whole checkpoint, or None; ``say`` hears of each one that is not whole."""
        ...


# -- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A long-lived process to start: ``target`` is ``module:Class``, imported where it runs."""

    name: str
    target: str
    args: tuple[Any, ...] = ()
    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1  # for torch and OpenMP


class Worker(Protocol):
    """A handle on a process started elsewhere; it can be sent to other processes."""

    name: str

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Run one method there. Raises what it raised; WorkerDied when the process is gone or did not answer."""
        ...

    def ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """``call`` for code that is not async; blocks."""
        ...

    async def kill(self) -> None: ...


class WorkerDied(Exception):
    """A process died, or was killed after it stopped answering."""


class Cluster(Protocol):
    """Where processes run."""

    async def start(self, process: Process) -> Worker:
        """A new named process, once its constructor returned. Raises what the constructor raised."""
        ...

    async def share(self, value: Any) -> Any:
        """A reference to ``value`` that ``Worker.call`` resolves on the other side; sent once however often used."""
        ...

    async def close(self) -> None:
        """End every process started here, and the local cluster if this run started one."""
        ...


@dataclass(frozen=True, slots=True)
class Engines:
    """How to start the engines and how to reach them: ``client`` is ``module:Class``, built from their workers."""

    processes: list[Process]
    client: str


class Transport(Protocol):
    """Moves one version of the weights out of a training rank, a bucket at a time. One object per rank; blocking.

    The driver brackets it: every engine is asked ``begin_update()``, every rank sends, then every engine is asked
    ``end_update(version)``, so that no engine serves mixed weights. A failure on the way ends in ``abort_update()``.
    """

    def connect(self, engines: list[Worker], layout: Layout) -> None: ...

    def send(self, tensors: Iterator[tuple[str, Tensor]], verify: bool) -> dict[str, float]:
        """Send all that ``tensors`` yields; with ``verify`` compare every tensor by checksum after loading.

        Returns metrics (``bytes``, ``tensors``). Raises TransportError naming the tensor and the engine.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor inside a ``Bucket``: ``length`` bytes from ``offset``."""

    name: str
    dtype: str  # torch's name without the prefix, such as "float32"
    shape: tuple[int, ...]
    offset: int
    length: int
    checksum: int | None  # crc32 of the bytes; None when not verifying


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors laid end to end in a shared-memory segment; an engine's ``load(bucket)`` copies them in place."""

    segment: str  # the path it can be opened and mapped by, on the same machine
    pieces: tuple[Piece, ...]


class TransportError(Exception):
    """Weights did not arrive as sent."""


Complain = Callable[[str, str], None]  # (key such as "data.train", what is wrong and what to do)
