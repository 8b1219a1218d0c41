"""What the model computes of a micro-batch: every trained token is drawn from its own past, and nothing twice."""

from itertools import accumulate, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from miles_core.edges.megatron.compact import compact

# A sequence is a prompt, one of few, and an answer of few different tokens; which of them are trained is drawn too.
sequence = st.tuples(
    st.sampled_from([(), (1,), (1, 2), (1, 2, 3), (4, 4, 4, 4)]),
    st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=6),
)


@given(st.lists(sequence, max_size=10))
def test_every_trained_token_is_drawn_from_its_own_past(drawn) -> None:
    sequences = [[*prompt, *(token for token, _ in answer)] for prompt, answer in drawn]
    masks = [[*(False for _ in prompt), *(trained for _, trained in answer)] for prompt, answer in drawn]
    for mask in masks:
        mask[:1] = [False for _ in mask[:1]]  # nothing stands before the first token
    starts = [0, *accumulate(map(len, sequences))]
    tokens = np.array([t for s in sequences for t in s], dtype=np.int64)
    mask = np.array([m for ms in masks for m in ms], dtype=np.bool_)
    made = compact(starts, tokens, mask)

    assert [b - a for a, b in pairwise(made.starts)] == [max(len(s) - 1, 0) for s in sequences]
    assert set(made.seen.tolist()) == set(range(len(made.tokens)))  # all that is computed is used
    for i, (begin, end) in enumerate(pairwise(made.starts)):
        past = made.seen[begin:end]  # what attention sees of sequence i, in order
        assert tokens[made.tokens[past]].tolist() == sequences[i][:-1]
        assert made.place[starts[i] : starts[i] + end - begin].tolist() == past.tolist()
    firsts = [mask.index(True) if any(mask) else max(len(mask) - 1, 0) for mask in masks]
    shared = {tuple(s[:first]) for s, first in zip(sequences, firsts, strict=True)}
    alone = sum(max(len(s) - 1 - first, 0) for s, first in zip(sequences, firsts, strict=True))
    assert len(made.tokens) == alone + sum(map(len, shared))


def test_eight_attempts_at_one_prompt() -> None:
    """36 tokens each, 4 of them the prompt: 4 + 8 x 31 are computed, not 8 x 36."""
    tokens = np.array([[9, 9, 9, 9, *range(i, i + 32)] for i in range(8)]).ravel()
    mask = np.tile(np.arange(36) >= 4, 8)
    assert len(compact(range(0, 289, 36), tokens, mask).tokens) == 4 + 8 * 31
