"""What is told of a run, on the console and in the report alike: answers, failures, where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metrics import History
from .usage import Usage

if TYPE_CHECKING:
    from ...config import RunConfig
    from ...types import Group, Sample

WHOLE = "all steps"  # the row of a timing table that the parts above it add up to
SHOWN = 10  # answers of an evaluation that a person is shown


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out prompt and what the model made of it."""

    id: str
    prompt: str
    response: str
    value: float  # of the reward that counts as accuracy, unweighted
    reward: float

    @property
    def mark(self) -> str:
        """ "right" for full marks, "wrong" for none, else the mark itself."""
        return "right" if self.value >= 1 else "wrong" if self.value <= 0 else f"{self.value:.2f}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A process that died or misbehaved after ``step`` steps, and what the loop did about it."""

    step: int
    process: str
    error: str
    action: str


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the steps' wall time. ``share`` is None where the part overlaps others, so adds up to nothing."""

    name: str
    seconds: float
    share: float | None


@dataclass(slots=True)
class Record:
    """A run so far."""

    run: RunConfig
    run_dir: Path
    history: History
    answers: list[Answer] = field(default_factory=list)
    answered: int = 0  # the step after which those answers were sampled
    failures: list[Failure] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    advice: str = ""  # which side is the slower one, if one is by much
    checkpoint: int | None = None  # the newest step that is whole on disk
    ended: bool = False
    error: str | None = None  # why it ended early

    @property
    def step(self) -> int:
        return max(self.history.last, 0)

    @property
    def seconds(self) -> float:
        return (self.history.ends("time_s") or (0.0, 0.0))[1]

    def state(self) -> dict[str, Any]:
        """As JSON values: what metrics.jsonl does not hold."""
        answers = [[a.id, a.prompt, a.response, a.value, a.reward] for a in self.answers]
        failures = [[f.step, f.process, f.error, f.action] for f in self.failures]
        return {"answers": answers, "answered": self.answered, "failures": failures, "usage": self.usage.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.answers = [Answer(*item) for item in state["answers"]]
        self.answered = state["answered"]
        self.failures = [Failure(*item) for item in state["failures"]] + self.failures
        self.usage.restore(state["usage"])


def sampled(groups: list[Group], accuracy: str | None, count: int = SHOWN) -> list[Answer]:
    """``count`` answers spread evenly over an evaluation, whatever they are worth; ``accuracy`` names the reward
    that judges them, the first one where it is None.
    """
    samples = [group.samples[0] for group in groups if group.samples]
    count = min(count, len(samples))
    return [_answer(samples[i * len(samples) // count], accuracy) for i in range(count)]


def _answer(sample: Sample, accuracy: str | None) -> Answer:
    raw: dict[str, float] = sample.info.get("raw_rewards") or sample.rewards
    value = raw.get(accuracy or next(iter(raw), ""), sample.reward)
    prompt = sample.prompt if isinstance(sample.prompt, str) else sample.prompt[-1]["content"] if sample.prompt else ""
    return Answer(sample.id, prompt, sample.response, float(value), float(sample.reward))


def timing(record: Record) -> list[Phase]:
    """Where the wall time of the training steps went, in seconds; parts with a share add up to the last row.

    Where sampling overlaps training, the trainer's wait for samples is a part of the step, sampling itself is not; nor
    is training that began while the step before was still ending.
    """
    history, whole = record.history, record.history.total("time/step")
    if not whole:
        return []
    rollout = {"sample": "sampling", "reward": "rewards"}
    trainer = {"train": "training", "sync": "moving weights", "eval": "evaluation", "checkpoint": "checkpoints"}
    other = {"other": "everything else"}
    overlap = record.run.max_staleness > 0
    parts = ({"wait": "waiting for samples"} if overlap else rollout) | trainer | other
    ahead = {"ahead": "training, beside the end of the step before"}
    seconds = {name: history.total(f"time/{name}") for name in parts | rollout | ahead}
    seconds["train"] -= seconds["ahead"]
    phases = [Phase(text, seconds[name], seconds[name] / whole) for name, text in parts.items() if seconds[name]]
    phases.append(Phase(WHOLE, whole, 1.0))
    if overlap:
        named = {name: f"{text}, beside training" for name, text in rollout.items()} | ahead
        beside = [Phase(text, seconds[name], None) for name, text in named.items()]
        phases += [phase for phase in beside if phase.seconds]
    if (outside := record.seconds - whole) >= 0.01:
        phases.append(Phase("before and between them", outside, None))
    return phases


def duration(seconds: float) -> str:
    """ "42 s", "3:05" or "2:03:05"."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def number(value: float) -> str:
    """Short, for a person: at most four digits that mean something."""
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{value:,.0f}"
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.3e}"
    return f"{value:.3f}" if size >= 0.01 else f"{value:.2e}"


def printable(text: str, keep: str = "") -> str:
    """``text`` with escapes for what a terminal would obey and what no page shows, except the characters ``keep``."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
