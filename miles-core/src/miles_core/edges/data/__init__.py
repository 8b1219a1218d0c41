"""Prompts from files, and the default rollout: one completion of each, tokens in and tokens out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...config import Location
from ...hookspecs import hookimpl
from ...plugins import Plugin
from ...types import Refused, Sample

if TYPE_CHECKING:
    from ...types import Complain, Group
    from ..protocols import Engine

NO_PROMPTS = "no prompts: set data.train, or name a plugin that answers miles_prompts"


class Data(Plugin):
    class Config(Plugin.Config):
        train: Location | None = None  # .jsonl or .parquet, one prompt a row
        eval: Location | None = None  # the held-out split
        held_out: float = Field(0.0, ge=0)  # rows of train to hold out where eval is left out: a share, or a number
        prompt: str = "prompt"  # the column: text, or a list of chat messages
        chat_template: bool = False  # put text into the tokenizer's template too, as one message of the user
        system: str | None = None  # a system message before every prompt; needs a template
        shuffle: bool = True  # every epoch in an order of its own, given by the run's seed

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        from .check import check

        check(self.config, self.run, complain)

    @hookimpl
    def miles_prompts(self, split: str, start: int) -> Iterator[Sample]:
        from .order import endless
        from .order import split as parts
        from .rows import open_rows

        if self.config.train is None:
            raise Refused(NO_PROMPTS)
        rows = open_rows(self.config.eval if split == "eval" and self.config.eval else self.config.train)
        if split == "eval" and self.config.eval:
            indices: Iterator[int] = iter(range(start, len(rows)))
        else:
            held = 0.0 if self.config.eval else self.config.held_out
            train, rest = parts(len(rows), held, self.run.seed)
            indices = (
                iter(rest[start:]) if split == "eval" else endless(train, self.run.seed, self.config.shuffle, start)
            )
        return (self._sample(rows[int(i)]) for i in indices)

    def _sample(self, row: dict[str, Any]) -> Sample:
        prompt = row.pop(self.config.prompt)
        if self.config.chat_template and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if self.config.system is not None:
            prompt = [{"role": "system", "content": self.config.system}, *prompt]
        return Sample(prompt=prompt, info=row)

    @hookimpl
    def miles_rollout_start(self) -> None:
        from .rollout import SingleTurn

        self._single_turn = SingleTurn(self.run)

    @hookimpl
    async def miles_rollout(self, group: Group, engine: Engine, evaluating: bool) -> Group:
        return await self._single_turn.roll(group, engine, evaluating)
