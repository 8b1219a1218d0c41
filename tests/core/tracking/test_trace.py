"""trace.json, what processes did, and which side is the slower one."""

import json
import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.room import Room
from miles_core.edges.tracking.metrics import History
from miles_core.edges.tracking.trace import Trace
from miles_core.edges.tracking.usage import RECENT, Usage, advice


def events(path):
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a-0", "b"]), st.integers(0, 50), st.integers(0, 9)), max_size=30), st.data()
)
def test_nothing_overlaps_on_a_track_and_nothing_is_left_out(tmp_path_factory, spans, data):
    folder = tmp_path_factory.mktemp("trace")
    trace = Trace(folder, resumed=False, room=Room(print))
    spans = [(name, began, began + length) for name, began, length in spans]
    for name, began, ended in sorted(spans, key=lambda span: span[2]):  # told of when it ended
        trace.add(name, "train", began, ended)
        if data.draw(st.booleans()):
            trace.flush()
    trace.flush()
    whole = json.loads((folder / "trace.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in whole if event["ph"] == "M"}
    shown = [event for event in whole if event["ph"] == "X"]
    assert sorted((names[e["pid"]], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in shown) == sorted(spans)
    tracks = {}
    for event in shown:
        tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for found in tracks.values():
        assert all(ended <= began for (_, ended), (began, _) in zip(sorted(found), sorted(found)[1:], strict=False))


def test_a_resumed_run_goes_on_with_its_trace_wherever_a_crash_cut_it(tmp_path):
    trace = Trace(tmp_path, resumed=False, room=Room(print))
    for at in range(3):
        trace.add("trainer-0", "train", at, at + 0.5)
        trace.flush()
    whole = (tmp_path / "trace.json").read_bytes()
    kept = set()
    for cut in range(len(whole) + 1):
        (tmp_path / "trace.json").write_bytes(whole[:cut])
        trace = Trace(tmp_path, resumed=True, room=Room(print))
        trace.add("trainer-0", "save", 9, 10)
        trace.flush()
        found = events(tmp_path / "trace.json")
        assert found[-1]["name"] == "save" and [e["ts"] for e in found[:-1]] == [
            i * 10**6 for i in range(len(found) - 1)
        ]
        kept.add(len(found) - 1)
    assert kept == {0, 1, 2, 3}


def test_a_trace_that_grows_too_large_begins_anew_and_keeps_the_one_before(tmp_path):
    trace = Trace(tmp_path, resumed=False, room=Room(print), most=2000)
    for at in range(60):
        trace.add("trainer-0", "train", at, at + 0.5)
        trace.flush()
    older, newer = events(tmp_path / "trace-older.json"), events(tmp_path / "trace.json")
    assert [e["ts"] // 10**6 for e in older + newer] == list(range(60 - len(older + newer), 60))
    assert json.loads((tmp_path / "trace.json").read_text())[0]["args"] == {"name": "trainer-0"}
    assert os.path.getsize(tmp_path / "trace.json") < 2200


FULL = """
import sys, signal, resource
from pathlib import Path
from miles_core.edges.room import Room
from miles_core.edges.tracking.trace import Trace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trace = Trace(Path(sys.argv[1]), resumed=False, room=Room(print))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for at in range(100):
    trace.add("trainer-0", "train", at, at + 0.5)
    try:
        trace.flush()
    except OSError as error:
        sys.exit(str(error))
"""


def test_on_a_full_disk_what_was_written_stays_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert "the trace of the run cannot be written" in done.stderr and str(tmp_path / "trace.json") in done.stderr
    found = events(tmp_path / "trace.json")
    assert len(found) > 3 and [e["ts"] for e in found] == [i * 10**6 for i in range(len(found))]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000  # of that process alone


def test_a_role_is_told_its_share_of_all_its_processes():
    usage = Usage()
    usage.add("trainer-0", "train", 0.0, 6.0)
    usage.add("trainer-1", "train", 0.0, 4.0)
    usage.add("rollout-0", "sample", 0.0, 10.0)
    usage.add("rollout-0", "sample", 2.0, 10.0)
    again = Usage()
    again.restore(json.loads(json.dumps(usage.state())))
    again.add("trainer-1", "train", 100.0, 110.0)  # after a restart: what is between counts as nothing
    assert list(usage.rows()) == [("rollout", "sample", "1.8 at once"), ("trainer x 2", "train", "50.0%")]
    assert list(again.rows()) == [("rollout", "sample", "0.9 at once"), ("trainer x 2", "train", "50.0%")]


@pytest.mark.parametrize(
    "keys, waited, flying, said",
    [
        ({"mode": "async"}, 0.4, 16.0, "engines are the slower side; give them more (now placement.engines = 1)"),
        ({"mode": "async"}, 0.01, 3.0, "training is the slower side; give it more (now placement.trainers = 1)"),
        ({"mode": "async"}, 0.01, 14.0, ""),
        ({"mode": "async"}, 0.1, 3.0, ""),
        ({"mode": "overlap"}, 0.4, 8.0, "engines are the slower side"),
        ({"mode": "sync"}, 0.4, 8.0, ""),
    ],
)
def test_the_slower_side_is_named_with_the_numbers(make_run, keys, waited, flying, said):
    run, history = make_run(batch={"groups": 8}, **keys), History()
    for step in range(1, RECENT + 1):
        assert advice(history, run) == ("", "")
        history.add(step, {"time/step": 2.0, "time/wait": 2.0 * waited, "utilization/in_flight": flying})
    side, text = advice(history, run)
    assert said in text and bool(side) == bool(said)
    most = 8 * (1 + run.max_staleness)
    assert not said or f"training waited {waited:.0%} of the time; {flying:.1f} of {most} groups" in text


def test_what_processes_did_is_in_the_report_and_the_trace(tracking, tmp_path):
    tracker = tracking()
    tracker.miles_span(process="engine-0", doing="sync", began=10.0, ended=11.0)  # before every process was up
    tracker.miles_run_start(run_dir=tmp_path, step=0)
    tracker.miles_span(process="trainer-0", doing="train", began=11.0, ended=14.0)
    tracker.miles_step_end(step=1, metrics={"time_s": 3.0, "time/step": 3.0})
    tracker.miles_span(process="trainer-0", doing="wait", began=14.0, ended=15.0)
    tracker.miles_run_end(error=None)
    assert [(e["name"], e["ts"]) for e in events(tmp_path / "trace.json")] == [
        ("sync", 10**7),
        ("train", 11 * 10**6),
        ("wait", 14 * 10**6),
    ]
    report = (tmp_path / "report.html").read_text()
    assert '<td>trainer</td><td>train</td><td class="n">60.0%</td>' in report


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tracking, tmp_path, capsys):
    tracker = tracking()
    tracker.miles_run_start(run_dir=tmp_path, step=0)
    (tmp_path / "trace.json").unlink()
    for step in (1, 2):
        tracker.miles_span(process="trainer-0", doing="train", began=11.0, ended=14.0)
        tracker.miles_step_end(step=step, metrics={"time_s": 3.0})
    assert capsys.readouterr().out.count("the run goes on without it") == 1
