"""A run whose processes are killed at random times, and which is started again whenever its driver is gone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import victims

MILES = str(Path(sys.executable).with_name("miles"))
LIGHT = {"rollout": 23, "reward": 21, "engine": 23, "queue": 18}  # out of a hundred; the driver survives their loss
HEAVY = {"trainer": 5, "driver": 4, "ray": 3, "everything": 3}  # every process starts anew, or the driver is gone
KINDS = LIGHT | HEAVY
LOOK_S = 0.05
STUCK_S = 240.0  # without a step, a kill or a new driver; far more than a start takes on a loaded machine
GONE_S = 30.0  # for what a driver left behind
RESUMABLE = "miles run --resume goes on from here"  # what a driver says that ends for the death of a process


@dataclass(frozen=True, slots=True)
class Kill:
    """Due ``after_s`` seconds after step ``step`` was seen, and after the kill before it."""

    kind: str
    step: int
    after_s: float
    pick: float  # which of several, as a share of them


def schedule(seed: int, kills: int, steps: int) -> list[Kill]:
    """The same for the same arguments: every kind at least once, over the first nine tenths of the steps."""
    draw = random.Random(seed)
    kinds = [*KINDS, *draw.choices([*KINDS], [*KINDS.values()], k=kills - len(KINDS))]
    draw.shuffle(kinds)
    due = sorted(draw.randint(1, max(1, steps * 9 // 10)) for _ in kinds)
    return [Kill(kind, step, draw.uniform(0, 0.6), draw.random()) for kind, step in zip(kinds, due, strict=True)]


@dataclass
class Chaos:
    """One run under one schedule. ``folder`` holds run.toml and is named in everything the run starts."""

    folder: Path
    kills: list[Kill]
    keys: tuple[str, ...] = ()
    done: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # of drivers
    driver: subprocess.Popen[str] | None = None
    step: int = 0
    changed: float = 0.0
    without_ray: bool = False  # a process of Ray's was killed; its library may then end the driver, without a word

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def turn(self) -> None:
        """Until the driver ends by itself with every kill done."""
        self.start()
        try:
            for kill in self.kills:
                self.wait(kill)
                self.strike(kill)
            while self.attend():
                time.sleep(LOOK_S)
        finally:
            self.end()

    def start(self) -> None:
        ask = [MILES, "run", "run.toml", *self.keys, *(["--resume"] if self.driver else [])]
        with (self.folder / "driver.log").open("a") as log:
            log.write(f"{time.time():.2f} starts, {self.done} kills so far, step {self.step}\n")
            log.flush()
            env = os.environ | {"TERM": "dumb", "TMPDIR": str(self.folder)}
            self.driver = subprocess.Popen(ask, cwd=self.folder, stdout=log, stderr=log, text=True, env=env)
        self.changed, self.without_ray = time.monotonic(), False

    def attend(self) -> bool:
        """Look after the driver, and start another in place of one that was ended; False once the run is over."""
        assert self.driver
        if (status := self.driver.poll()) is not None:
            said = (self.folder / "driver.log").read_text().rpartition(" starts, ")[2]
            if status == 0:
                return False
            why = "killed" if status == -9 else "said how to go on" if RESUMABLE in said else "ended by Ray"
            if why == "ended by Ray" and not self.without_ray:
                raise AssertionError(f"the driver ended with status {status}:\n{said}")
            self.ends[why] += 1
            self.start()
        if (step := self.seen()) > self.step:
            self.step, self.changed = step, time.monotonic()
        if time.monotonic() - self.changed > STUCK_S:
            raise AssertionError(f"nothing came of {STUCK_S:g} s after step {self.step}: {self.processes()}")
        return True

    def seen(self) -> int:
        """The last step that was told of."""
        path = self.run / "metrics.jsonl"
        return max((row["step"] for row in rows(path)), default=0) if path.exists() else 0

    def processes(self) -> dict[str, list[int]]:
        assert self.driver
        return victims.processes(self.folder, self.driver.pid)

    def wait(self, kill: Kill) -> None:
        """Until the kill is due."""
        while self.step < kill.step:
            assert self.attend(), f"the run was over after {self.done} of {len(self.kills)} kills; give it more steps"
            time.sleep(LOOK_S)
        time.sleep(kill.after_s)

    def strike(self, kill: Kill) -> None:
        """End a process of that kind; one that is just being started is waited for."""
        while not (hit := self.hit(kill)):
            assert self.attend(), f"the run was over after {self.done} of {len(self.kills)} kills; give it more steps"
            time.sleep(LOOK_S)
        self.done, self.changed = self.done + 1, time.monotonic()
        self.without_ray |= kill.kind == "ray"
        with (self.run / "kills.jsonl").open("a") as file:
            file.write(json.dumps(asdict(kill) | {"at": time.time(), "at_step": self.seen(), "hit": hit}) + "\n")

    def hit(self, kill: Kill) -> list[str]:
        found = self.processes()
        pids = found.get(kill.kind, [])
        if kill.kind in ("ray", "everything") and not {"driver", "trainer"} <= found.keys():
            return []  # a Ray that dies while it starts is waited for by its own library, for half a minute
        if kill.kind == "everything":
            pids = sum(found.values(), [])
            return [name for pid in (*pids, *sum(self.processes().values(), [])) if (name := victims.kill(pid))]
        return [name] if pids and (name := victims.kill(pids[int(kill.pick * len(pids))])) else []

    def end(self) -> None:
        """Leave no process of the run behind, however the test went."""
        assert self.driver
        if self.driver.poll() is None:
            self.driver.kill()
        self.driver.wait()

    def left(self) -> dict[str, list[int]]:
        """Processes that are there although the run is over, after a moment to go."""
        deadline = time.monotonic() + GONE_S
        while (found := self.processes()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return found


def rows(path: Path) -> Iterator[dict]:
    """Whole lines; the last one may be being written."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
