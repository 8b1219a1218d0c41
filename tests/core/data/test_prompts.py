"""Every prompt once an epoch, in an order that only the seed decides, from wherever a run stopped."""

import asyncio
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miles_core.edges.data.order import endless, permutation, split
from miles_core.edges.protocols import Completion
from miles_core.types import Group, Refused, Sample

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.integers(1, 200), st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_an_epoch_is_a_permutation(size, seed, epoch):
    rows = permutation(size)
    order = list(islice(endless(rows, seed, True, epoch * size), size))
    assert sorted(order) == list(range(size))


@given(st.integers(1, 50), st.integers(0, 99), st.booleans(), st.integers(0, 200))
def test_any_start_goes_on_as_if_nothing_had_happened(size, seed, shuffle, start):
    rows = permutation(size)
    whole = list(islice(endless(rows, seed, shuffle, 0), start + 60))
    assert list(islice(endless(rows, seed, shuffle, start), 60)) == whole[start:]


@given(st.integers(2, 200), st.one_of(st.floats(0, 0.9), st.integers(1, 100).map(float)), st.integers(0, 99))
def test_held_out_rows_are_never_trained_on(size, held_out, seed):
    train, rest = split(size, held_out, seed)
    assert not set(train) & set(rest)
    assert sorted([*train, *rest]) == list(range(size))


@quick
@given(st.integers(0, 30))
def test_files_of_both_kinds_give_the_same_prompts(data, start):
    rows = [{"prompt": f"{i}>", "answer": str(i)} for i in range(7)]
    streams = [
        [s.prompt for s in islice(data(rows, suffix).miles_prompts("train", start), 20)]
        for suffix in (".jsonl", ".parquet")
    ]
    assert streams[0] == streams[1]


def test_eval_is_finite_in_order_and_not_in_train(data):
    plugin = data([{"prompt": str(i)} for i in range(9)], held_out=3, seed=4)
    held = [s.prompt for s in plugin.miles_prompts("eval", 0)]
    assert len(held) == 3 and held == sorted(held)
    assert not set(held) & {s.prompt for s in islice(plugin.miles_prompts("train", 0), 50)}


def test_what_else_a_row_holds_goes_to_info(data):
    sample = next(data([{"prompt": "1", "answer": "2", "level": 3}]).miles_prompts("train", 0))
    assert sample.prompt == "1" and sample.info == {"answer": "2", "level": 3}


def test_chat(data):
    plugin = data([{"prompt": "1"}], chat_template=True, system="0")
    assert next(plugin.miles_prompts("train", 0)).prompt == [
        {"role": "system", "content": "0"},
        {"role": "user", "content": "1"},
    ]


def test_messages_keep_a_system_message_of_their_own(data):
    own = [{"role": "system", "content": "9"}, {"role": "user", "content": "1"}]
    plugin = data([{"prompt": own}, {"prompt": own[1:]}], system="0", chat_template=True, shuffle=False)
    first, second = islice(plugin.miles_prompts("train", 0), 2)
    assert first.prompt == own
    assert second.prompt == [{"role": "system", "content": "0"}, own[1]]


def test_another_seed_is_another_order_and_another_split(data):
    def order(seed):
        plugin = data([{"prompt": str(i)} for i in range(40)], held_out=0.25, seed=seed)
        return [s.prompt for s in islice(plugin.miles_prompts("train", 0), 30)], [
            s.prompt for s in plugin.miles_prompts("eval", 0)
        ]

    assert order(1) == order(1) and order(1)[0] != order(2)[0] and order(1)[1] != order(2)[1]


def test_a_file_that_changed_after_the_check_is_named(data, tmp_path):
    plugin = data([{"question": "1"}])
    with pytest.raises(Refused, match=r"train.jsonl:1: no column 'prompt'; the row has 'question'"):
        next(plugin.miles_prompts("train", 0))


class Engine:
    """Answers every request with the same tokens, and keeps the requests."""

    async def generate(self, requests):
        self.requests = requests
        return [Completion([3, 1], [-0.25, -0.5], [7, 8], "stop") for _ in requests]


def roll(plugin, group, evaluating=False):
    engine = Engine()
    plugin.miles_rollout_start()
    return asyncio.run(plugin.miles_rollout(group, engine, evaluating)), engine.requests


def test_a_rollout_keeps_what_was_sampled(data):
    plugin = data([{"prompt": "12"}], run={"rollout": {"max_tokens": 4, "temperature": 0.5, "top_k": 3}})
    group, requests = roll(plugin, Group(1, [Sample("12", id=f"1/{i}", seed=i) for i in range(2)]))
    for sample in group.samples:
        assert sample.tokens == [3, 4, 3, 1]
        assert sample.mask == [False, False, True, True]
        assert sample.logprobs == [0.0, 0.0, -0.25, -0.5]
        assert sample.versions == [-1, -1, 7, 8]
        assert (sample.response, sample.finish) == ("1", "stop")  # the stop token is trained on, but not said
    assert [(r.id, r.seed, r.tokens) for r in requests] == [("1/0", 0, [3, 4]), ("1/1", 1, [3, 4])]
    drawn = requests[0].sampling
    assert (drawn.max_tokens, drawn.temperature, drawn.top_k, drawn.stop_tokens) == (4, 0.5, 3, (1, 5))


def test_evaluation_is_drawn_at_its_own_temperature(data):
    _, requests = roll(data([{"prompt": "1"}]), Group(1, [Sample("1")]), evaluating=True)
    assert requests[0].sampling.temperature == 0


def test_a_prompt_that_leaves_no_room_is_named(data):
    with pytest.raises(Refused, match="sample 4/1: its prompt has 9 tokens; with rollout.max_tokens = 4 that exceeds"):
        roll(data([{"prompt": "1"}]), Group(4, [Sample("123456789", id="4/1")]))
