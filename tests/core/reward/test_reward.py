"""Rewards by name: right values, and a named failure for everything that can go wrong with a scorer."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from miles_core.config import ConfigError, RunConfig
from miles_core.edges.reward import Reward, RewardError
from miles_core.edges.reward.kinds import last_number
from miles_core.edges.toml import Source
from miles_core.types import Group, Sample


def group(*responses, answer="12", written=2, **info):
    samples = [
        Sample("p", {"answer": answer, **info}, id=f"7/{i}", response=said, tokens=[0] * written, mask=[True] * written)
        for i, said in enumerate(responses)
    ]
    return Group(7, samples)


def plugin(tables, max_tokens=10):
    run = RunConfig(algorithm="a", model={"path": "m"}, rollout={"max_tokens": max_tokens})
    return Reward(Reward.Config.model_validate(tables), run)


def score(tables, scored, **keys):
    return asyncio.run(plugin(tables, **keys).miles_reward(scored, False))


@pytest.fixture
def function(tmp_path):
    def write(body, argument="sample"):
        (tmp_path / "mine.py").write_text(f"import os, re, time\n\n\ndef f({argument}):\n    {body}\n")
        return {"mine": {"kind": "python", "path": str(tmp_path / "mine.py:f"), "budget_s": 0.4}}

    return write


@pytest.mark.parametrize(
    "table, said, worth",
    [
        ({"kind": "exact_match"}, [" 12", "1 2", "012"], [1, 0, 0]),
        ({"kind": "exact_match", "strip": False}, [" 12", "12"], [0, 1]),
        ({"kind": "positions"}, ["12", "13", "21", "", "123"], [1, 0.5, 0, 0, 2 / 3]),
        (
            {"kind": "numeric"},
            ["so 3 and 12", "12.0", "22-12", "1,2", "12 or 13", "none", "-12"],
            [1, 1, 1, 0, 0, 0, 0],
        ),
        ({"kind": "numeric", "tolerance": 0.5}, ["12.4", "12.6", "-12"], [1, 0, 0]),
        ({"kind": "math"}, ["$\\frac{24}{2}$", "$13$", "the answer is 12"], [1, 0, 1]),
        ({"kind": "regex", "pattern": "1+2"}, ["x112", "2"], [1, 0]),
        ({"kind": "regex", "pattern": "1+2", "full": True}, ["x112", "112"], [0, 1]),
    ],
)
def test_kinds(table, said, worth):
    assert score({"it": table}, group(*said))["it"] == pytest.approx(worth)


@pytest.mark.parametrize("written, worth", [(0, 0), (6, 0), (8, -0.5), (10, -1), (12, -1)])
def test_overlong_punishment_is_linear_within_its_buffer(written, worth):
    assert score({"length_penalty": {"buffer": 4}}, group("x", written=written))["length_penalty"] == [worth]


def test_a_reward_is_weighted_and_its_raw_value_kept():
    scored = group("12", "13")
    named = score({"exact_match": {"weight": 0.25}, "half": {"kind": "positions"}}, scored)
    assert named == {"exact_match": [0.25, 0.0], "half": [1.0, 0.5]}
    assert scored.samples[0].info["raw_rewards"] == {"exact_match": 1.0, "half": 1.0}


def test_functions_of_a_sample_and_of_a_group(function):
    assert score(function("return len(sample.response)"), group("a", "bbb"))["mine"] == [1, 3]
    assert score(function("return [len(group.samples), group.id]", "group"), group("a", "b"))["mine"] == [2, 7]


def test_what_a_scorer_prints_does_no_harm(function, capfd):
    assert score(function("print('hello' * 100000); return 1"), group("a"))["mine"] == [1]


FAULTS = [
    ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
    ("return float('nan')", "gave nan, which is not a finite number"),
    ("return 'good'", "gave 'good', which is not a finite number"),
    ("while True: pass", "ran over its budget of 0.4 s"),
    ("time.sleep(60)", "ran over its budget of 0.4 s"),
    ("os._exit(3)", "its process exited with status 3"),
    ("os.kill(os.getpid(), 9)", "its process was ended by SIGKILL; it may have run out of memory"),
    ("raise SystemExit('no')", "called exit('no')"),
    ("return re", "which is not a finite number"),
]


@pytest.mark.parametrize("body, said", FAULTS)
def test_a_failure_names_reward_and_sample(function, body, said):
    table = function(f"if sample.response == 'good': return 1.0\n    {body}")
    with pytest.raises(RewardError, match="reward mine, sample 7/1: ") as caught:
        score(table, group("good", "bad"))
    assert said in str(caught.value)


def test_a_regular_expression_that_backtracks_for_ever_is_over_budget(function):
    table = function("return float(bool(re.search('(a+)+$', sample.response)))")
    with pytest.raises(RewardError, match="sample 7/1: ran over its budget of 0.4 s"):
        score(table, group("aaa", "a" * 40 + "b"))


def test_what_no_signal_reaches_is_killed_and_named(function):
    table = function("return sum(range(10**13)) if sample.response == 'bad' else 1")  # one loop, all of it inside C
    began = time.monotonic()
    with pytest.raises(RewardError, match="sample 7/1: ran over its budget of 0.4 s where no signal reaches it"):
        score(table, group("good", "bad"))
    assert time.monotonic() - began < 20


def test_a_failure_can_be_counted_instead(function):
    table = function("return 1 / (sample.response != 'bad')")
    table["mine"] |= {"on_error": "fail", "failure_value": -1.0, "weight": 2.0}
    it, scored = plugin(table), group("good", "bad")
    assert asyncio.run(it.miles_reward(scored, False)) == {"mine": [2.0, -2.0]}
    reason = scored.samples[1].info["failed_rewards"]["mine"]
    assert re.fullmatch(r"raised ZeroDivisionError: division by zero \(.*mine.py:5\)", reason)
    assert it.miles_metrics(1, [scored], False) == {"reward/failed/mine": 0.5}
    assert it.miles_metrics(1, [scored], True) == {"eval/failed/mine": 0.5}


def test_a_missing_answer_is_named(function):
    scored = group("1")
    del scored.samples[0].info["answer"]
    with pytest.raises(RewardError, match="sample 7/0: raised LookupError: the row has no column 'answer'"):
        score({"exact_match": {}}, scored)


def test_a_pool_goes_on_after_a_kill(function):
    table = function("os._exit(1) if sample.response == 'bad' else None; return 1")

    async def both():
        it = plugin(table)
        with pytest.raises(RewardError):
            await it.miles_reward(group("bad"), False)
        return await it.miles_reward(group("good", "good"), False)

    assert asyncio.run(both()) == {"mine": [1, 1]}


@pytest.mark.parametrize("whole", [False, True])
def test_a_process_that_somebody_kills_costs_no_sample(function, tmp_path, whole):
    """Two in a row, where a third one can score what they were at."""
    (count := tmp_path / "deaths").touch()
    last_words = "f.tell() < 2 and f.write('.') and (f.close() or os.kill(os.getpid(), 9))"
    dies = f"with open({str(count)!r}, 'a') as f: {last_words}"
    if whole:
        table = function(f"{dies}\n    return [len(s.response) for s in group.samples]", "group")
    else:
        table = function(f"if sample.response == 'aa':\n        {dies}\n    return len(sample.response)")
    assert score(table, group("a", "aa", "aaa"))["mine"] == [1, 2, 3]
    assert count.read_text() == ".."


def test_a_wrong_count_names_the_group(function):
    with pytest.raises(RewardError, match="reward mine, sample 7/0: gave 1 values for the 2 samples of group 7"):
        score(function("return [1.0]", "group"), group("a", "b"))


def test_a_run_that_stops_anyway_does_not_wait_for_the_rest(function):
    began = time.monotonic()
    with pytest.raises(RewardError, match="sample 7/0: ran over"):
        score(function("time.sleep(60)"), group(*"x" * 40))
    assert time.monotonic() - began < 12


def test_every_hang_of_a_group_is_counted_and_the_others_are_scored(function):
    table = function("return sum(range(10**13)) if sample.response == 'bad' else 1")
    table["mine"]["on_error"] = "fail"
    scored = group("good", "bad", "good", "bad", "good")
    assert score(table, scored)["mine"] == [1, 0, 1, 0, 1]
    assert ["failed_rewards" in sample.info for sample in scored.samples] == [False, True, False, True, False]


def test_a_hang_does_not_hold_up_other_groups(function):
    table = function("time.sleep(60) if sample.response == 'bad' else None; return 1")
    table["mine"] |= {"budget_s": 30}

    async def quick():
        it = plugin(table)
        stuck = asyncio.ensure_future(it.miles_reward(group("bad"), False))
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            done = await asyncio.gather(*(it.miles_reward(group("good"), False) for _ in range(3)))
        stuck.cancel()
        return done

    assert asyncio.run(quick()) == [{"mine": [1]}] * 3


@pytest.mark.parametrize("workers", [1, 3])
def test_who_waits_while_processes_die_gets_another_one(function, workers):
    table = function("os._exit(1) if sample.response == 'bad' else None; return 1")
    table["mine"]["on_error"] = "fail"

    async def all_at_once():
        it = plugin(table | {"workers": workers})
        groups = [group("bad" if i % 2 else "good") for i in range(6)]
        async with asyncio.timeout(60):
            return await asyncio.gather(*(it.miles_reward(one, False) for one in groups))

    assert asyncio.run(all_at_once()) == [{"mine": [1 - i % 2]} for i in range(6)]


def test_an_answer_is_mathematics_with_or_without_dollars():
    answers = ["\\frac12", "\\frac{1}{2}", "$\\frac12$", "\\boxed{1/2}", "1/2", "0.5", 0.5, "1/4"]
    scored = group(*["so it is $\\frac{2}{4}$"] * len(answers))
    for sample, answer in zip(scored.samples, answers, strict=True):
        sample.info["answer"] = answer
    assert score({"math": {}}, scored)["math"] == [1, 1, 1, 1, 1, 1, 1, 0]


def test_an_answer_that_nothing_can_equal_is_an_error():
    with pytest.raises(
        RewardError, match="reward numeric, sample 7/0: raised ValueError: the answer 'x' holds no number"
    ):
        score({"numeric": {}}, group("1", answer="x"))
    with pytest.raises(
        RewardError, match="reward math, sample 7/0: raised ValueError: math-verify reads no expression"
    ):
        score({"math": {}}, group("1", answer=" "))


@given(st.integers(-(10**20), 10**20), st.sampled_from(["{}", "it is {}.", "${}", "a = {}, done", "({})"]))
def test_a_number_is_found_as_it_was_written(number, text):
    assert last_number(text.format(number)) == last_number(text.format(f"{number:,}")) == number


# -- remote ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            how = body["response"]
            if how == "slow":
                time.sleep(1.0)
            flaky = how == "flaky" and sum(b["response"] == "flaky" for b in seen) < 3
            self.send_response({"broken": 500, "gone": 404}.get(how, 503 if flaky else 200))
            self.end_headers()
            self.wfile.write(b"\xff" if how == "odd" else json.dumps({"reward": len(how)}).encode())

        def log_message(self, *args): ...

    seen: list = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/", seen
    http.shutdown()


@pytest.mark.parametrize(
    "said, expected",
    [
        ("ok", 2.0),
        ("flaky", 5.0),
        ("slow", "failed 3 times, at last with no answer within timeout_s = 0.3"),
        ("broken", "failed 3 times, at last with status 500"),
        ("gone", "answered status 404"),
        ("odd", 'not {"reward": number}'),
    ],
)
def test_a_remote_scorer(server, said, expected):
    url, seen = server
    table = {"far": {"kind": "http", "url": url, "budget_s": 5, "timeout_s": 0.3, "retries": 2}}
    if isinstance(expected, float):
        assert score(table, group(said))["far"] == [expected]
        assert seen[-1] == {"prompt": "p", "response": said, "answer": "12", "info": {"answer": "12"}}
    else:
        with pytest.raises(RewardError, match="reward far, sample 7/0: ") as caught:
            score(table, group(said))
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    "url, said",
    [
        ("http://127.0.0.1:9/", "failed 2 times, at last with ClientConnectorError: "),
        ("http://h:99999/", "http://h:99999/: InvalidUrlClientError: "),  # nothing that another attempt would mend
        (f"http://{'x' * 70}.org/", "UnicodeError: "),
    ],
)
def test_nobody_there(url, said):
    with pytest.raises(RewardError, match=said):
        score({"far": {"kind": "http", "url": url, "retries": 1}}, group("x"))


def test_a_scorer_outside_is_asked_through_the_proxy_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server[0])
    assert score({"far": {"kind": "http", "url": "http://scorer.invalid/"}}, group("ok"))["far"] == [2.0]


# -- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, key, said",
    [
        ({"kind": "regex", "pattern": "(a"}, "pattern", "not a regular expression"),
        ({"kind": "http", "url": "ftp://x"}, "url", "is no http address"),
        ({"kind": "python", "path": "/nowhere/x.py:f"}, "path", "No such file"),
        ({"kind": "python", "path": "/nowhere/x"}, "path", "does not name a function"),
        ({"kind": "python", "path": f"{__file__}:nobody"}, "path", "defines no function 'nobody'"),
        ({"kind": "python", "path": f"{__file__}:score"}, "path", "score must take an argument named sample, or group"),
    ],
)
def test_a_table_that_cannot_work_is_found_in_advance(table, key, said):
    found = []
    plugin({"it": table}).miles_check(lambda *fault: found.append(fault))
    assert found[0][0] == f"reward.it.{key}" and said in found[0][1]


def test_a_function_that_is_not_in_its_file(function):
    table = function("return 1")
    table["mine"]["path"] = table["mine"]["path"][:-1] + "g"
    found = []
    plugin(table).miles_check(lambda *fault: found.append(fault))
    assert "defines no function 'g'" in found[0][1]


@pytest.mark.parametrize(
    "setting, said",
    [
        ("exact_mach.weight=1", "reward.exact_mach.kind: no such kind of reward; did you mean 'exact_match'?"),
        ("it.kind=speed", "reward.it.kind: no such kind of reward; there are exact_match, positions, numeric, math,"),
        ("exact_match.wieght=1", "reward.exact_match.wieght: no such key for exact_match; did you mean 'weight'?"),
        ("it={kind='math', tolerance=1}", "reward.it.tolerance: no such key for math"),
        ("exact_match.weight=much", "reward.exact_match.weight: input should be a valid number"),
        ("regex.full=true", "reward.regex.pattern: missing"),
        ("exact_match=1", "reward.exact_match: must be a table, such as [reward.exact_match]"),
        ("workers=0", "reward.workers: input should be greater than 0"),
    ],
)
def test_a_table_that_makes_no_sense_is_told_by_its_own_key(setting, said):
    source = Source([], [f"reward.{setting}"])
    source.validate(Reward.Config, source.tree["reward"], ("reward",))
    with pytest.raises(ConfigError) as caught:
        source.refuse()
    assert said in str(caught.value)


def test_tables_reach_other_processes_as_they_are():
    tables = {"workers": 2, "b": {"kind": "regex", "pattern": "x", "full": True}, "a": {"kind": "numeric", "weight": 0}}
    config = Reward.Config.model_validate(tables)
    again = Reward.Config.model_validate_json(config.model_dump_json())
    assert again == config and list(again.scorers) == ["b", "a"] and again.scorers["b"].full


# -- processes ------------------------------------------------------------------------------------------------------

PARENT = """\
import asyncio, sys, time
from miles_core.config import RunConfig
from miles_core.edges.reward import Reward
from miles_core.types import Group, Sample
run = RunConfig(algorithm="a", model={"path": "m"})
it = Reward(Reward.Config.model_validate({"regex": {"pattern": "(a+)+$", "budget_s": 60}}), run)
it.miles_rollout_start()
print(*(child._process.pid for child in it._pool._children), flush=True)
asyncio.run(it.miles_reward(Group(1, [Sample(response="a" * 60 + "b")]), False))
"""


def test_nothing_is_left_behind_when_the_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(1.0)  # the child is in the middle of what never ends
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
