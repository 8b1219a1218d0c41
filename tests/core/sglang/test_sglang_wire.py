"""The bodies that go to a server, word by word: what it does not understand it ignores without a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from miles_core.edges.protocols import Request, Sampling
from miles_core.edges.sglang import wire


def test_a_bucket_flushes_the_cache_only_when_told() -> None:
    """It does by default, for every bucket."""
    path, body = wire.update(wire.Tensors(("AAAA", "BBBB"), "flattened_bucket"), "3@m")
    assert path == "/update_weights_from_tensor"
    assert body == {
        "serialized_named_tensors": ["AAAA", "BBBB"],
        "load_format": "flattened_bucket",
        "flush_cache": False,
        "weight_version": "3@m",
    }
    _, told = wire.update(wire.Tensors(("AAAA",), "flattened_bucket"), "3@m", flush=True)
    assert told["flush_cache"] is True


def test_what_is_broadcast_is_received_once_and_not_again_for_a_draft_model() -> None:
    path, body = wire.update(wire.Tensors(("AAAA",), wire.RECEIVE), "3@m")
    assert path == "/update_weights_from_tensor"
    assert body == {
        "serialized_named_tensors": ["AAAA"],
        "load_format": "miles_core.edges.sglang.receive.receive",
        "selector": "target",
        "disable_draft_model": True,
        "flush_cache": False,
        "weight_version": "3@m",
    }


def test_a_request_says_all_that_has_a_default() -> None:
    plain = Request("1/0", [5, 6], Sampling(7, stop_tokens=(2, 3)), seed=2**63 + 9)
    cut = Request("1/1", [5, 6], Sampling(7, 0.6, 0.9, 40), seed=10)
    assert wire.generate([plain, cut], ["1/0.0", "1/1.2"]) == {
        "rid": ["1/0.0", "1/1.2"],
        "input_ids": [[5, 6], [5, 6]],
        "sampling_params": [
            {
                "max_new_tokens": 7,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "sampling_seed": 9,
                "stop_token_ids": [2, 3],
            },
            {
                "max_new_tokens": 7,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 40,
                "sampling_seed": 10,
                "ignore_eos": True,
            },
        ],
        "return_logprob": True,
        "return_sampling_mask": [False, True],
    }
    named = wire.generate([plain, cut], ["x", "y"], ["a", "b"])
    assert named.pop("extra_key") == ["a", "b"] and named == wire.generate([plain, cut], ["x", "y"])
    greedy = Request("1/2", [5], Sampling(7, temperature=0.0, top_p=0.9, top_k=40), seed=0)
    assert wire.generate([greedy], ["x"])["return_sampling_mask"] == [False]


ids = st.text("019/.", min_size=1, max_size=6)


@given(ids, ids, st.integers(0, wire.MOST_TRIES - 1), st.integers(0, wire.MOST_TRIES - 1))
def test_no_name_of_one_request_begins_that_of_a_sample_next_to_it(one: str, other: str, i: int, j: int) -> None:
    """The server aborts whatever begins with the name it is given."""
    plain = one.replace(".", "") or "0"
    if plain != (next_to := other.replace(".", "") or "0"):
        assert not wire.rid(plain, i).startswith(wire.rid(next_to, j))


@given(st.integers(0, 2**31), st.text("0123456789abcdef", min_size=8, max_size=8))
def test_a_version_comes_back_from_the_server_it_was_given_to(version: int, mark: str) -> None:
    assert wire.version_of(wire.stamp(version, mark), mark) == version
    for foreign in (None, "default", str(version), wire.stamp(version, "other"), f"@{mark}", f"-1@{mark}"):
        with pytest.raises(wire.Stranger):
            wire.version_of(foreign, mark)


def test_an_address_is_a_url_and_a_mark() -> None:
    assert wire.parts_of(wire.address("http://10.0.0.1:3000", "abcd")) == ("http://10.0.0.1:3000", "abcd")


REQUEST = Request("1/0", [5], Sampling(3), 0)


def reply(finish: str, tokens: list[int], logprobs: list[float], **meta: object) -> dict[str, object]:
    entries = [[value, token, None] for value, token in zip(logprobs, tokens, strict=False)]
    told = {"finish_reason": {"type": finish}, "weight_version": "2@m", "output_token_logprobs": entries, **meta}
    return {"output_ids": tokens, "meta_info": told}


def test_versions_by_token_where_the_server_tells_them() -> None:
    spans = [{"version": "1@m", "start": 0, "end": 2}, {"version": "2@m", "start": 2, "end": 3}]
    told = wire.completion(REQUEST, reply("length", [7, 8, 9], [-1, -2, -3], weight_versions=spans), "m")
    assert (told.tokens, told.logprobs, told.versions, told.finish) == ([7, 8, 9], [-1, -2, -3], [1, 1, 2], "length")


def test_tokens_of_an_aborted_request_that_lack_something_are_left_out() -> None:
    """As of one that is aborted while it waits behind a pause."""
    told = wire.completion(REQUEST, reply("abort", [7, 8, 9], [-1, -2]), "m")
    assert (told.tokens, told.logprobs, told.versions, told.finish) == ([7, 8], [-1, -2], [2, 2], "abort")
    bare = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "weight_version": "2@m"}}
    assert wire.completion(REQUEST, bare, "m").tokens == []


@pytest.mark.parametrize(
    ("told", "what"),
    [
        (reply("length", [7, 8], [-1]), "2 tokens but 1 log-prob"),
        (reply("odd", [7], [-1]), "finished with 'odd'"),
        (reply("stop", [7], [-1], weight_versions=[{"version": "2@m", "start": 0, "end": 0}]), "versions of 0 tokens"),
    ],
)
def test_a_reply_that_lacks_something_is_an_error(told: dict[str, object], what: str) -> None:
    with pytest.raises(wire.EngineError, match=what):
        wire.completion(REQUEST, told, "m")
