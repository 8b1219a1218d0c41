"""What is wrong with the files, row by row, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...types import Refused
from .order import held_out_count
from .rows import Rows, open_rows

if TYPE_CHECKING:
    from ...config import RunConfig
    from ...types import Complain
    from . import Data

MOST = 5  # complaints about the rows of one file; a wrong column is wrong in every row


def check(config: Data.Config, run: RunConfig, complain: Complain) -> None:
    """Look at every row that the run may use, and complain of each that it could not."""
    if config.train is None:
        if run.use.get("prompts", "data") == "data" and not run.plugins and not config.eval:
            from . import NO_PROMPTS

            complain("data.train", NO_PROMPTS)
        return
    if config.eval and config.held_out:
        complain("data.held_out", "has no effect beside data.eval; remove one")
    if config.system is not None and not config.chat_template:
        complain("data.system", "is a chat message, and needs data.chat_template = true")
    if run.eval.every and not config.eval and not config.held_out and run.use.get("prompts", "data") == "data":
        complain("eval.every", "there is no held-out split; set data.eval or data.held_out")
    measure = _measure(config, run, complain)
    for key, path in (("data.train", config.train), ("data.eval", config.eval)):
        if path is None:
            continue
        try:
            rows = open_rows(path)
        except Refused as error:
            complain(key, str(error))
            continue
        if not len(rows):
            complain(key, f"{path}: the file has no rows")
            continue
        for n, message in enumerate(_faults(rows, config, run, measure)):
            if n == MOST:
                complain(key, f"{path}: and more like these")
                break
            complain(key, message)
        if key == "data.train" and (held := held_out_count(len(rows), config.held_out)) >= len(rows):
            complain("data.held_out", f"holds out {held} of {len(rows)} rows, which leaves none to train on")


def _faults(rows: Rows, config: Data.Config, run: RunConfig, measure: _Measure | None) -> Iterator[str]:
    for i, row in enumerate(rows.scan()):
        if isinstance(row, Refused):
            yield str(row)
        elif config.prompt not in row:
            yield f"{rows.where(i)}: no column {config.prompt!r}; the row has {', '.join(map(repr, row)) or 'none'}"
        elif fault := _fault(row[config.prompt], config):
            yield f"{rows.where(i)}: {config.prompt}: {fault}"
        elif measure and (length := measure(row[config.prompt])) + run.rollout.max_tokens > measure.context:
            yield (
                f"{rows.where(i)}: a prompt of {length} tokens and rollout.max_tokens = {run.rollout.max_tokens} "
                f"exceed the model's context of {measure.context}"
            )


def _fault(prompt: Any, config: Data.Config) -> str | None:
    if isinstance(prompt, str):
        return None if prompt else "is empty"
    if not isinstance(prompt, list):
        return f"must be text or a list of messages, this is {type(prompt).__name__}"
    if not config.chat_template:
        return "is a list of messages, which needs data.chat_template = true"
    if not prompt or any(not isinstance(m, dict) or not {"role", "content"} <= m.keys() for m in prompt):
        return 'must be messages such as {"role": "user", "content": "..."}'
    return None


class _Measure:
    """Prompts in tokens, as a rollout would see them."""

    def __init__(self, length: Callable[[Any], int], context: int) -> None:
        self._length, self.context = length, context

    def __call__(self, prompt: Any) -> int:
        return self._length(prompt)


def _measure(config: Data.Config, run: RunConfig, complain: Complain) -> _Measure | None:
    """None where the model folder itself is at fault; the part that owns it says so."""
    folder = run.model.path
    try:
        limit = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    except (OSError, ValueError):
        return None
    if not (folder / "tokenizer.json").is_file():
        complain("model.path", f"{folder} has no tokenizer.json; save the tokenizer beside the weights")
        return None
    context = run.model.context or limit
    if context is None:
        complain("model.context", "the model's config.json does not say; set it")
        return None
    if limit is not None and context > limit:
        complain("model.context", f"{context} is more than the {limit} tokens that the model was made for")
    return _Measure(_lengths(folder, config), context)


def _lengths(folder: Path, config: Data.Config) -> Callable[[Any], int]:
    if not config.chat_template:  # the tokenizer alone, which loads in a fraction of the time
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda prompt: len(tokenizer.encode(prompt).ids)
    from .rollout import load_tokenizer, tokenize

    whole = load_tokenizer(folder)
    before = [] if config.system is None else [{"role": "system", "content": config.system}]

    def length(prompt: Any) -> int:
        return len(
            tokenize(whole, before + ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt))
        )

    return length
