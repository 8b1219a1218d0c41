"""The attempts of a group: made from its prompt, checked when they are back, and asked for their weights."""

from __future__ import annotations

import hashlib
import math
from statistics import fmean

from ..types import Group, Refused, Sample


def check_rollout(sample: Sample) -> None:
    """Raises Refused where a rollout did not fill a sample in."""
    size = len(sample.tokens)
    for what in ("mask", "logprobs", "versions"):
        if (have := len(getattr(sample, what))) != size:
            raise Refused(f"sample {sample.id}: the rollout gave {size} tokens but {have} {what}")
    if size and sample.mask[0]:
        raise Refused(f"sample {sample.id}: its first token cannot be trained on, nothing comes before it")
    if not all(map(math.isfinite, sample.logprobs)):
        raise Refused(f"sample {sample.id}: the engine gave a log-probability that is not finite")


def check_reward(name: str, values: list[float], group: Group) -> None:
    """Raises Refused unless there is a finite number for every sample."""
    if len(values) != len(group.samples):
        raise Refused(f"reward {name}, group {group.id}: {len(values)} values for {len(group.samples)} samples")
    for value, sample in zip(values, group.samples, strict=True):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Refused(f"reward {name}, sample {sample.id}: {value!r} is not a finite number")


def credit(groups: list[Group], scores: list[list[float | None]], plugin: str) -> None:
    """Give every sample the score that ``plugin`` found for it. Raises Refused where one is missing or no number."""
    if len(scores) != len(groups):
        raise Refused(
            f"plugin {plugin}: miles_score answered {len(scores)} lists for {len(groups)} groups; one for each"
        )
    for group, given in zip(groups, scores, strict=True):
        if len(given) != len(group.samples):
            message = f"miles_score gave {len(given)} scores to the {len(group.samples)} samples of group {group.id}"
            raise Refused(f"plugin {plugin}: {message}; a number for each, or None to keep one out of the batch")
        for sample, score in zip(group.samples, given, strict=True):
            if score is not None and (not isinstance(score, int | float) or not math.isfinite(score)):
                raise Refused(
                    f"plugin {plugin}: miles_score gave sample {sample.id} {score!r}; a finite number, or None"
                )
            sample.score = score


def numbered(group: Group, attempts: int, seed: int) -> Group:
    """``attempts`` copies of the group's prompt, each with its id and its own seed, the same wherever resumed."""
    [prompt] = group.samples

    def attempt(i: int) -> Sample:
        drawn = int.from_bytes(hashlib.blake2b(f"{seed}/{group.id}/{i}".encode(), digest_size=7).digest())
        return Sample(prompt.prompt, dict(prompt.info), f"{group.id}/{i}", drawn, list(prompt.tokens))

    return Group(group.id, [attempt(i) for i in range(attempts)])


def versions(group: Group, otherwise: int) -> set[int]:
    """Of the weights that wrote it, or ``otherwise`` where its responses were given."""
    return {version for sample in group.samples for version in sample.versions} - {-1} or {otherwise}


def staleness(groups: list[Group], step: int) -> dict[str, float]:
    """How many versions each sample's oldest token is behind the weights that ``step`` starts from."""
    behind = [step - 1 - min(set(s.versions) - {-1}, default=step - 1) for group in groups for s in group.samples]
    return {"staleness/max": float(max(behind)), "staleness/mean": fmean(behind)}


def newest(group: Group) -> int:
    """The latest of them; 0 where its responses were given."""
    return max(versions(group, 0))
