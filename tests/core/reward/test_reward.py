"""Rewards by name: right values, and a named failure for everything that can go wrong with a scorer."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from miles_core.config import ConfigError, RunConfig, Source
from miles_core.edges.reward import Reward, RewardError
from miles_core.types import Group, Sample
from pydantic import ValidationError


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
        ({"kind": "numeric"}, ["so 3 and 12", "12.0", "1,2", "12 or 13", "none"], [1, 1, 1, 0, 0]),
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
    assert score(function("return [len(group), 0]", "group"), group("a", "b"))["mine"] == [2, 0]


def test_what_a_scorer_prints_does_no_harm(function, capfd):
    assert score(function("print('hello' * 100000); return 1"), group("a"))["mine"] == [1]


FAULTS = [
    ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
    ("return float('nan')", "gave nan, which is not a finite number"),
    ("return 'good'", "gave 'good', which is not a finite number"),
    ("while True: pass", "ran over its budget of 0.4 s"),
    ("time.sleep(60)", "ran over its budget of 0.4 s"),
    ("os._exit(3)", "ended its process with status 3"),
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
    with pytest.raises(RewardError, match="sample 7/1: ran over its budget, where nothing but ending its process"):
        score(table, group("good", "bad"))
    assert time.monotonic() - began < 20


def test_a_failure_can_be_counted_instead(function):
    table = function("return 1 / (sample.response != 'bad')")
    table["mine"] |= {"on_error": "fail", "failure_value": -1.0, "weight": 2.0}
    it, scored = plugin(table), group("good", "bad")
    assert asyncio.run(it.miles_reward(scored, False)) == {"mine": [2.0, -2.0]}
    assert scored.samples[1].info["failed_rewards"] == {"mine": "raised ZeroDivisionError: division by zero"}
    assert it.miles_metrics(1, [scored], False) == {"reward/failed/mine": 0.5}
    assert it.miles_metrics(1, [scored], True) == {"eval/failed/mine": 0.5}


def test_a_missing_answer_is_named(function):
    scored = group("1")
    del scored.samples[0].info["answer"]
    with pytest.raises(RewardError, match="sample 7/0: raised KeyError: .*no column 'answer'"):
        score({"exact_match": {}}, scored)


def test_a_pool_goes_on_after_a_kill(function):
    table = function("os._exit(1) if sample.response == 'bad' else None; return 1")

    async def both():
        it = plugin(table)
        with pytest.raises(RewardError):
            await it.miles_reward(group("bad"), False)
        return await it.miles_reward(group("good", "good"), False)

    assert asyncio.run(both()) == {"mine": [1, 1]}


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
            self.wfile.write(b"?" if how == "odd" else json.dumps({"reward": len(how)}).encode())

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
        ("slow", "did not answer within its budget of 0.6 s"),
        ("broken", "failed 3 times, at last with status 500"),
        ("gone", "answered status 404"),
        ("odd", 'not {"reward": number}'),
    ],
)
def test_a_remote_scorer(server, said, expected):
    url, seen = server
    table = {"far": {"kind": "http", "url": url, "budget_s": 0.6, "retries": 2}}
    if isinstance(expected, float):
        assert score(table, group(said))["far"] == [expected]
        assert seen[-1] == {"prompt": "p", "response": said, "answer": "12", "info": {"answer": "12"}}
    else:
        with pytest.raises(RewardError, match="reward far, sample 7/0: ") as caught:
            score(table, group(said))
        assert expected in str(caught.value)


def test_nobody_there():
    with pytest.raises(RewardError, match="ConnectError"):
        score({"far": {"kind": "http", "url": "http://127.0.0.1:9/", "retries": 0}}, group("x"))


# -- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, key, said",
    [
        ({"kind": "regex", "pattern": "(a"}, "pattern", "not a regular expression"),
        ({"kind": "http", "url": "ftp://x"}, "url", "is no http address"),
        ({"kind": "python", "path": "/nowhere/x.py:f"}, "path", "No such file"),
        ({"kind": "python", "path": "/nowhere/x"}, "path", "does not name a function"),
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


def test_an_unknown_kind_and_an_unknown_key():
    with pytest.raises(ValidationError, match="no such kind of reward: 'exact_mach'; did you mean 'exact_match'"):
        Reward.Config.model_validate({"exact_mach": {}})
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Reward.Config.model_validate({"exact_match": {"wieght": 1}})
    source = Source([], ["reward.exact_match.wieght=1"])
    source.validate(Reward.Config, source.tree["reward"], ("reward",))
    with pytest.raises(ConfigError, match="reward.exact_match.*wieght: no such key"):
        source.refuse()


# -- processes ------------------------------------------------------------------------------------------------------

PARENT = """\
import asyncio, sys, time
from miles_core.config import RunConfig
from miles_core.edges.reward import Reward
from miles_core.types import Group, Sample
run = RunConfig(algorithm="a", model={"path": "m"})
it = Reward(Reward.Config.model_validate({"regex": {"pattern": "(a+)+$", "budget_s": 60}}), run)
it.miles_rollout_start()
print(it._pool._children[0]._process.pid, flush=True)
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
