"""Which tokens of a micro-batch the model computes: those that a trained token is drawn from, each prompt once.

Attempts at one prompt stand in the same micro-batch, and under a causal mask a prompt's tokens know nothing of what
follows: their hidden states are the same in every attempt. The last token of a sequence is left out, because nothing
is drawn from it. Gradients are those of the whole micro-batch: a shared token's add up over the sequences that see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class Compact:
    """U computed tokens for the T tokens of a micro-batch; attention sees E of them, shared ones in each sequence."""

    tokens: Array  # [U] int64: of the micro-batch, the token that is computed
    place: Array  # [T] int64: which computed token stands for each token; 0 where none does
    starts: list[int]  # [S + 1]: where each sequence begins that attention sees, then E
    seen: Array  # [E] int64: the computed tokens of these sequences


def compact(starts: Sequence[int], tokens: Array, mask: Array) -> Compact:
    """The sequences of ``tokens`` [T] that begin at ``starts`` [S + 1], trained where ``mask`` [T] says so.

    A prompt is what stands before the first trained token; sequences share one when all of it is equal.
    """
    computed, seen, ends, place = [], [], [0], np.zeros(len(tokens), dtype=np.int64)
    prompts: dict[bytes, int] = {}  # where each one was computed
    total = 0
    for begin, end in pairwise(starts):
        last = max(end - 1, begin)
        trained = mask[begin:end].argmax() if end > begin else 0
        first = begin + int(trained) if end > begin and mask[begin + trained] else last
        there = prompts.setdefault(tokens[begin:first].tobytes(), total)
        fresh = begin if there == total else first
        places = np.arange(total - (fresh - begin), total + last - fresh)
        places[: fresh - begin] = np.arange(there, there + fresh - begin)
        computed.append(np.arange(fresh, last))
        seen.append(places)
        place[begin:last] = places
        ends.append(ends[-1] + last - begin)
        total += last - fresh
    nothing = np.zeros(0, dtype=np.int64)
    return Compact(np.concatenate([nothing, *computed]), place, ends, np.concatenate([nothing, *seen]))
