"""The tool of the example of several turns: what it answers, and what it may do to a run."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calculator_cases import CALCULATOR, CALL, fault, module, result
from whole_runs import processes_of


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("12+30*2", "72"),
        ("-(7-9)/4", "0.5"),
        ("6/3", "2"),
        ("7//2%2", "1"),
        ("1/0", "error: division by zero"),
        ("9**9**9", "error: too large"),
        ("1e999", "error: no such number"),
        ("(-8)**0.5", "error: no such number"),
        ("__import__('os').getpid()", "error: malformed"),
        ("True+1", "error: malformed"),
        ("1+", "error: malformed"),
        ("", "error: malformed"),
        ("(" * 300 + "1" + ")" * 300, "error: malformed"),
        ("9" * 5000, "error: malformed"),
    ],
)
def test_arithmetic_is_all_it_does(asked, told):
    assert module("tool").answer(asked) == told


def test_the_policy_is_told_of_its_mistakes(rolled):
    done = rolled(["<call>1/0</call>", "12+</call>", "42<eos>"], turns=3)
    [sample] = done.samples
    assert result(sample) == "error: division by zero" and result(sample, 1) == "error: no <call>"
    assert not fault(sample) and "<result>error: division by zero</result>" in sample.response
    assert done.rewards == {"call": [0.0], "answer": [1.0]}


def test_a_tool_that_never_returns_costs_its_limit(rolled):
    began = time.monotonic()
    done = rolled([CALL, "42<eos>"], ["42<eos>"], command=["sh", "-c", "sleep 86.5 & sleep 86.5"], wall_s=0.4)
    assert 0.4 <= time.monotonic() - began < 3
    hung, other = done.samples
    assert fault(hung) == "no answer in 0.4 s" and result(hung) == "error: no answer in 0.4 s"
    assert hung.finish == other.finish == "stop" and fault(other) is None
    assert done.rewards == {"call": [0.0, 0.0], "answer": [1.0, 1.0]}
    deadline = time.monotonic() + 5  # a killed process takes a moment to be gone
    while left := [found for found in processes_of("86.5") if "sleep" in found]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_a_tool_that_prints_a_gigabyte_is_cut(rolled):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    flood = ["sh", "-c", "head -c 1000000000 /dev/zero | tr '\\0' 7"]
    [sample] = rolled([CALL, "42<eos>"], command=flood, output_bytes=30).samples
    assert fault(sample) == "more than 30 bytes" and result(sample) == "7" * 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024 and time.monotonic() - began < 3


BUSY = "import sys; sys.stdin.readline()\nwhile True: pass"
GREEDY = "x = bytearray(10**9); print(1)"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ([sys.executable, "-c", BUSY], "too much CPU time"),
        ([sys.executable, "-c", GREEDY], "exited with status 1"),
        (["sh", "-c", "kill -9 $$"], "ended by signal 9"),
        (["printf", "1\\n2\\n"], "more than one line"),
    ],
)
def test_a_tool_at_fault_is_named_in_the_sample(rolled, command, why):
    [sample] = rolled([CALL, "42<eos>"], command=command, cpu_s=1).samples
    assert fault(sample) == why and sample.finish == "stop"


def test_a_tool_cannot_write_to_files(rolled, tmp_path):
    [sample] = rolled([CALL, "42<eos>"], command=["sh", "-c", f"echo 1 >{tmp_path}/file"]).samples
    assert fault(sample) == f"ended by signal {signal.SIGXFSZ:d}" and not (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("command", ["read x; echo 1", "read x; echo 1; read x"])
def test_a_tool_that_ends_between_calls_blames_nobody(rolled, command):
    [sample] = rolled([CALL, CALL, "42<eos>"], command=["sh", "-c", command]).samples
    assert [result(sample, i) for i in (0, 1)] == ["1", "1"] and not fault(sample, 1)


def test_a_tool_sees_no_environment(rolled, monkeypatch):
    monkeypatch.setenv("SECRET", "1234")
    [sample] = rolled([CALL, "42<eos>"], command=["sh", "-c", "read x; echo ${SECRET:-none}"]).samples
    assert result(sample) == "none"


def test_what_a_tool_says_unasked_is_nobodys_answer(hooks):
    talks = ["sh", "-c", "read x; echo 1; sleep 0.1; echo 2; read x; echo 3"]
    tools = hooks(command=talks).plugins["calculator"]._tools

    async def calls():
        await tools.ask("1")
        await asyncio.sleep(0.4)
        return await tools.ask("1")

    assert asyncio.run(calls()).text == "1"


def test_one_process_answers_many_calls_or_one(rolled):
    pid = ["sh", "-c", "while read x; do echo $$; done"]
    [sample] = rolled([CALL, CALL, "42<eos>"], command=pid).samples
    assert result(sample, 0) == result(sample, 1)
    [sample] = rolled([CALL, CALL, "42<eos>"], command=pid, calls_per_process=1).samples
    assert result(sample, 0) != result(sample, 1)


ORPHAN = f"""
import time
from pathlib import Path
from miles_core.plugins import single_file
import sys
single_file(Path({str(CALCULATOR / "calculator.py")!r})).load()
tool = sys.modules["miles_file_calculator"].Tool(["sleep", "75319"], 256)
print(tool._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("launched", [True, False])
def test_a_tool_does_not_outlive_who_started_it(launched):
    """Nor does what is still to become the tool."""
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as parent:
        tool = Path("/proc", parent.stdout.readline().strip())
        wait(lambda: not launched or (tool / "comm").read_text() == "sleep\n")
        parent.kill()
    wait(lambda: not tool.exists() or ") Z " in (tool / "stat").read_text())


def wait(until, seconds=5):
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)
