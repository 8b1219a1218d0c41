"""One local Ray for all of these: what a process answers, how it fails, how it ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster_targets as targets
import numpy as np
import pytest
import ray
from miles_core.edges.cluster import leash
from miles_core.edges.cluster.cluster import RayCluster
from miles_core.edges.cluster.session import Session
from miles_core.edges.protocols import Process, WorkerDied
from miles_core.types import Refused


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        cluster = RayCluster(Session(targets.LOCAL), tmp_path_factory.mktemp("run"), 60)
        yield cluster
        asyncio.run(cluster.close())
    assert not ray.is_initialized()


def start(cluster, cls, *args, name="worker", **resources):
    return asyncio.run(cluster.start(Process(name, f"cluster_targets:{cls}", args, **{"cpus": 0.1} | resources)))


@pytest.fixture(scope="module")
def plain(cluster):
    return start(cluster, "Plain", name="plain")


@pytest.fixture(scope="module")
def loops(cluster):
    return start(cluster, "Async", name="loops")


def test_exception_keeps_its_type_and_tells_where_it_was(plain):
    with pytest.raises(targets.Mine, match="no luck") as caught:
        asyncio.run(plain.call("fail", "mine"))
    error = caught.value
    assert type(error) is targets.Mine and error.sample == 7
    assert error.__cause__ is None and error.__suppress_context__  # one cause, not the machinery's
    first, where, story = error.__notes__
    assert first == "in miles_loss of plugin x" and where.startswith("in plain (pid ") and "\n" not in where
    assert error.worker_traceback in story and "KeyError: 'deep'" in story and "in fail" in story
    assert "host.py" not in story and "ray/" not in story


@pytest.mark.parametrize(("kind", "text"), [("odd", "Odd: 3 odd shoes"), ("exit", "SystemExit: 2")])
def test_exception_that_cannot_travel_keeps_its_text(plain, kind, text):
    with pytest.raises(RuntimeError, match=text) as caught:
        plain.ask("fail", kind)
    assert "in fail" in caught.value.worker_traceback


def test_exceptions_of_async_methods_and_of_wrong_names(loops):
    with pytest.raises(targets.Mine, match="async"):
        asyncio.run(loops.call("fail"))
    with pytest.raises(AttributeError, match="nonsense"):
        loops.ask("nonsense")


def test_result_that_cannot_be_pickled(plain):
    with pytest.raises(RuntimeError, match="plain: unpicklable: arguments or result cannot be sent"):
        asyncio.run(plain.call("unpicklable"))
    assert plain.ask("echo", 3) == 3


def test_constructor_and_import_errors_are_the_users_own(cluster):
    with pytest.raises(targets.Mine, match="cannot build from here") as caught:
        start(cluster, "Broken", "here", name="broken")
    assert "in broken (pid " in "".join(caught.value.__notes__)
    pid = int(caught.value.__notes__[0].split("pid ")[1].split()[0])
    assert leash.born(pid) is None
    with pytest.raises(AttributeError, match="Nothing"):
        start(cluster, "Nothing")


def test_plain_class_lives_in_one_thread_and_takes_turns(plain):
    async def many():
        return await asyncio.gather(*(plain.call("count") for _ in range(50)))

    assert asyncio.run(many()) == list(range(1, 51))
    assert len(set(plain.ask("where"))) == 1  # that of the constructor among them


def test_async_class_holds_many_calls_at_once(loops):
    async def many():
        return await asyncio.gather(*(loops.call("meet", 300) for _ in range(300)))

    assert asyncio.run(many()) == [300] * 300


def test_waiting_does_not_block_the_loop(plain):
    async def tick():
        slow, ticks = asyncio.ensure_future(plain.call("sleep", 0.3)), 0
        while not slow.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(tick()) > 5


def test_a_future_is_waited_for_beside_the_thread(plain):
    async def during():
        later, counted = asyncio.ensure_future(plain.call("later", False)), 0
        while not later.done():
            await plain.call("count")
            counted += 1
        return await later, counted

    said, counted = asyncio.run(during())
    assert said == "written" and counted > 5
    with pytest.raises(OSError, match="/disk: full"):
        plain.ask("later", True)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_set_before_torch_is_imported(cluster, threads):
    worker = start(cluster, "Plain", name=f"trainer-{threads}", threads=threads)
    *counts, title = worker.ask("environment")
    assert counts == [str(threads), threads]
    assert title.startswith(f"ray::trainer-{threads}")
    asyncio.run(worker.kill())


def test_handles_travel_and_work_from_elsewhere(plain, loops):
    assert asyncio.run(loops.call("forward", plain, "echo", "hello")) == "hello"
    assert isinstance(plain.ask("ask", loops, "plain"), int)
    with pytest.raises(targets.Mine, match="async") as caught:
        plain.ask("ask", loops, "fail")
    notes = [note for note in caught.value.__notes__ if "\n" not in note]
    assert [note.split()[1] for note in notes] == ["loops", "plain"]


def test_shared_value_arrives_as_itself_at_the_top_level(cluster, plain):
    value = {"weights": np.arange(100_000)}
    reference = asyncio.run(cluster.share(value))
    for _ in range(2):
        arrived, other = plain.ask("echo", reference, 1)
        assert other == 1 and np.array_equal(arrived["weights"], value["weights"])


def test_death_is_noticed_at_once_with_its_last_words(cluster):
    worker = start(cluster, "Plain", name="mortal")
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=r"^mortal died during die\n") as caught:
        asyncio.run(worker.call("die"))
    assert time.monotonic() - began < 3
    assert "the last thing I said" in str(caught.value) and "mortal.log" in str(caught.value)
    with pytest.raises(WorkerDied, match="mortal died during echo"):
        worker.ask("echo", 1)


@pytest.mark.parametrize("times", [2, 3])
def test_one_that_dies_while_it_starts_is_started_again(cluster, tmp_path, times):
    (count := tmp_path / "starts").touch()
    if times == 3:  # it always will
        with pytest.raises(WorkerDied, match="stillborn-3 died during its constructor"):
            start(cluster, "Stillborn", count, times, name="stillborn-3")
    else:
        assert asyncio.run(start(cluster, "Stillborn", count, times, name="stillborn-2").call("lives"))
    assert len(count.read_text()) == 3


def test_kill_fails_calls_under_way_and_frees_the_name(cluster):
    async def kill():
        worker = await cluster.start(Process("phoenix", "cluster_targets:Plain", cpus=0.1))
        call = asyncio.ensure_future(worker.call("sleep", 60))
        pid = worker.place.pid
        await asyncio.sleep(0.1)
        await worker.kill()
        assert leash.born(pid) is None
        with pytest.raises(WorkerDied, match="phoenix"):
            await call
        again = await cluster.start(Process("phoenix", "cluster_targets:Plain", cpus=0.1))
        assert await again.call("pid") != pid
        await again.kill()

    asyncio.run(kill())


@pytest.mark.parametrize("blocking", [False, True])
def test_silence_is_death(cluster, blocking):
    worker = start(cluster, "Plain", name="silent")
    pid = worker.ask("pid")
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="silent did not answer echo within 0.2 s, and was killed"):
        worker.ask("echo", 1, timeout=0.2) if blocking else asyncio.run(worker.call("echo", 1, timeout=0.2))
    assert time.monotonic() - began < 3
    while leash.born(pid) and time.monotonic() - began < 5:
        time.sleep(0.01)
    assert leash.born(pid) is None


def test_one_that_hangs_is_killed_whoever_waits_for_it_and_one_at_work_is_not(cluster, tmp_path):
    async def go():
        watchful = RayCluster(cluster._session, tmp_path, 60, 1.5)
        busy, hung = [
            await watchful.start(Process(name, f"cluster_targets:{cls}", cpus=0.1))
            for name, cls in (("busy", "Plain"), ("hung", "Async"))
        ]
        work, never = asyncio.ensure_future(busy.call("sleep", 4)), asyncio.ensure_future(hung.call("meet", 2))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        os.kill(hung.place.pid, signal.SIGSTOP)
        with pytest.raises(WorkerDied, match="hung answered nothing for 1.5 s .ray.silence_s., and was killed during"):
            await asyncio.wait_for(never, 20)
        assert 1.0 < time.monotonic() - began < 10
        while leash.born(hung.place.pid) and time.monotonic() - began < 15:
            await asyncio.sleep(0.01)
        assert leash.born(hung.place.pid) is None
        await work
        assert await busy.call("echo", "alive") == "alive"
        for worker in (busy, hung):
            await worker.kill()

    asyncio.run(go())


@pytest.mark.parametrize("resource", [{"cpus": 100}, {"gpus": 64}])
def test_what_no_machine_has_is_refused_at_once(cluster, resource):
    began = time.monotonic()
    with pytest.raises(Refused, match=r"huge asks for .* no machine of the cluster has more than 8 CPUs"):
        start(cluster, "Plain", name="huge", **resource)
    assert time.monotonic() - began < 2


def test_what_is_taken_is_refused_in_the_end(cluster, tmp_path):
    impatient = RayCluster(cluster._session, tmp_path, 1.0)
    with pytest.raises(Refused, match=r"late found no room within 1 s: it asks for 8 CPUs"):
        asyncio.run(impatient.start(Process("late", "cluster_targets:Plain", cpus=8)))


def test_second_cluster_of_a_process_shares_its_ray(cluster, plain, tmp_path):
    async def second():
        other = RayCluster(Session(targets.LOCAL), tmp_path, 60)
        worker = await other.start(Process("plain", "cluster_targets:Plain", cpus=0.1))
        assert worker.ask("pid") != plain.ask("pid")
        await other.close()
        assert leash.born(worker.place.pid) is None

    asyncio.run(second())
    assert plain.ask("echo", "still here") == "still here"


def test_a_call_that_never_arrives_does_not_hold_up_the_next(plain):
    with pytest.raises(TypeError, match="lock"):
        plain.ask("echo", plain._sending)  # refused here: a lock cannot be pickled
    with pytest.raises(RuntimeError, match="plain: echo: .*cannot be rebuilt"):
        plain.ask("echo", targets.OneWay())  # refused there
    with pytest.raises(RuntimeError, match="plain: unpicklable"):
        plain.ask("unpicklable")
    assert plain.ask("echo", "next", timeout=10) == "next"


@pytest.mark.parametrize("killed", [False, True])
def test_a_driver_that_joins_takes_its_processes_with_it_and_leaves_ray_alone(plain, tmp_path, killed):
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, targets.__file__, address, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        pid = int(driver.stdout.readline())
        since = leash.born(pid)
        assert since and pid != plain.ask("pid")
        if killed:
            driver.kill()
        rest, _ = driver.communicate(timeout=60)
    assert rest == "" and driver.returncode == (-signal.SIGKILL if killed else 0)
    deadline = time.monotonic() + 15
    while leash.born(pid) == since and time.monotonic() < deadline:
        time.sleep(0.02)
    assert leash.born(pid) != since
    assert plain.ask("echo", "still here") == "still here"
    assert not (tmp_path / "logs").exists()  # Ray keeps the logs of a cluster that the run does not own
