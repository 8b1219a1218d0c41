"""Responses that the data holds: what is wrong with them is found before anything starts, and what the policy would
have had to write is what it learns from."""

import asyncio
import shutil

import pytest
from miles_core.edges.protocols import NoEngine
from miles_core.types import Group, Refused, Sample

PAIR = ["chosen", "rejected"]
# The end of sequence after each message, then what nobody samples; <eos> is 1, digit d is d + 2, then > : a u.
TEMPLATE = (
    "{% for m in messages %}{{ 'a' if m.role == 'assistant' else 'u' }}{{ m.content }}<eos>>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
EOS, A, U, ENDED = 1, 14, 15, 12


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def nothing_sampled(size=2, **tables):
    return {"placement": {"engines": 0}, "batch": {"group_size": size}} | tables


@pytest.fixture
def chatty(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return {"path": str(folder)}


@pytest.fixture
def faults(complaints):
    """What is said of rows whose responses stand in PAIR."""

    def faults(*rows, responses=PAIR, **keys):
        run = nothing_sampled(len(responses)) | keys.pop("run", {})
        return complaints(list(rows), responses=responses, run=run, **keys)

    return faults


GOOD = {"prompt": "12>", "chosen": "3", "rejected": "4"}
CHAT = {"prompt": [user("1")], "chosen": [user("1"), assistant("2")], "rejected": [assistant("3")]}


def test_good_rows_are_passed(faults, chatty):
    assert faults(GOOD) == faults(GOOD, suffix=".parquet") == []
    assert faults(CHAT, run={"model": chatty}) == []
    assert faults(GOOD | {"chosen": [user("12>"), assistant("3")]}, run={"model": chatty}, chat_template=True) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": ""}, "chosen is empty"),
        ({"rejected": ""}, "rejected is empty"),
        ({"rejected": "3"}, "chosen and rejected are the same text, which says nothing about either"),
        ({"rejected": 4}, "rejected must be text or a list of messages, this is int"),
        ({"chosen": None}, "chosen must be text or a list of messages, this is NoneType"),
        ({"chosen": [assistant("3")]}, "chosen is a list of messages, but the prompt is text; set data.chat_template"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(faults, row, said):
    ((key, message),) = faults(GOOD, GOOD | row)
    assert key == "data.train" and message.startswith(f"train.jsonl:2: {said}")


@pytest.mark.parametrize(
    "chosen",
    [
        [user("9"), assistant("2")],  # another prompt
        [user("1"), assistant("2"), user("3")],  # the user has the last word
        [user("1"), assistant("2"), user("3"), assistant("4")],  # more than one message
        [user("1")],
        [],
        ["2"],
    ],
)
def test_a_conversation_goes_on_from_the_prompt_by_one_message(faults, chatty, chosen):
    ((key, message),) = faults(CHAT | {"chosen": chosen}, run={"model": chatty})
    said = "train.jsonl:1: chosen does not begin with the prompt and end with one message of the assistant"
    assert (key, message) == ("data.train", said)


@pytest.mark.parametrize("content, said", [("", "chosen is empty"), (None, "chosen must be text"), ("3", "the same")])
def test_what_a_conversation_ends_with_is_judged_like_text(faults, chatty, content, said):
    row = CHAT | {"chosen": [user("1"), assistant(content)]}
    ((_, message),) = faults(row, run={"model": chatty})
    assert message.startswith("train.jsonl:1: ") and said in message


def test_a_conversation_need_not_repeat_the_run_s_system_message(faults, data, chatty):
    assert faults(CHAT, run={"model": chatty}, system="7", chat_template=True) == []
    plugin = data([CHAT], responses=PAIR, system="7", chat_template=True, run=nothing_sampled(model=chatty))
    (sample, other) = fill(plugin).samples
    assert sample.tokens == [U, 9, EOS, ENDED, U, 3, EOS, ENDED, A, 4, EOS]
    assert other.tokens == [U, 9, EOS, ENDED, U, 3, EOS, ENDED, A, 5, EOS]


def test_a_missing_column_names_those_there_are(faults):
    found = faults(GOOD, {"prompt": "1", "chosen": "2"})
    said = "no column 'rejected', which data.responses names; the row has 'prompt', 'chosen'"
    assert found == [("data.train", f"train.jsonl:2: {said}")]
    ((_, message),) = faults({"prompt": "1", "chosen": "2"}, suffix=".parquet")
    assert message == f"train.parquet: row 1: {said}"


@pytest.mark.parametrize("length, fits", [(8, True), (9, False)])
@pytest.mark.parametrize("side", PAIR)
def test_prompt_response_and_the_stop_fit_the_context(faults, data, side, length, fits):
    """Three tokens of a prompt, so many of a response, one stop; the context is 12."""
    row = GOOD | {side: "9" * length}
    found = faults(GOOD, row)
    said = "train.jsonl:2: prompt, response and stop of 13 tokens exceed the model's context of 12"
    assert found == ([] if fits else [("data.train", said)])
    plugin = data([row], responses=PAIR, run=nothing_sampled())  # and the rollout agrees
    if fits:
        fill(plugin)
    else:
        with pytest.raises(Refused, match="sample 1/.: prompt and response have 13 tokens, more than the context"):
            fill(plugin)


def test_the_held_out_split_is_judged_alike_where_nothing_is_sampled(faults, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"prompt": "1"}\n')
    ((key, said),) = faults(GOOD, eval=tmp_path / "eval.jsonl")
    assert key == "data.eval" and said.startswith("eval.jsonl:1: no column 'chosen'")
    run = {"placement": {"engines": 1}}  # an engine answers held-out prompts
    assert faults(GOOD, eval=tmp_path / "eval.jsonl", run=run) == []


@pytest.mark.parametrize(
    ("run", "responses", "key", "said"),
    [
        ({"batch": {"group_size": 8}}, PAIR, "batch.group_size", "is 8, data.responses gives 2 a prompt; say 2"),
        ({"placement": {"engines": 0}}, [], "placement.engines", "is 0, so nothing can be sampled; say 1 or more"),
        ({"batch": {"group_size": 2, "old_logprobs": "engine"}}, PAIR, "batch.old_logprobs", "not 'engine'"),
        ({"batch": {"group_size": 2, "old_logprobs": "both"}}, PAIR, "batch.old_logprobs", "not 'both'"),
    ],
)
def test_what_cannot_go_with_given_responses_is_said_with_its_key(complaints, run, responses, key, said):
    ((found, message),) = complaints([GOOD], responses=responses, run=run)
    assert found == key and said in message


def fill(plugin):
    """The first group of a run, as the loop numbers it and the rollout fills it."""
    prompt = next(plugin.miles_prompts("train", 0))
    samples = [Sample(prompt.prompt, dict(prompt.info), f"1/{i}") for i in range(plugin.run.batch.group_size)]
    plugin.miles_rollout_start()
    return asyncio.run(plugin.miles_rollout(Group(1, samples), NoEngine([], 1.0), False))


def test_text_is_written_as_it_stands_and_ended(data):
    group = fill(data([GOOD], responses=PAIR, run=nothing_sampled()))
    chosen, rejected = group.samples
    assert (chosen.tokens, rejected.tokens) == ([3, 4, ENDED, 5, EOS], [3, 4, ENDED, 6, EOS])
    for sample, text in ((chosen, "3"), (rejected, "4")):
        assert sample.mask == [False, False, False, True, True]  # the stop is learned too
        assert sample.logprobs == [0.0] * 5 and sample.versions == [-1] * 5  # no weights of the run wrote it
        assert (sample.response, sample.finish) == (text, "stop")


def test_chat_is_written_by_the_template_up_to_the_stop(data, chatty):
    group = fill(data([CHAT], responses=PAIR, run=nothing_sampled(model=chatty)))
    for sample, digit in zip(group.samples, (4, 5), strict=True):
        assert sample.tokens == [U, 3, EOS, ENDED, A, digit, EOS]  # the ">" that follows is nobody's to write
        assert sample.mask == [False] * 5 + [True] * 2


def test_a_template_that_ends_nothing_gets_the_stop(data, chatty):
    (chat,) = {chatty["path"]}
    with open(f"{chat}/chat_template.jinja", "w") as file:
        file.write(TEMPLATE.replace("<eos>>", ""))
    sample = fill(data([CHAT], responses=PAIR, run=nothing_sampled(model=chatty))).samples[0]
    assert sample.tokens == [U, 3, A, 4, EOS] and sample.mask == [False] * 3 + [True] * 2


def test_a_template_that_writes_the_prompt_another_way_is_refused(data):
    """The tests' own template: the generation prompt is no part of what precedes an answer."""
    with pytest.raises(Refused, match="sample 1/0: the chat template writes the prompt another way before a response"):
        fill(data([CHAT], responses=PAIR, run=nothing_sampled()))


def test_a_row_that_changed_after_the_check_names_the_sample(data):
    with pytest.raises(Refused, match="sample 1/0: chosen and rejected are the same text"):
        fill(data([GOOD | {"rejected": "3"}], responses=PAIR, run=nothing_sampled()))


def test_without_an_engine_nothing_is_sampled():
    with pytest.raises(Refused, match=r"nothing can be sampled: placement.engines = 0"):
        asyncio.run(NoEngine([], 1.0).generate([]))
