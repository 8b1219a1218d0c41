"""The keys of ``[dpo]``. Where implementations disagree, the key says which of them a value follows."""

from __future__ import annotations

from typing import Literal

from miles_core import Plugin
from miles_core.config import Location
from pydantic import Field

LABELLED = ("sigmoid", "robust", "exo_pair")  # the losses that take labels to be wrong now and then


class Config(Plugin.Config):
    """Rafailov et al. 2023, arXiv:2305.18290, and what differs from it by a loss.

    loss, beta, label_smoothing, margin
        See ``losses``. ``label_smoothing`` is the share of pairs that are taken to be labelled the wrong way round;
        ``margin`` is what "simpo" wants the chosen side to be ahead by.
    ipo_length
        "average" divides the log-probability of each side by its length (TRL), "sum" does not (OpenRLHF, the paper).
    sft, sft_mean
        Weight of the mean negative log-probability of the chosen side's tokens (Pang et al. 2024, arXiv:2404.19733,
        eq. 1): over a "pair"'s, then over pairs (OpenRLHF), or over every chosen "token" of an update (TRL).
    tie
        What a pair with two equal sides counts in the accuracy; 0 in TRL.
    reference, cache
        The model that the policy is compared with, the one the run starts from when left out; and the folder that
        keeps what it said of each pair, ``reference/`` in the run folder when left out. "simpo" has no reference.
    pairs
        With an engine: pairs made of a prompt's attempts, the best with the worst, then the next of both.
    """

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "exo_pair", "simpo"] = "sigmoid"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    margin: float | None = Field(None, ge=0)  # 0.5
    ipo_length: Literal["sum", "average"] | None = None  # "sum"
    sft: float = Field(0.0, ge=0)
    sft_mean: Literal["pair", "token"] | None = None  # "pair"
    tie: float = Field(0.5, ge=0, le=1)
    reference: Location | None = None
    cache: Location | None = None
    pairs: int | None = Field(None, gt=0)  # 1

    @property
    def referenced(self) -> bool:
        return self.loss != "simpo"

    def contradictions(self) -> dict[str, str]:
        """Keys that were given but cannot have an effect beside the others, and what to do about each."""
        found = {}
        if self.label_smoothing and self.loss not in LABELLED:
            found["label_smoothing"] = f'has no effect with loss = "{self.loss}"; remove it'
        if self.loss == "exo_pair" and not self.label_smoothing:
            found["label_smoothing"] = "exo_pair takes the logarithm of it, so it must be above 0; say 0.001"
        if self.margin is not None and self.loss != "simpo":
            found["margin"] = f'has no effect with loss = "{self.loss}"; remove it'
        if self.ipo_length is not None and self.loss != "ipo":
            found["ipo_length"] = f'has no effect with loss = "{self.loss}"; remove it'
        if self.sft_mean is not None and not self.sft:
            found["sft_mean"] = "has no effect with sft = 0; remove it, or say how much it weighs, such as sft = 0.1"
        if self.reference is not None and not self.referenced:
            found["reference"] = f'loss = "{self.loss}" has no reference; remove it'
        return found
