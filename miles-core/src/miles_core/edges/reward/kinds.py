"""The kinds of reward, and what each is worth. Pure functions of one sample, and light to import."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from dataclasses import fields
from decimal import Decimal
from functools import cache, lru_cache
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from ...config import Location, Table, suggest
from ...types import Sample

Fault = tuple[str, str]  # key, what is wrong with it
Outcome = tuple[float | None, str | None]  # the value, or why there is none

# A sign belongs to a number only where it cannot be a minus between two: "10-7" ends in 7. "1,234" is one number.
NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,4}(?!\d))?"
)


def outcome(value: Any) -> Outcome:
    """``value`` as what a scorer may give: a finite number."""
    if isinstance(value, Real) and math.isfinite(value):
        return float(value), None
    return None, f"gave {value!r}, which is not a finite number"


class Base(Table):
    weight: float = 1.0
    budget_s: float = Field(10.0, gt=0)  # of wall time, for one sample
    on_error: Literal["stop", "fail"] = "stop"  # end the run, or count a named failure and go on
    failure_value: float = 0.0  # unweighted
    answer: str = "answer"  # the column that holds what is right

    reads: ClassVar[tuple[str, ...]] = ("response",)  # of a sample, beside its answer
    needs_answer: ClassVar[bool] = False

    def fault(self) -> Fault | None:
        """What a check can find without running anything."""
        return None

    def view(self, sample: Sample) -> dict[str, Any]:
        """Fields of ``sample`` that have to cross to another process: token lists are long, most kinds read none."""
        info = {self.answer: sample.info[self.answer]} if self.answer in sample.info else {}
        return {"id": sample.id, "info": info} | {name: getattr(sample, name) for name in self.reads}

    def label(self, sample: Sample) -> str:
        """Raises LookupError when the row has none."""
        if self.answer not in sample.info:
            raise LookupError(f"the row has no column {self.answer!r}; name the one that holds the answer")
        return str(sample.info[self.answer])


class ExactMatch(Base):
    """1 where the response is the answer, else 0."""

    kind: Literal["exact_match"] = "exact_match"
    needs_answer = True
    strip: bool = True  # ignore white space around both
    casefold: bool = False  # ignore case

    def __call__(self, sample: Sample) -> float:
        return float(self._plain(sample.response) == self._plain(self.label(sample)))

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.casefold else text


class Positions(Base):
    """The share of positions that hold the answer's character: a reward for the first steps of learning."""

    kind: Literal["positions"] = "positions"
    needs_answer = True

    def __call__(self, sample: Sample) -> float:
        said, right = sample.response, self.label(sample)
        return sum(a == b for a, b in zip(said, right, strict=False)) / max(len(said), len(right), 1)


class Numeric(Base):
    """1 where the last number in the response is that in the answer, to within ``tolerance``, else 0."""

    kind: Literal["numeric"] = "numeric"
    needs_answer = True
    tolerance: float = Field(0.0, ge=0)  # absolute

    def __call__(self, sample: Sample) -> float:
        right, said = last_number(self.label(sample)), last_number(sample.response)
        if right is None:
            raise ValueError(f"the answer {self.label(sample)!r} holds no number")
        # Decimals are equal only where every digit is: a float would call neighbours above 2**53 the same.
        near = said is not None and math.isclose(said, right, rel_tol=0, abs_tol=self.tolerance)
        return float(said == right or (self.tolerance > 0 and near))


def last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


class Math(Base):
    """1 where math-verify finds response and answer mathematically equal, else 0."""

    kind: Literal["math"] = "math"
    needs_answer = True

    def __call__(self, sample: Sample) -> float:
        import math_verify

        right = parsed_answer(self.label(sample))
        if not right:
            raise ValueError(f"math-verify reads no expression in the answer {self.label(sample)!r}")
        # Its own time limits use the same alarm as ours, and have to be off.
        said = math_verify.parse(sample.response, parsing_timeout=None)
        return float(math_verify.verify(right, said, timeout_seconds=None))

    def fault(self) -> Fault | None:
        return None if find_spec("math_verify") else ("kind", "needs the package math-verify; pip install math-verify")


@lru_cache(1024)  # every attempt at a prompt has the same answer
def parsed_answer(text: str) -> Any:
    """What math-verify makes of an answer. It looks for formulas between dollars, so a bare one gets some."""
    import math_verify

    marked = "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text
    return math_verify.parse(text if marked else f"${text}$", parsing_timeout=None)


class Regex(Base):
    """1 where the pattern is found in the response, or matches all of it, else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str
    full: bool = False  # match the whole response

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

    kind: Literal["length_penalty"] = "length_penalty"
    buffer: int = Field(gt=0)  # tokens

    reads: ClassVar[tuple[str, ...]] = ("mask",)

    def worth(self, length: int, most: int) -> float:
        return max(min((most - self.buffer - length) / self.buffer, 0.0), -1.0)


class Http(Base):
    """What a remote scorer says: POST {"prompt", "response", "answer", "info"}, answered by {"reward": number}."""

    kind: Literal["http"] = "http"
    url: str
    budget_s: float = Field(60.0, gt=0)  # for one sample, waits between attempts included
    timeout_s: float = Field(10.0, gt=0)  # of one attempt
    retries: int = Field(3, ge=0)  # after a failed connection, a timeout, a 429 or a 5xx; each waits twice as long
    concurrency: int = Field(32, gt=0)  # requests at once, from one process

    def fault(self) -> Fault | None:
        return None if re.match(r"https?://[^/]", self.url) else ("url", f"{self.url!r} is no http address")


class Function(Base):
    """A function of yours, in a file: ``f(sample) -> number``, or ``f(group) -> numbers`` if so its argument is named.

    The file must be readable where rollout workers run.
    """

    kind: Literal["python"] = "python"
    path: Location  # "./file.py:function"

    @property
    def file_and_name(self) -> tuple[Path, str]:
        file, _, name = str(self.path).rpartition(":")
        return Path(file), name

    def view(self, sample: Sample) -> dict[str, Any]:
        return {field.name: getattr(sample, field.name) for field in fields(Sample)}

    def fault(self) -> Fault | None:
        file, name = self.file_and_name
        if not name.isidentifier() or file.suffix != ".py":
            return "path", f'{self.path} does not name a function; write "./file.py:function"'
        try:
            tree = ast.parse(file.read_bytes())
        except OSError as error:
            return "path", f"{file}: {error.strerror}"
        except SyntaxError as error:
            return "path", f"{file}:{error.lineno}: {error.msg}"
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        if name not in functions:
            return "path", f"{file} defines no function {name!r} with def{suggest(name, functions)}"
        given = functions[name].args
        if [arg.arg for arg in (*given.posonlyargs, *given.args)][:1] not in (["sample"], ["group"]):
            return "path", f"{file}:{functions[name].lineno}: {name} must take an argument named sample, or group"
        return None

    def load(self) -> Callable[..., Any]:
        file, name = self.file_and_name
        scope: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
        exec(compile(file.read_bytes(), str(file), "exec"), scope)
        function: Callable[..., Any] = scope[name]
        return function


@cache
def kinds() -> dict[str, type[Base]]:
    classes = (ExactMatch, Positions, Numeric, Math, Regex, LengthPenalty, Http, Function)
    return {cls.model_fields["kind"].default: cls for cls in classes}


def read(table: Any) -> Base:
    """A ``[reward.NAME]`` table as the kind it names, complaining of the keys as they were written."""
    if isinstance(table, Base):
        return table
    if not isinstance(table, dict):
        raise ValueError("must be a table, such as [reward.exact_match]")
    kind = table.get("kind")
    if kind not in kinds():
        what = f"no such kind of reward{suggest(str(kind), kinds()) or '; there are ' + ', '.join(kinds())}"
        raise _wrong({"kind": what}, {"kind": kind})
    cls = kinds()[kind]
    hints = {key: f"no such key for {kind}{suggest(key, cls.model_fields)}" for key in table.keys() - cls.model_fields}
    if hints:
        raise _wrong(hints, table)
    return cls.model_validate(table)


def _wrong(what: dict[str, str], table: dict[str, Any]) -> ValidationError:
    errors = [
        InitErrorDetails(type=PydanticCustomError("reward", "{what}", {"what": text}), loc=(key,), input=table[key])
        for key, text in what.items()
    ]
    return ValidationError.from_exception_data("reward", errors)


Scorer = Annotated[SerializeAsAny[Base], BeforeValidator(read)]
