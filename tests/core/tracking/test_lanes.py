"""The picture of a trace: every process has its lane, and what it did has its length."""

import xml.etree.ElementTree as xml

import pytest
from miles_core.edges.room import Room
from miles_core.edges.tracking.lanes import COLOURS, LEFT, RIGHT, WIDTH, Span, draw, main, read
from miles_core.edges.tracking.trace import Trace

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def run(tmp_path):
    trace = Trace(tmp_path, resumed=False, room=Room(print))
    trace.add("engine-0", "serve", 100.0, 104.0)
    trace.add("trainer-0", "train", 101.0, 103.0)
    trace.add("rollout-0", "sample", 100.0, 103.0)
    trace.add("rollout-0", "sample", 101.0, 104.0)
    trace.flush()
    return tmp_path


def boxes(picture, doing):
    """Where what is drawn in the colour of ``doing`` begins, and how wide it is; the legend left out."""
    found = [e for e in xml.fromstring(picture).iter(f"{SVG}rect") if e.get("fill") == COLOURS[doing]]
    return [(float(e.get("x")), float(e.get("width"))) for e in found if e.get("height") != "12"]


def test_a_box_is_as_long_as_what_it_shows(run):
    spans = read(run / "trace.json")
    assert spans[0] == Span("engine-0", "serve", 0.0, 4.0)
    second = (WIDTH - LEFT - RIGHT) / 8
    assert boxes(draw("t", spans, 0, 8), "train") == [pytest.approx((LEFT + second, 2 * second), abs=0.01)]
    assert boxes(draw("t", spans, 2, 8), "train") == [pytest.approx((LEFT, second), abs=0.01)]  # what is left of it
    assert not boxes(draw("t", spans, 3.5, 8), "train")


def test_groups_under_way_are_counted(run):
    picture = draw("t", read(run / "trace.json"), 0, 8)
    assert "at most 2 groups" in picture and "at most 1 groups" in draw("t", read(run / "trace.json"), 3.5, 8)
    names = [e.text for e in xml.fromstring(picture).iter(f"{SVG}text")]
    assert {"engine-0", "rollout-0", "trainer-0"} <= set(names)


def test_the_command_writes_a_file_or_says_why_not(run, capsys):
    main([str(run), "--out", str(run / "a.svg"), "--seconds", "5"])
    assert (run / "a.svg").read_text().startswith("<svg")
    for said, arguments in {
        "nothing was done from 9 to 10 s; the trace ends at 4.0 s": [str(run), "--begin", "9", "--seconds", "1"],
        "is not the trace of a run": [str(run / "a.svg")],
        "No such file": [str(run / "b")],
        "--seconds: 0 is not a length of time": [str(run), "--seconds", "0"],
    }.items():
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--out", str(run / "b.svg")])
        assert ended.value.code == 2 and said in capsys.readouterr().err
