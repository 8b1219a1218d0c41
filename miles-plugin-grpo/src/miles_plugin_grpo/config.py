"""The keys of ``[grpo]``. A variant is nothing but defaults for the other keys; a key that is given wins."""

from __future__ import annotations

from typing import Any, Literal

from miles_core import Plugin
from pydantic import Field, model_validator

Variant = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline"]

# Where a variant's defaults differ from those of "grpo", which are the defaults of ``Config`` itself.
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "dr_grpo", "aggregate": "constant"},
    "dapo": {"clip_high": 0.28, "aggregate": "token", "dynamic_sampling": True},
    "gspo": {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregate": "token"},
    "rloo": {"advantage": "rloo", "aggregate": "constant"},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "aggregate": "token", "kl_estimator": "k2"},
}

STD_EPS = 1e-6  # verl, slime, NeMo-RL and SkyRL agree on it; TRL has 1e-4, OpenRLHF 1e-9
NEEDS_STD = ("grpo", "reinforce_pp_baseline")  # the advantages that divide by a standard deviation


class Config(Plugin.Config):
    """One field per decision in which the algorithms differ.

    variant
        Which published algorithm the defaults of the other keys are taken from:

        - ``grpo``: Shao et al. 2024, arXiv:2402.03300, eq. 3
        - ``dr_grpo``: Liu et al. 2025, arXiv:2503.20783, section "Dr. GRPO"
        - ``dapo``: Yu et al. 2025, arXiv:2503.14476, eq. 8
        - ``gspo``: Zheng et al. 2025, arXiv:2507.18071, eq. 5
        - ``cispo``: MiniMax 2025, arXiv:2506.13585, eq. 4
        - ``rloo``: Ahmadian et al. 2024, arXiv:2402.14740, the RLOO estimator
        - ``reinforce_pp_baseline``: Hu et al. 2025, arXiv:2501.03262, "REINFORCE++ w/ Baseline"
    advantage, std_eps, std, alone
        How a sample's reward becomes its advantage: see ``advantages``. ``std_eps`` is added to the standard deviation,
        which is that of a "group" or, as with TRL's ``scale_rewards``, that of all rewards of a step: "batch". A group
        of one, which is refused, has with "reward" its reward as its advantage (verl).
    loss, clip_low, clip_high, dual_clip
        What is clipped and how: see ``losses``. Bounds are distances from 1: the ratio is kept in
        [1 - clip_low, 1 + clip_high] whatever the loss. ``dual_clip`` bounds the loss of a bad sample; off when
        left out.
    aggregate
        Over what the loss is a mean: see ``miles_core.formulas.terms.reduce``.
    dynamic_sampling, dynamic_sampling_reward, dynamic_sampling_range
        Replace groups whose samples all have the same reward by other prompts (DAPO, eq. 11). The reward is the sum of
        all, or the one named: with length shaping in the sum, a group of wrong answers seldom has equal sums. With a
        range, groups whose mean reward is not between its two ends are replaced, too (OpenRLHF).
    kl, kl_estimator, kl_cap, kl_unbiased
        Weight and estimator of a term that keeps the policy near the model it started from. Above 0 it costs a second
        copy of the model and one more forward pass. What bounds an estimate, and whether it is multiplied by the ratio
        (TRL): see ``miles_core.formulas.terms.divergence``.
    entropy
        Weight of a bonus on the entropy of the policy's distributions.
    """

    variant: Variant = "grpo"
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"] = "grpo"
    std_eps: float | None = Field(None, gt=0)  # 1e-6 where the advantage divides by a standard deviation
    std: Literal["group", "batch"] = "group"
    alone: Literal["zero", "reward"] = "zero"
    loss: Literal["clip", "gspo", "gspo_token", "sequence", "cispo"] = "clip"
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    aggregate: Literal["token", "sequence", "constant"] = "sequence"
    dynamic_sampling: bool = False
    dynamic_sampling_reward: str | None = None
    dynamic_sampling_range: tuple[float, float] | None = None
    kl: float = Field(0.0, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_cap: float | None = Field(None, gt=0)
    kl_unbiased: bool = False
    entropy: float = Field(0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_variant(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given  # refused by pydantic in its own words
        variant = given.get("variant", "grpo")
        filled = (VARIANTS.get(variant, {}) if isinstance(variant, str) else {}) | given
        if filled.get("advantage", "grpo") in NEEDS_STD:
            filled.setdefault("std_eps", STD_EPS)
        return filled

    def contradictions(self) -> dict[str, str]:
        """Keys that were given but cannot have an effect beside the others, and what to do about each."""
        found = {}
        if self.std_eps is not None and self.advantage not in NEEDS_STD:
            found["std_eps"] = f'has no effect with advantage = "{self.advantage}", which divides by none; remove it'
        if self.dual_clip is not None and self.loss == "cispo":
            found["dual_clip"] = 'has no effect with loss = "cispo", whose weight clip_high bounds already; remove it'
        if self.std == "batch" and self.advantage != "grpo":
            found["std"] = f'has no effect with advantage = "{self.advantage}"; remove it'
        for key in ("dynamic_sampling_reward", "dynamic_sampling_range"):
            if getattr(self, key) is not None and not self.dynamic_sampling:
                found[key] = "has no effect without dynamic_sampling = true; add that or remove this"
        if self.dynamic_sampling_range is not None and self.dynamic_sampling_range[0] >= self.dynamic_sampling_range[1]:
            found["dynamic_sampling_range"] = "leaves nothing between its ends; say the lower one first"
        return found
