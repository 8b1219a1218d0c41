"""Stands between an engine and its server, so that no server outlives its engine.

Started as a process of its own, in a session of its own, with the server's command line as arguments. Standard input
is a pipe from the engine: its end is the end of the engine however that came, and then everything in the session's
process group is killed: the server, its schedulers, whatever those started. The same is done when the server itself
ends, since a scheduler that stays behind keeps its GPU memory.

Two processes see to it, because Ray kills the children of a process that it ends, and only those: the one that the
engine started waits for the server, and a child of it for the engine.

Run as a plain file: it imports nothing but the standard library, and is up in a hundredth of a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def end() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)  # this process is one of the group


def wait_for_engine() -> None:
    while os.read(0, 1):
        pass
    end()


def main(command: list[str]) -> None:
    if not os.fork():
        wait_for_engine()
    try:
        status = subprocess.Popen(command, stdin=subprocess.DEVNULL).wait()
        print(f"the server ended with status {status}", flush=True)
    except OSError as error:
        print(f"the server cannot be started: {command[0]}: {error.strerror}", flush=True)
    end()


if __name__ == "__main__":
    main(sys.argv[1:])
