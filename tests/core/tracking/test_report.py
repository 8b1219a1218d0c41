"""report.html stands alone, parses, escapes what it shows, and is there when a run went wrong."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from miles_core.edges.room import Room
from miles_core.edges.tracking.metrics import History
from miles_core.edges.tracking.record import Answer, Failure, Record
from miles_core.edges.tracking.report import render, write

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Every element must be closed in order; collects text by tag, and every attribute."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


@pytest.fixture
def record(make_run, tmp_path):
    record = Record(make_run(), tmp_path, History())
    record.history.add(0, {"eval/accuracy": 0.0, "time_s": 0.0})
    for step in range(1, 5):
        values = {"reward/mean": step / 5, "loss": 0.1, "kl/train_rollout": 1e-6, "kl": 0.1, "entropy": 1.0 / step}
        record.history.add(step, values | {"tokens_per_s": 1e4, "staleness/max": 1.0, "time/step": 1.0, "time_s": 2.0})
    return record


def test_it_parses_and_needs_nothing_from_outside(record):
    text = render(record)
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert not [value for name, value in page.attributes if name in ("src", "href") or "url(" in (value or "")]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "prefers-color-scheme:dark" in text


def test_every_curve_has_its_panel(record):
    page = Page(render(record))
    expected = ["Reward", "Held-out accuracy", "Loss", "KL", "KL: kl/train_rollout", "Entropy", "Tokens per second"]
    assert [title for title in page.texts["h3"] if not title.startswith("Staleness")] == expected
    assert sum(value == "curve" for name, value in page.attributes if name == "class") == len(expected) + 1


def test_values_are_escaped(record):
    evil = "<script>alert(1)</script>&\x1b[31m"
    record.answers = [Answer("0/0", evil, f'"{evil}', 1.0, 1.0)]
    record.failures = [Failure(2, evil, evil, "restarted")]
    record.history.add(5, {evil: 1.0, f"kl/{evil}": 1.0})
    record.error, record.ended = evil, True
    (record.run_dir / "config.json").write_text(json.dumps({"model": {evil: evil}}))
    (record.run_dir / "manifest.json").write_text(json.dumps({evil: evil}))
    text = render(record)
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text and "\x1b" not in text
    assert any("<script>alert(1)</script>&\\x1b[31m" in told for told in page.texts["td"])


def test_a_run_that_failed_has_a_report_that_says_why(record):
    record.error, record.ended, record.checkpoint = "RuntimeError: out of memory", True, 3
    record.failures = [Failure(2, "engine-0", "killed by signal 9", "restarted with version 2")]
    page = Page(render(record))
    assert "RuntimeError: out of memory" in page.texts["pre"]
    assert "killed by signal 9" in page.texts["pre"]
    assert "stopped after step 4" in page.texts["strong"]


def test_before_the_first_step_there_is_a_report_too(make_run, tmp_path):
    page = Page(render(Record(make_run(), tmp_path, History())))
    assert "still running after step 0" in page.texts["strong"]
    assert "svg" not in page.tags


def test_what_cannot_be_drawn_is_said(record):
    record.history.add(5, {"loss": math.nan, "grad_norm": math.nan})
    page = Page(render(record))
    assert page.texts["figcaption"] == ["Not finite, so not drawn: 1 values."] * 2
    assert "Gradient norm" in page.texts["h3"]


def test_configuration_and_versions_are_shown(record):
    (record.run_dir / "config.json").write_text(json.dumps({"optim": {"lr": 0.001}, "plugins": ["./r.py"]}))
    (record.run_dir / "manifest.json").write_text(json.dumps({"grpo": "miles-plugin-grpo 0.1.0"}))
    page = Page(render(record))
    assert {"optim.lr", "plugins"} <= set(page.texts["code"])
    assert {"0.001", '["./r.py"]', "miles-plugin-grpo 0.1.0"} <= set(page.texts["td"])
    assert {"grpo", "Python", "torch"} <= set(page.texts["th"])


def test_without_those_files_the_run_itself_is_shown(record):
    assert "batch.group_size" in Page(render(record)).texts["code"]


def test_that_engines_had_work_is_told_by_the_steps_lengths(record):
    assert "have requests running" not in render(record)
    record.usage.add("engine-0", "serve", 0.0, 4.0)
    for step, share, seconds in ((101, 1.0, 1.0), (102, 0.2, 3.0)):
        record.history.add(step, {"utilization/engines": share, "time/step": seconds})
    page = Page(render(record))
    assert {"have requests running", "40.0%"} <= set(page.texts["td"])


def test_overlap_is_explained(make_run, record):
    record.run = make_run(mode="overlap")
    assert "Sampling ran beside training" in render(record)


def test_a_report_that_cannot_be_written_leaves_the_old_one(record):
    path = write(record, room := Room(print))
    before, room.patient = path.read_bytes(), False
    (record.run_dir / "report.html.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the report cannot be written: No space left on device.*report.html"):
        write(record, room)
    assert path.read_bytes() == before
