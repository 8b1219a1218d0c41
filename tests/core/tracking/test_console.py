"""A person sees where the run stands; a pipe gets plain lines; nobody there stops nothing."""

import io
import os
import re

import pytest
from miles_core.edges.tracking.console import Plain, Screen, Status, Terminal, _bar, screen, summarize
from miles_core.edges.tracking.metrics import History
from miles_core.edges.tracking.record import Answer, Record, duration, number, sampled, timing
from rich.console import Console

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture
def record(make_run, tmp_path):
    def make(**keys):
        record = Record(make_run(**keys), tmp_path, History())
        record.history.add(0, {"eval/accuracy": 0.0, "time/eval": 5.0, "time_s": 0.0})
        for step in range(1, 5):
            times = {"sample": 2.0, "reward": 0.5, "train": 1.0, "sync": 0.25, "wait": 2.5, "other": 0.25, "step": 4.0}
            metrics = {"reward/mean": step / 5, "tokens_per_s": 12345.6, "time_s": 6.0 + 4 * step}
            record.history.add(step, metrics | {f"time/{name}": s for name, s in times.items()})
        record.history.add(4, {"eval/accuracy": 0.75})
        return record

    return make


def told(record):
    stream = io.StringIO()
    summarize(record, Plain(stream))
    return stream.getvalue()


def test_the_progress_line_tells_the_step_the_numbers_and_the_time_left(record, monkeypatch):
    clock = iter([100.0, 102.0, 102.5, 103.0])
    monkeypatch.setattr("miles_core.edges.tracking.console.time.monotonic", lambda: next(clock))
    status = Status(2, 10)
    record = record()
    status.update(record)
    assert status.words == ["step  4/10", "reward 0.800", "accuracy 0.750", "12,346 tokens/s", "12 s left"]


def test_numbers_not_known_yet_are_left_out():
    words = Status(0, 10).words
    assert words[0] == "step  0/10"
    assert len(words) == 2 and words[1].startswith("on the first step")


def test_a_pipe_gets_a_plain_line_every_few_seconds_and_the_last_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("miles_core.edges.tracking.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    plain, status = Plain(stream, every=5.0), Status(0, 20)
    for step in range(1, 21):
        now[0] += 1.0
        status.step = step
        plain.progress(status)
    plain.close()
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps == [1, 6, 11, 16, 20]
    assert not CONTROL.search(stream.getvalue())


def test_a_file_is_no_terminal_and_off_says_nothing(tmp_path, capsys):
    with (tmp_path / "log").open("w") as stream:
        assert isinstance(screen("auto", stream), Plain)
        assert type(screen("off", stream)) is Screen
    screen("off").say("hello")
    assert capsys.readouterr().out == ""


def test_a_terminal_is_updated_in_place(record, pty):
    with pty.stream as stream:
        terminal = screen("auto", stream)
        assert isinstance(terminal, Terminal)
        status = Status(0, 4)
        terminal.progress(status)
        terminal.say("an engine was restarted")
        status.update(record())
        terminal.close()
    seen = pty.drained()
    assert "an engine was restarted" in seen
    assert "\x1b[2K" in seen and "reward 0.800" in seen


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_the_progress_line_is_one_line_that_keeps_the_step(record, width):
    status = Status(0, 4)
    status.update(record())
    console = Console(width=width, file=io.StringIO())
    console.print(_bar(status, width))
    text = console.file.getvalue()
    assert text.count("\n") == 1 and text.startswith("step 4/4")
    assert ("done in" in text) == (width > 60)


def test_a_closed_pipe_does_not_stop_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        plain = Plain(stream)
        plain.say("nobody")
        plain.say("listens")


def test_a_terminal_without_unicode_gets_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Plain(stream).say("é ok")
    assert raw.getvalue() == b"\\xe9 ok\n"


def test_the_end_tells_before_and_after_answers_and_times(record):
    record = record()
    record.answers = [Answer("0/0", "12=", "21", 1.0, 1.0), Answer("1/0", "3\x1b[31m=", "a\nb", 0.0, 0.0)]
    record.answered = 4
    text = told(record)
    assert "reward     0.200 before, 0.800 after" in text
    assert "accuracy   0.000 before, 0.750 after" in text
    assert re.search(r"right  12= +->  21", text)
    assert r"wrong  3\x1b[31m=  ->  a\nb" in text
    assert re.search(r"sampling +8\.00 s +50\.0%", text)
    assert re.search(r"all steps +16\.00 s +100\.0%", text)
    assert not CONTROL.search(text)


def test_an_early_end_tells_where_it_stopped(record):
    record = record(steps=9)
    record.error, record.checkpoint = "boom", 3
    text = told(record)
    assert "stopped after 4 of 9 steps in 22 s; newest checkpoint: step 3" in text


def test_shares_add_up_and_the_evaluation_before_the_steps_stands_apart(record):
    phases = {phase.name: phase for phase in timing(record())}
    whole = phases.pop("all steps")
    outside = phases.pop("before and between them")
    assert (outside.seconds, outside.share) == (6.0, None)
    assert whole.seconds == 16.0
    assert sum(phase.seconds for phase in phases.values()) == 16.0
    assert sum(phase.share for phase in phases.values()) == pytest.approx(1.0)
    assert "evaluation" not in phases


def test_overlapped_sampling_adds_up_to_nothing(record):
    phases = {phase.name: phase for phase in timing(record(mode="overlap"))}
    assert phases["waiting for samples"].seconds == 10.0
    assert phases["sampling, beside training"].seconds == 8.0
    assert phases["sampling, beside training"].share is None
    assert sum(phase.share or 0.0 for phase in phases.values()) == pytest.approx(2.0)  # the parts, and the whole


def test_training_that_began_before_the_step_did_is_told_apart(record):
    made = record(mode="overlap")
    for step in range(1, 5):
        made.history.add(step, {"time/train": 0.75, "time/ahead": 0.75})  # of 1.75 in all
    phases = {phase.name: phase for phase in timing(made)}
    assert phases["training"].seconds == 4.0
    assert phases["training, beside the end of the step before"].seconds == 3.0
    assert sum(phase.share or 0.0 for phase in phases.values()) == pytest.approx(2.0)  # the parts, and the whole


def test_a_run_without_times_has_no_table(make_run, tmp_path):
    assert timing(Record(make_run(), tmp_path, History())) == []


def test_answers_are_spread_over_the_split_and_judged_by_the_named_reward(evaluation):
    groups = evaluation([float(i % 2) for i in range(25)])
    groups[5].samples[0].info["raw_rewards"] = {"exact": 0.0, "positions": 0.4}
    answers = sampled(groups, None)
    assert [answer.id for answer in answers] == [f"{i * 25 // 10}/0" for i in range(10)]
    assert [answer.mark for answer in answers[:2]] == ["wrong", "wrong"]
    assert answers[3].mark == "right"
    assert sampled(groups, "positions")[2].mark == "0.40"
    assert len(sampled(groups[:3], None)) == 3


def test_chat_prompts_show_their_last_message(evaluation):
    groups = evaluation([1.0], prompt=[{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}])
    assert sampled(groups, "exact")[0].prompt == "1+1"


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0 s"), (42.4, "42 s"), (185, "3:05"), (7385, "2:03:05")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (12.0, "12"), (0.12345, "0.123"), (1.5e-7, "1.50e-07"), (123456.7, "123,457")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text
