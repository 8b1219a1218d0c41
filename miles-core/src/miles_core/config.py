"""The tables of a run, and what can be said of one that is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .types import Refused

Loc = tuple[str | int, ...]


class ConfigError(Refused):
    """One complaint per line, each ``file:line: key: what is wrong``."""


class Written(str):
    """A string and the folder that a path in it is relative to: that of its file, or the shell's."""

    folder: Path


def _locate(value: Any) -> Any:
    return value.folder / value if isinstance(value, Written) else value


Location = Annotated[Path, BeforeValidator(_locate)]  # a path as the user wrote it, made absolute


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)  # `miles plugins` builds none


class ModelTable(Table):
    path: Location  # a folder in Hugging Face format: config.json, *.safetensors, a tokenizer
    context: int | None = Field(None, gt=0)  # tokens of prompt and response; the model's own limit when left out


class OptimTable(Table):
    lr: float = Field(1e-6, gt=0)  # of Adam with decoupled weight decay; Megatron's own names are set from here
    min_lr: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)  # optimizer updates
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    max_norm: float = Field(1.0, ge=0)  # of the gradient; 0 leaves it as it is


class BatchTable(Table):
    groups: int = Field(32, gt=0)  # prompts a step trains on
    group_size: int = Field(8, gt=0)  # attempts at each
    updates: int = Field(1, gt=0)  # optimizer updates a step is split into
    epochs: int = Field(1, gt=0)  # passes over a step's samples, each of so many updates
    max_age: int = Field(16, gt=0)  # most updates between the policy that drew a token and the one that learns from it
    old_logprobs: Literal["recomputed", "engine", "both"] = "recomputed"  # "both": [correction] weighs one by the other
    micro_tokens: int = Field(8192, gt=0)  # most tokens in one packed micro-batch; a longer unit gets one of its own


class RolloutTable(Table):
    max_tokens: int = Field(1024, gt=0)  # of a response
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0 keeps the whole vocabulary
    stop_tokens: list[int] = []  # beside the tokenizer's end of sequence
    timeout_s: float = Field(600, gt=0)  # an engine that has not answered by then is restarted
    max_staleness: int = Field(2, ge=0)  # of every token, in versions of the weights; this and the next two: async only
    too_old: Literal["regenerate", "drop"] = "regenerate"  # what becomes of a group that waited too long
    weights: Literal["drain", "retract", "in_place"] | None = None  # how they are updated; left out, the engine's way


class EvalTable(Table):
    every: int = Field(0, ge=0)  # steps; 0 never. The model is also evaluated before the first step and after the last
    prompts: int | None = Field(None, gt=0)  # of the held-out split; all of it when left out
    temperature: float = Field(0.0, ge=0)
    accuracy: str | None = None  # the reward reported as eval/accuracy; the first one when left out


class CheckpointTable(Table):
    every: int = Field(0, ge=0)  # steps; 0 keeps only the last step's
    keep: int = Field(2, gt=0)  # newest ones
    keep_every: int = Field(0, ge=0)  # and for good each whose step is a multiple; 0 for none


class PlacementTable(Table):
    layout: Literal["cpu", "colocate", "split"] = "cpu"  # engines share the trainers' GPUs in turns, or have their own
    trainers: int = Field(1, gt=0)  # training ranks: one per GPU, or per CPU process
    engines: int = Field(1, ge=0)  # 0 starts none: the data holds the responses
    apart: list[str] = []  # roles that have ranks of their own, as many as trainers
    rollout_workers: int = Field(1, gt=0)
    gpu_gb: float | None = Field(None, gt=0)  # memory of each GPU, for `miles plan`; left out, as this machine's have


class RunConfig(Table):
    """One run. Tables of plugins stand beside these, each under its plugin's name."""

    algorithm: str
    plugins: list[str] = []
    use: dict[str, str] = {}  # slot = plugin, where two answer
    mode: Literal["sync", "overlap", "async"] = "sync"
    steps: int = Field(1000, gt=0)
    seed: int = Field(0, ge=0, lt=2**31)
    run_dir: Location | None = None  # runs/<name of the file's folder or of the file>, from where the command is typed
    model: ModelTable
    optim: OptimTable = OptimTable()
    batch: BatchTable = BatchTable()
    rollout: RolloutTable = RolloutTable()
    eval: EvalTable = EvalTable()
    checkpoint: CheckpointTable = CheckpointTable()
    placement: PlacementTable = PlacementTable()

    @property
    def max_staleness(self) -> int:
        """How many versions older than the newest weights a token may be when it is trained on."""
        return {"sync": 0, "overlap": 1, "async": self.rollout.max_staleness}[self.mode]

    def due(self, every: int, step: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is done after this one."""
        return every > 0 and (step % every == 0 or step == self.steps)

    def saves(self, step: int) -> bool:
        return self.due(self.checkpoint.every, step) or step == self.steps

    @property
    def own(self) -> dict[str, str]:
        """Which of core's plugins answers a slot that two of them can."""
        cpu = {"engines": "local", "transport": "shm"}
        return cpu if self.placement.layout == "cpu" else dict.fromkeys(cpu, "sglang")


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" or nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
