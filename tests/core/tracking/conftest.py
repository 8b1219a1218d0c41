import os

import pytest
from miles_core.config import RunConfig
from miles_core.edges.tracking import Tracking
from miles_core.types import Group, Sample


@pytest.fixture
def make_run():
    def make(**keys):
        return RunConfig.model_validate({"algorithm": "grpo", "steps": 4, "model": {"path": "m"}} | keys)

    return make


@pytest.fixture
def tracking(make_run, tmp_path):
    """A tracker as the driver builds it, with its run folder, whose hooks were not called yet."""

    def make(console="plain", tensorboard=False, **keys):
        return Tracking(Tracking.Config(console=console, tensorboard=tensorboard), make_run(**keys))

    return make


@pytest.fixture
def evaluation():
    """Groups as an evaluation gives them: one sample each, judged 0 or 1."""

    def make(verdicts, prompt="12=", response="21"):
        groups = []
        for i, value in enumerate(verdicts):
            sample = Sample(prompt=prompt, response=response, id=f"{i}/0", rewards={"exact": value}, reward=value)
            groups.append(Group(i, [sample]))
        return groups

    return make


class Pty:
    """A real terminal: what is written to ``stream`` can be read back once that is closed."""

    def __init__(self):
        self.controller, worker = os.openpty()
        self.stream = os.fdopen(worker, "w")

    def drained(self):
        seen = b""
        while True:
            try:
                seen += os.read(self.controller, 4096)
            except OSError:  # how Linux says that the other end is closed and nothing is left
                os.close(self.controller)
                return seen.decode()


@pytest.fixture
def pty(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    return Pty()
