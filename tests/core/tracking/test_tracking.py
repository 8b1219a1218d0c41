"""The plugin, called as the driver calls it."""

import asyncio
import json
import os
import subprocess
import sys
import threading

import pytest
from miles_core.contract import check
from miles_core.edges import room
from miles_core.edges.tracking import Tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def go(tracker, run_dir, first, last, evaluation=None):
    """Steps ``first`` to ``last``, as a driver that was resumed before ``first`` would report them."""
    tracker.miles_run_start(run_dir=run_dir, step=first - 1)
    for step in range(first, last + 1):
        metrics = {
            "reward/mean": step / 10,
            "loss": 0.5,
            "tokens_per_s": 100.0,
            "time/step": 1.0,
            "time_s": float(step),
        }
        if evaluation and step % 2 == 0:
            metrics |= {"eval/accuracy": step / 10}
            tracker.miles_evaluated(step=step, groups=evaluation, metrics={"eval/accuracy": step / 10})
        tracker.miles_step_end(step=step, metrics=metrics)


def steps(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_its_hooks_are_those_of_the_specification():
    check("tracking", Tracking)


def test_a_whole_run(tracking, tmp_path, evaluation, capsys):
    tracker = tracking(tensorboard=True)
    tracker.miles_progress(text="starting 1 engine")
    go(tracker, tmp_path, 1, 4, evaluation([1.0, 0.0] * 10))
    tracker.miles_saved(step=4, folder=tmp_path)
    tracker.miles_run_end(error=None)
    out = capsys.readouterr().out
    assert out.startswith("starting 1 engine\n")
    assert "step 4/4  reward 0.400  accuracy 0.400  100 tokens/s" in out
    assert "reward     0.100 before, 0.400 after" in out
    assert f"report  {tmp_path / 'report.html'}\n" in out
    assert "finished" in (tmp_path / "report.html").read_text()
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_the_lines_up_to_a_checkpoint_are_on_the_disk_before_it_counts(tracking, tmp_path, monkeypatch):
    """A step that counts is never told of again, so its line must not be lost with the machine's power."""
    durable, fsync = [], os.fsync

    def synced(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("metrics.jsonl"):
            durable.append(steps(tmp_path))
        fsync(handle)

    tracker = tracking(steps=5, checkpoint={"every": 2})
    tracker.miles_run_start(run_dir=tmp_path, step=0)
    monkeypatch.setattr(os, "fsync", synced)
    for step in range(6):
        tracker.miles_step_end(step=step, metrics={"time_s": float(step)})
        saves = step in (2, 4, 5)  # from here on the checkpoint of this step may count at any moment
        assert (durable[-1:] == [list(range(step + 1))]) == (saves or step == 0)
    tracker.miles_run_end(error=None)


def test_a_terminal_is_left_as_it_was_found(tracking, tmp_path, pty, monkeypatch):
    monkeypatch.setattr("sys.stdout", pty.stream)
    before = threading.enumerate()
    with pty.stream:
        tracker = tracking("auto")
        go(tracker, tmp_path, 1, 2)
        tracker.miles_run_end(error=RuntimeError("boom"))
    seen = pty.drained()
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is shown again
    assert not [thread for thread in threading.enumerate() if thread not in before]


def test_a_resumed_run_has_every_step_once_everywhere(tracking, tmp_path, evaluation):
    first = tracking("off", tensorboard=True)
    go(first, tmp_path, 1, 3, evaluation([1.0], response="from the process before"))
    first.miles_failure(process="engine-0", error="died", action="restarted")
    state = json.loads(json.dumps(first.miles_state()))  # that process is gone; this is what its checkpoint held
    second = tracking("off", tensorboard=True)
    second.miles_restore(state=state)
    go(second, tmp_path, 2, 4)
    second.miles_run_end(error=None)
    assert steps(tmp_path) == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("reward/mean")] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    report = (tmp_path / "report.html").read_text()
    assert "from the process before" in report and "engine-0" in report


def test_evaluating_writes_the_report_while_the_run_goes_on(tracking, tmp_path, evaluation):
    go(tracking("off"), tmp_path, 1, 2, evaluation([1.0]))
    assert "still running after step 2" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError("bad <weights>"), "RuntimeError: bad &lt;weights&gt;"), (asyncio.CancelledError(), "interrupted")],
)
def test_a_run_that_fails_leaves_a_report(tracking, tmp_path, capsys, error, told):
    tracker = tracking()
    go(tracker, tmp_path, 1, 2)
    tracker.miles_run_end(error=error)
    assert told in (tmp_path / "report.html").read_text()
    assert "stopped after 2 of 4 steps" in capsys.readouterr().out


def test_a_failure_is_said_in_one_line(tracking, capsys):
    tracking().miles_failure(process="engine-0", error="signal 9\nTraceback ...", action="restarted with version 3")
    assert capsys.readouterr().out == "engine-0: signal 9; restarted with version 3\n"


def test_an_end_before_the_start_writes_nothing(tracking, tmp_path, capsys):
    tracker = tracking()
    tracker.miles_run_end(error=RuntimeError("no engine"))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_full_disk_is_waited_for_unless_the_run_failed(tracking, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room, "PAUSE", 0.01)
    tracker = tracking()
    go(tracker, tmp_path, 1, 2)
    full = tmp_path / "report.html.new"
    full.symlink_to("/dev/full")
    tracker.miles_run_end(error=None)  # the attempt that failed took the link away, and with it what was full
    assert "finished" in (tmp_path / "report.html").read_text()
    out = capsys.readouterr().out
    assert f"{tmp_path}/report.html: No space left on device; the run waits until there is room\n" in out
    assert "the run goes on\n" in out
    again = tracking()
    go(again, tmp_path / ".", 3, 3)
    full.symlink_to("/dev/full")
    again.miles_run_end(error=RuntimeError("the cause"))  # must not hide the cause, and nobody would wait for it
    out = capsys.readouterr().out
    assert "the report cannot be written: No space left on device; make room" in out and "waits" not in out


def test_a_missing_run_folder_is_an_error_that_names_it(tracking, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the metrics of the run cannot be written.*gone/metrics\.jsonl"):
        tracking().miles_run_start(run_dir=tmp_path / "gone", step=0)


def test_a_whole_run_imports_no_torch(tmp_path):
    code = f"""
import sys
import threading
from pathlib import Path
from miles_core.config import RunConfig
from miles_core.edges.tracking import Tracking
assert not {{"rich", "jinja2", "tensorboard"}} & sys.modules.keys()
run = RunConfig.model_validate({{"algorithm": "grpo", "steps": 1, "model": {{"path": "m"}}}})
tracker = Tracking(Tracking.Config(console="off"), run)
tracker.miles_run_start(run_dir=Path({str(tmp_path)!r}), step=0)
tracker.miles_step_end(step=1, metrics={{"reward/mean": 1.0}})
tracker.miles_run_end(error=None)
assert not {{"torch", "tensorflow", "ray", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "report.html").exists()
