"""A rollout of several turns with a tool: copy it, name another ``command``, change what is rewarded.

    prompt                 4719-3058=
    the policy writes      <call>4719-3058</call>      trained on
    the tool answers       <result>1661</result>       masked out
    the policy writes      1661<eos>                   trained on

Name it in a run with ``plugins = ["./calculator.py"]``. It needs a tokenizer in which ``opens`` and ``closes`` are one
token each. ``rollout.max_tokens`` bounds all that follows the prompt, the tool's tokens included.

Nothing is encoded twice: what the engine sampled is kept as ids, and the next turn's request is those very ids with the
tool's behind them, so an engine with a prefix cache reads only what is new. A group costs one ``engine.generate`` a
turn, however many attempts it has.

**Rewards of turns.** ``call`` is earned by the first call that was answered, not by each, or calling would pay better
than answering; ``answer`` by a last turn that says what the row's ``answer`` says. An algorithm such as GRPO reads only
their sum, the sample's reward. One that gives credit to turns has two sources:

- ``sample.info["turns"]``, in the driver, where ``miles_score`` can compare the attempts of a group: one dict a turn,
  with ``start`` and ``end`` (the policy wrote ``sample.tokens[start:end]``), ``call``, ``result`` and ``rewards`` by
  name. It may fill ``sample.columns`` from them, and declare what it fills in ``miles_columns``.
- ``batch.columns["turn_reward"]`` [T], in the trainer, for ``miles_advantage``: what a turn earned stands at its last
  token, and 0 everywhere else. What is still to come at each token, which less a baseline is an advantage::

      earned = batch.columns["turn_reward"]
      before = earned.cumsum(0) - earned  # over the whole row
      before = before - before[batch.starts[batch.seq].long()]  # within the token's own sequence
      to_come = batch.per_token(batch.by_seq(earned)) - before

**The tool** reads a line a call and answers with a line, which is told to the policy; one that begins with ``error``
earns nothing. A tool that is late, prints more than ``output_bytes`` or dies is ended with its process group, and the
policy is told what it said so far, or why it said nothing. ``fault`` in the sample's turn says what happened, and the
run goes on. A tool has bounded memory and time, no environment but PATH, and cannot write to files. That keeps out
accidents, not attackers: for code that nobody has looked at, let ``command`` start a container.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_core import Plugin, hookimpl
from miles_core.edges.protocols import Completion, Request, Sampling
from miles_core.tokens import load_tokenizer, stop_tokens, tokenize
from miles_core.types import Column, Complain, Group, Refused, Sample
from pydantic import Field
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from miles_core.config import RunConfig
    from miles_core.edges.protocols import Engine

# Runs in a child, then becomes the tool: limits set by the parent would come too late, or in a thread that must not.
LAUNCH = """
import ctypes, os, resource, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a tool that hangs would not see its parent go
if os.getppid() != int(sys.argv[2]): sys.exit()  # it went already
for ignored in (signal.SIGPIPE, signal.SIGXFSZ): signal.signal(ignored, signal.SIG_DFL)  # by Python, not by the tool
for limit, value in ((resource.RLIMIT_AS, int(sys.argv[1])), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
os.execvp(sys.argv[3], sys.argv[3:])
"""

CALCULATOR = [sys.executable, "-I", "-S", str(Path(__file__).with_name("tool.py").absolute())]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a tool said, or what the policy is told in its place; ``fault`` is why its process was ended, or None."""

    text: str
    fault: str | None = None
    gone: bool = False  # it ended without a word


class Tool:
    """One process, which answers calls one after another until it is at fault."""

    def __init__(self, command: list[str], memory_mib: int) -> None:
        self.calls = 0
        self._socket, theirs = socket.socketpair()  # both ways, read by the byte: nothing piles up on this side
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCH, str(memory_mib * 2**20), str(os.getpid()), *command],
                stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL,
                cwd="/", env={"PATH": os.environ.get("PATH", os.defpath)}, start_new_session=True,
            )  # fmt: skip
        self._socket.setblocking(False)

    @property
    def idle(self) -> bool:
        """It is there and says nothing: what it said unasked would be taken for its next answer."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
            return False
        except OSError as error:
            return isinstance(error, BlockingIOError)

    async def ask(self, call: str, wall_s: float, cpu_s: int, most: int) -> Answer:
        """One line of at most ``most`` bytes. Raises nothing for what the tool does."""
        self.calls += 1
        try:
            async with asyncio.timeout(wall_s):
                if not (said := await self._exchange(call, cpu_s, most)):
                    ending = await asyncio.to_thread(self._ending)
                    return Answer(f"error: {ending}", ending, gone=True)
        except TimeoutError:
            return Answer(f"error: no answer in {wall_s:g} s", f"no answer in {wall_s:g} s")
        line, _, more = said.partition(b"\n")
        fault = f"more than {most} bytes" if len(line) > most else "more than one line" if more else None
        return Answer(line[:most].decode(errors="replace"), fault)

    async def _exchange(self, call: str, cpu_s: int, most: int) -> bytes:
        """A line and its end, or as many bytes as say that it is too long; nothing when the tool hung up."""
        loop, said = asyncio.get_running_loop(), b""
        try:
            self._allow(cpu_s)
            await loop.sock_sendall(self._socket, " ".join(call.split()).encode(errors="replace") + b"\n")
            while b"\n" not in said and len(said) <= most:
                if not (chunk := await loop.sock_recv(self._socket, most + 1 - len(said))):
                    return b""
                said += chunk
        except OSError:
            return b""
        return said

    def _allow(self, cpu_s: int) -> None:
        """CPU time for one more call, beside what it has used. Raises OSError when the process is gone."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        hard = resource.prlimit(self._process.pid, resource.RLIMIT_CPU)[1]
        soft = ceil(used) + cpu_s
        resource.prlimit(self._process.pid, resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))

    def _ending(self) -> str:
        """Wait for its end, and say how it ended. Its process id stays taken, for ``end``."""
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None  # it waited
        if ended.si_code == os.CLD_EXITED:
            return f"exited with status {ended.si_status}"
        return "too much CPU time" if ended.si_status == signal.SIGXCPU else f"ended by signal {ended.si_status}"

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()


class Tools:
    """At most ``processes`` of them, each started when it is first needed. Use it in one event loop."""

    def __init__(self, config: Calculator.Config) -> None:
        self._config, self._free, self._room = config, list[Tool](), asyncio.Semaphore(config.processes)

    async def ask(self, call: str) -> Answer:
        """Asked again where a process that had answered others was gone. Raises OSError when none can be started."""
        config = self._config
        async with self._room:
            while True:
                if self._free and not self._free[-1].idle:
                    self._free.pop().end()
                tool = self._free.pop() if self._free else Tool(config.command or CALCULATOR, config.memory_mib)
                try:
                    answer = await tool.ask(call, config.wall_s, config.cpu_s, config.output_bytes)
                except BaseException:  # cancelled: the next call must not get this one's answer
                    tool.end()
                    raise
                if answer.fault or tool.calls >= config.calls_per_process:
                    tool.end()
                else:
                    self._free.append(tool)
                if not answer.gone or tool.calls == 1:
                    return answer


class Calculator(Plugin):
    class Config(Plugin.Config):
        turns: int = Field(3, gt=1)  # most that the policy takes; a call in the last one is not answered
        opens: str = "<call>"  # a token, then what is sent to the tool
        closes: str = "</call>"  # the token that ends a call, and the turn
        before: str = "<result>"  # text around the tool's answer, such as a chat template's markup of a tool's turn
        after: str = "</result>"
        command: list[str] = []  # the tool: on PATH or an absolute path, then arguments; the calculator when left out
        processes: int = Field(2, gt=0)  # of one rollout worker
        calls_per_process: int = Field(1000, gt=0)  # then a fresh one takes over; 1 lets no call see another's traces
        wall_s: float = Field(5.0, gt=0)  # of one call; the rest of its group waits for it
        cpu_s: int = Field(2, gt=0)  # of one call, to the second
        memory_mib: int = Field(256, gt=0)  # of address space
        output_bytes: int = Field(1000, gt=0)  # of one answer
        result_tokens: int = Field(32, gt=0)  # of one answer, markup aside; what is beyond is cut
        column: str = "answer"  # of the data: what the last turn must say
        call: float = 0.1  # reward of a sample in which a call was answered
        answer: float = 1.0  # reward of a right answer

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        config, run = self.config, self.run
        if config.result_tokens + 4 > (most := run.rollout.max_tokens):  # a call, its two ends, and one to go on with
            complain("calculator.result_tokens", f"leaves no room for a call in rollout.max_tokens = {most}")
        if lacking := lacks(config.command):
            complain("calculator.command", lacking)
        path = run.model.path / "tokenizer.json"
        known = Tokenizer.from_file(str(path)) if path.is_file() else None
        for key, token in {"opens": config.opens, "closes": config.closes}.items():
            if known and known.token_to_id(token) is None:
                complain(f"calculator.{key}", f"{token!r} is not one token of {path}")

    @hookimpl
    def miles_columns(self) -> dict[str, Column]:
        return {"turn_reward": Column()}

    @hookimpl
    def miles_metrics(self, step: int, groups: list[Group], evaluating: bool) -> dict[str, float]:
        """A sample's turns, calls, calls that were answered by an error, and calls at which the tool was at fault."""
        samples = [sample for group in groups for sample in group.samples]
        turns = [turn for sample in samples for turn in sample.info["turns"]]
        called = [turn for turn in turns if turn["result"] is not None]
        faults = sum(turn["fault"] is not None for turn in called)
        errors = sum(not turn["good"] for turn in called) - faults
        counts = {"turns": len(turns), "calls": len(called), "errors": errors, "faults": faults}
        prefix = "eval/" if evaluating else ""
        return {f"{prefix}calculator/{name}": count / len(samples) for name, count in counts.items()}

    @hookimpl
    def miles_rollout_start(self) -> None:
        """Raises Refused where this machine lacks the tool."""
        if lacking := lacks(self.config.command):
            raise Refused(f"calculator.command: {lacking}")
        self._turns, self._tools = Turns(self.config, self.run), Tools(self.config)

    @hookimpl
    async def miles_rollout(self, group: Group, engine: Engine, evaluating: bool) -> Group:
        """One ``generate`` a turn for all attempts that still go on, then their calls side by side."""
        self._turns.begin(group)
        going, left = group.samples, self.config.turns
        while going:
            left -= 1
            completions = await engine.generate([self._turns.request(sample, evaluating) for sample in going])
            turns = (self._turn(*each, left) for each in zip(going, completions, strict=True))
            going = [sample for sample, on in zip(going, await asyncio.gather(*turns), strict=True) if on]
        for sample in group.samples:
            self._turns.finish(sample)
        return group

    async def _turn(self, sample: Sample, completion: Completion, left: int) -> bool:
        """Append what the policy wrote and have its call answered, if that leads to another turn; whether it does."""
        with naming(sample):
            if not self._turns.add(sample, completion) or not left:
                return False
            call = sample.info["turns"][-1]["call"]
            answer = Answer(f"error: no {self.config.opens}") if call is None else await self._tools.ask(call)
            return self._turns.add_result(sample, answer)

    @hookimpl
    async def miles_reward(self, group: Group, evaluating: bool) -> dict[str, list[float]]:
        for sample in group.samples:
            with naming(sample):
                reward_turns(sample, self.config)
        of = [sample.info["turns"] for sample in group.samples]
        return {name: [sum(t["rewards"].get(name, 0.0) for t in turns) for turns in of] for name in ("call", "answer")}


class Turns:
    """How turns become tokens. Holds the tokenizer; one a process."""

    def __init__(self, config: Calculator.Config, run: RunConfig) -> None:
        self._config, self._most = config, run.rollout.max_tokens
        self._tokenizer = load_tokenizer(run.model.path)
        vocabulary = self._tokenizer.get_vocab()
        self._opens, self._closes = vocabulary[config.opens], vocabulary[config.closes]
        self._before, self._after = self._encode(config.before), self._encode(config.after)
        draw, stops = run.rollout, stop_tokens(self._tokenizer, run.model.path, run.rollout.stop_tokens)
        self._ends, stops = set(stops) - {self._closes}, (*stops, self._closes)
        self._sampling = {
            False: Sampling(draw.max_tokens, draw.temperature, draw.top_p, draw.top_k, stops),
            True: Sampling(draw.max_tokens, run.eval.temperature, stop_tokens=stops),
        }

    def begin(self, group: Group) -> None:
        """Every attempt is its prompt, encoded once."""
        given, text = group.samples[0].tokens, group.samples[0].prompt
        tokens = given or tokenize(self._tokenizer, text)
        for sample in group.samples:
            sample.info["turns"], sample.tokens, sample.mask, sample.logprobs, sample.versions = [], [], [], [], []
            self._put(sample, tokens)

    def request(self, sample: Sample, evaluating: bool) -> Request:
        """All so far, for as many tokens as are left. A turn of its own seed: the last one's would draw it again."""
        turn = len(sample.info["turns"])
        seed = int.from_bytes(hashlib.blake2b(f"{sample.seed}/{turn}".encode(), digest_size=7).digest())
        sampling = replace(self._sampling[evaluating], max_tokens=self._room(sample))
        return Request(f"{sample.id}/{turn}", sample.tokens[:], sampling, seed)

    def add(self, sample: Sample, completion: Completion) -> bool:
        """Append what the policy wrote; whether that is a call."""
        written, start = completion.tokens, len(sample.tokens)
        sample.tokens += written
        sample.mask += [True] * len(written)
        sample.logprobs += completion.logprobs
        sample.versions += completion.versions
        calling = written[-1:] == [self._closes]
        call = None
        if calling and self._opens in written:
            opened = len(written) - written[::-1].index(self._opens)
            call = self._tokenizer.decode(written[opened:-1], skip_special_tokens=True)
        turn = {"start": start, "end": len(sample.tokens), "text": self._text(written), "call": call}
        sample.info["turns"].append(turn | {"result": None, "good": False, "fault": None, "rewards": {}})
        sample.finish = "length" if calling else completion.finish  # a call that stays the last was cut by a bound
        return calling

    def add_result(self, sample: Sample, answer: Answer) -> bool:
        """Append the tool's answer; whether that leaves room for more. It is text, whatever markup it imitates."""
        good = not answer.fault and not answer.text.startswith("error")
        sample.info["turns"][-1] |= {"result": answer.text, "good": good, "fault": answer.fault}
        said = self._encode(answer.text, split_special_tokens=True)[: self._config.result_tokens]
        result = self._before + said + self._after
        if len(result) >= self._room(sample):
            return False
        self._put(sample, result)
        return True

    def finish(self, sample: Sample) -> None:
        """The response in one piece, markup and results included."""
        sample.response = self._text(sample.tokens[sample.info["turns"][0]["start"] :])

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in self._ends else tokens))

    def _room(self, sample: Sample) -> int:
        return self._most - len(sample.tokens) + next((t["start"] for t in sample.info["turns"]), len(sample.tokens))

    def _put(self, sample: Sample, tokens: list[int]) -> None:
        """Append what the policy did not write."""
        sample.tokens += tokens
        sample.mask += [False] * len(tokens)
        sample.logprobs += [0.0] * len(tokens)
        sample.versions += [-1] * len(tokens)

    def _encode(self, text: str, **options: Any) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, **options))


def lacks(command: list[str]) -> str | None:
    """Why the tool cannot be started on this machine, or None."""
    if command:
        return None if shutil.which(command[0]) else f"{command[0]!r} is not a program; name one on PATH, or in full"
    return None if Path(CALCULATOR[-1]).is_file() else f"there is no {CALCULATOR[-1]}; put it there, or name a tool"


def reward_turns(sample: Sample, config: Calculator.Config) -> None:
    """Note what each turn earned, in ``info`` and at its last token. Raises LookupError for a row without an answer."""
    if config.column not in sample.info:
        raise LookupError(f"the row has no column {config.column!r}, which calculator.column names")
    turns = sample.info["turns"]
    if answered := next((turn for turn in turns if turn["good"]), None):
        answered["rewards"]["call"] = config.call
    if (last := turns[-1])["text"].strip() == str(sample.info[config.column]):
        last["rewards"]["answer"] = config.answer
    sample.columns["turn_reward"] = [0.0] * len(sample.tokens)
    for turn in turns:
        if turn["end"] > turn["start"]:  # else it was aborted before its first token
            sample.columns["turn_reward"][turn["end"] - 1] = sum(turn["rewards"].values())


@contextlib.contextmanager
def naming(sample: Sample) -> Iterator[None]:
    """Say which sample it was that an exception is about."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"sample {sample.id}: {type(error).__name__}: {error}") from error
