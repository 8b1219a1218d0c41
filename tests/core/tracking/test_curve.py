"""A curve is well-formed SVG that shows every value it stands for."""

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.room import Room
from miles_core.edges.tracking.curve import HEIGHT, HUGE, POINTS, WIDTH, Curve, condense, draw, main, spark, ticks
from miles_core.edges.tracking.metrics import History, MetricsFile

SVG = "{http://www.w3.org/2000/svg}"
FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.lists(FINITE | st.floats(-10, 10), min_size=1, max_size=500)


def series(values, name="reward/mean"):
    history = History()
    for step, value in enumerate(values, 1):
        history.add(step, {name: value})
    return history.get(name)


@settings(deadline=None, derandomize=True)
@given(values=VALUES)
def test_condensing_keeps_the_range_and_the_ends(values):
    points = condense(series(values))
    assert 1 <= len(points) <= POINTS
    values = [min(max(value, -HUGE), HUGE) for value in values]
    assert min(point.low for point in points) == min(values)
    assert max(point.high for point in points) == max(values)
    assert all(point.low <= point.value <= point.high for point in points)
    if len(values) <= POINTS:
        assert [point.value for point in points] == values


@settings(deadline=None, derandomize=True)
@given(low=st.floats(-HUGE, HUGE), size=st.floats(0, HUGE))
def test_ticks_are_few_and_enclose_the_values(low, size):
    marks = ticks(low, low + size, 5)
    step = marks[1] - marks[0]
    assert marks[0] <= low + step * 1e-6 and marks[-1] >= low + size - step * 1e-6
    assert 2 <= len(marks) <= 8


@settings(deadline=None, derandomize=True)
@given(values=VALUES)
def test_every_point_lies_within_the_small_picture(values):
    line = next(ElementTree.fromstring(spark(series(values))).iter())[0]
    pairs = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert all(0 <= x <= 120 and 0 <= y <= 22 for x, y in pairs)


@settings(deadline=None, derandomize=True)
@given(values=VALUES)
def test_every_point_lies_within_the_picture(values):
    root = ElementTree.fromstring(draw("Reward", [Curve("reward/mean", series(values))]))
    line = next(e for e in root.iter(f"{SVG}polyline"))
    pairs = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(pairs) == len(condense(series(values)))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pairs)


def test_a_climbing_reward_climbs_on_paper():
    root = ElementTree.fromstring(draw("Reward", [Curve("r", series([0.0, 0.25, 1.0]))]))
    line = next(e for e in root.iter(f"{SVG}polyline"))
    heights = [float(pair.split(",")[1]) for pair in line.attrib["points"].split()]
    assert heights[0] - heights[1] == pytest.approx((heights[0] - heights[2]) / 4, abs=0.2)


def test_what_is_drawn_is_told_in_words_and_escaped():
    text = draw("a < b & c", [Curve("<x>", series([0.5, 2.0]))])
    root = ElementTree.fromstring(text)
    assert root.find(f"{SVG}title").text == "a < b & c"
    assert root.find(f"{SVG}desc").text == "<x>: 0.500 at step 1, 2 at step 2, between 0.500 and 2"
    assert root.attrib["role"] == "img"


def test_one_file_is_drawn_from_a_run_folder(tmp_path):
    file = MetricsFile(tmp_path, 0, Room(print))
    for step in range(1, 5):
        file.append(step, {"reward/mean": step / 4, "eval/accuracy": 0.5})
    out = tmp_path / "curve.svg"
    main([str(tmp_path), "--out", str(out), "--keys", "reward/mean", "eval/accuracy", "--title", "Learning"])
    root = ElementTree.parse(out).getroot()
    assert len(list(root.iter(f"{SVG}polyline"))) == 2
    assert {"Learning", "reward/mean", "eval/accuracy"} <= {e.text for e in root.iter(f"{SVG}text")}
    assert root.find(f"{SVG}style") is not None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--keys", "reward/men"], "did you mean 'reward/mean'?"),
        (["--keys", "a", "b", "c", "d"], "one picture can show 3"),
        (["--out", "{run}/none/x.svg"], "the picture cannot be written: No such file"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, arguments, complaint):
    MetricsFile(tmp_path, 0, Room(print)).append(1, {"reward/mean": 0.5})
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--out", str(tmp_path / "x.svg"), *(a.format(run=tmp_path) for a in arguments)])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()


def test_a_folder_without_metrics_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", str(tmp_path / "x.svg")])
    assert "metrics.jsonl" in capsys.readouterr().err
