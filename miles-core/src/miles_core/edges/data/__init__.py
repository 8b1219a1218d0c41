"""Prompts from files, and the default rollout: one completion of each, tokens in and tokens out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ...config import Location, RunConfig
from ...hookspecs import hookimpl
from ...plugins import Plugin
from ...types import Refused, Sample

if TYPE_CHECKING:
    from ...types import Complain, Group
    from ..protocols import Engine
    from .given import Given
    from .rollout import SingleTurn
    from .rows import Rows

NO_PROMPTS = "no prompts: set data.train, or name a plugin that answers miles_prompts"


class Data(Plugin):
    class Config(Plugin.Config):
        train: Location | None = None  # .jsonl or .parquet, one prompt a row
        eval: Location | None = None  # the held-out split
        held_out: float = Field(0.0, ge=0)  # rows of train to hold out where eval is left out: a share, or a number
        prompt: str = "prompt"  # the column: text, or a list of chat messages for the tokenizer's template
        chat_template: bool = False  # put text into the template too, as one message of the user
        system: str | None = None  # a system message before every prompt that has none of its own
        responses: list[str] = []  # columns that hold responses to train on: one a sample of a group, none is sampled
        shuffle: bool = True  # every epoch in an order of its own, given by the run's seed

        @field_validator("held_out")
        @classmethod
        def _whole_beyond_one(cls, held_out: float) -> float:
            if held_out > 1 and held_out != round(held_out):
                raise ValueError("is a share below 1, or a whole number of rows")
            return held_out

    config: Config
    _single_turn: SingleTurn
    _given: Given

    def __init__(self, config: Config, run: RunConfig) -> None:
        super().__init__(config, run)
        self._open: dict[Path, Rows] = {}  # an index is made once, not at every evaluation

    @hookimpl
    def miles_check(self, complain: Complain, tables: dict[str, Any]) -> None:
        from .check import check

        wanted: dict[str, str] = tables["reward"].columns if "reward" in tables else {}
        check(self.config, self.run, wanted, complain)

    @hookimpl
    def miles_prompts(self, split: str, start: int) -> Iterator[Sample]:
        """Raises Refused, also while it is turned, where a file is not what the check has seen."""
        from .order import endless
        from .order import split as parts

        if self.config.train is None:
            raise Refused(NO_PROMPTS)
        if split == "eval" and self.config.eval:
            rows = self._rows(self.config.eval)
            return (self._sample(rows, i) for i in range(start, len(rows)))
        rows = self._rows(self.config.train)
        train, held = parts(len(rows), 0.0 if self.config.eval else self.config.held_out, self.run.seed)
        if split == "eval":
            return (self._sample(rows, int(i)) for i in held[start:])
        if not len(train):
            raise Refused(f"{self.config.train}: no rows to train on")
        return (self._sample(rows, i) for i in endless(train, self.run.seed, self.config.shuffle, start))

    def _rows(self, path: Path) -> Rows:
        from .rows import open_rows

        if path not in self._open:
            self._open[path] = open_rows(path)
        return self._open[path]

    def _sample(self, rows: Rows, i: int) -> Sample:
        from .prompt import PromptError, prompt_of

        row = rows[i]
        try:
            prompt = prompt_of(row, self.config)
        except PromptError as error:
            raise Refused(f"{rows.where(i)}: {error}") from None
        del row[self.config.prompt]
        return Sample(prompt=prompt, info=row)

    @hookimpl
    def miles_rollout_start(self) -> None:
        from .given import Given
        from .rollout import SingleTurn

        if self.config.responses:
            self._given = Given(self.run, self.config.responses)
        if self.run.placement.engines:
            self._single_turn = SingleTurn(self.run)

    @hookimpl
    async def miles_rollout(self, group: Group, engine: Engine, evaluating: bool) -> Group:
        if self.config.responses and not (evaluating and self.run.placement.engines):
            return self._given.fill(group)
        return await self._single_turn.roll(group, engine, evaluating)
