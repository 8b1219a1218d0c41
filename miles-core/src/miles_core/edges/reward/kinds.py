"""The kinds of reward, and what each is worth. Pure functions of one sample, and light to import."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...config import Location, Table
from ...types import Sample

Fault = tuple[str, str]  # key, what is wrong with it
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)(?:\.\d+)?(?:[eE][-+]?\d+)?")


class Base(Table):
    weight: float = 1.0
    budget_s: float = Field(10.0, gt=0)  # of wall time, for one sample
    on_error: Literal["stop", "fail"] = "stop"
    failure_value: float = 0.0
    answer: str = "answer"  # the column that holds what is right

    def fault(self) -> Fault | None:
        """What a check can find without running anything."""
        return None

    def label(self, sample: Sample) -> str:
        if self.answer not in sample.info:
            raise KeyError(f"the row has no column {self.answer!r}")
        return str(sample.info[self.answer])


class ExactMatch(Base):
    """1 where the response is the answer, else 0."""

    kind: Literal["exact_match"]
    strip: bool = True  # ignore white space around both
    casefold: bool = False

    def __call__(self, sample: Sample) -> float:
        pair = [self._plain(sample.response), self._plain(self.label(sample))]
        return float(pair[0] == pair[1])

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.casefold else text


class Positions(Base):
    """The share of positions that hold the answer's character: a reward for the first steps of learning."""

    kind: Literal["positions"]

    def __call__(self, sample: Sample) -> float:
        said, right = sample.response, self.label(sample)
        return sum(a == b for a, b in zip(said, right, strict=False)) / max(len(said), len(right), 1)


class Numeric(Base):
    """1 where the last number in the response is the answer, to within ``tolerance``, else 0."""

    kind: Literal["numeric"]
    tolerance: float = Field(0.0, ge=0)

    def __call__(self, sample: Sample) -> float:
        right = float(self.label(sample).replace(",", ""))
        found = NUMBER.findall(sample.response)
        return float(bool(found) and abs(float(found[-1].replace(",", "")) - right) <= self.tolerance)


class Math(Base):
    """1 where math-verify finds response and answer mathematically equal, else 0."""

    kind: Literal["math"]

    def __call__(self, sample: Sample) -> float:
        from math_verify import parse, verify

        # Its own time limits use the same alarm as ours, and have to be off.
        said = parse(sample.response, parsing_timeout=None)
        return float(verify(parse(self.label(sample), parsing_timeout=None), said, timeout_seconds=None))

    def fault(self) -> Fault | None:
        return None if find_spec("math_verify") else ("kind", "needs the package math-verify; pip install math-verify")


class Regex(Base):
    """1 where the pattern is found in the response, or matches all of it, else 0."""

    kind: Literal["regex"]
    pattern: str
    full: bool = False

    def __call__(self, sample: Sample) -> float:
        find = re.fullmatch if self.full else re.search
        return float(find(self.pattern, sample.response) is not None)

    def fault(self) -> Fault | None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            return "pattern", f"not a regular expression: {error}"
        return None


class LengthPenalty(Base):
    """Soft overlong punishment, from 0 down to -1: Yu et al. 2025, arXiv:2503.14476, eq. 13.

    With L the tokens of the response, M = rollout.max_tokens, B = buffer: 0 while L <= M - B, then (M - B - L) / B.
    """

    kind: Literal["length_penalty"]
    buffer: int = Field(gt=0)

    def worth(self, length: int, most: int) -> float:
        return max(min((most - self.buffer - length) / self.buffer, 0.0), -1.0)


class Http(Base):
    """What a remote scorer says: POST {"prompt", "response", "answer", "info"}, answered by {"reward": number}."""

    kind: Literal["http"]
    url: str
    retries: int = Field(3, ge=0)  # after a failed connection, a 429 or a 5xx; each waits twice as long
    concurrency: int = Field(32, gt=0)

    def fault(self) -> Fault | None:
        return None if re.match(r"https?://[^/]", self.url) else ("url", f"{self.url!r} is no http address")


class Function(Base):
    """A function of yours, in a file: ``f(sample) -> number``, or ``f(group) -> numbers`` if so its argument is named.

    The file must be readable where rollout workers run.
    """

    kind: Literal["python"]
    path: Location  # "./file.py:function"

    @property
    def file_and_name(self) -> tuple[Path, str]:
        file, _, name = str(self.path).rpartition(":")
        return Path(file), name

    def fault(self) -> Fault | None:
        file, name = self.file_and_name
        if not name.isidentifier() or file.suffix != ".py":
            return "path", f'{self.path} does not name a function; write "./file.py:function"'
        try:
            tree = ast.parse(file.read_text())
        except OSError as error:
            return "path", f"{file}: {error.strerror}"
        except SyntaxError as error:
            return "path", f"{file}:{error.lineno}: {error.msg}"
        if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
            return "path", f"{file} defines no function {name!r}"
        return None

    def load(self) -> Callable[..., Any]:
        file, name = self.file_and_name
        scope: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
        exec(compile(file.read_text(), str(file), "exec"), scope)
        function: Callable[..., Any] = scope[name]
        return function


Scorer = Annotated[
    ExactMatch | Positions | Numeric | Math | Regex | LengthPenalty | Http | Function, Field(discriminator="kind")
]
KINDS = ("exact_match", "positions", "numeric", "math", "regex", "length_penalty", "http", "python")
