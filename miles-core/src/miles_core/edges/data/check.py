"""What is wrong with the files, row by row, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...types import Refused
from . import NO_PROMPTS
from .given import answers
from .length import Ruler, TemplateRefused, find_template
from .order import held_out_count
from .prompt import PromptError, prompt_of
from .rows import Rows, open_rows

if TYPE_CHECKING:
    from ...config import RunConfig
    from ...types import Complain
    from . import Data

MOST = 5  # complaints about the rows of one file; a wrong column is wrong in every row


def check(config: Data.Config, run: RunConfig, wanted: dict[str, str], complain: Complain) -> None:
    """Look at every row that the run may use, and complain of each that it could not.

    ``wanted`` are the columns that rewards read, and the key that asks for each.
    """
    if run.use.get("prompts", "data") != "data":
        return
    if config.train is None:
        if "prompts" in run.use or config.eval or not run.plugins:  # a plugin may answer miles_prompts instead
            complain("data.train", NO_PROMPTS)
        return
    if config.eval and config.held_out:
        complain("data.held_out", "has no effect beside data.eval; remove one")
    if config.system is not None and not config.chat_template:
        complain("data.system", "is a chat message, and needs data.chat_template = true")
    if run.eval.every and not config.eval and not config.held_out:
        complain("eval.every", "there is no held-out split; set data.eval or data.held_out")
    _check_responses(config, run, complain)
    template = find_template(run.model.path) if run.model.path.is_dir() else ""  # no folder at all is another's fault
    if config.chat_template and template is None:
        complain("data.chat_template", f"{run.model.path} has no chat template; add chat_template.jinja to it")
    context = _context(run, complain)
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
        given = config.responses if key == "data.train" or not run.placement.engines else []
        for n, message in enumerate(_faults(rows, config, run, wanted, context, template, given)):
            if n == MOST:
                complain(key, f"{path}: and more like these")
                break
            complain(key, message)
        if key == "data.train" and (held := held_out_count(len(rows), config.held_out)) >= len(rows):
            complain("data.held_out", f"holds out {held} of {len(rows)} rows, which leaves none to train on")


def _check_responses(config: Data.Config, run: RunConfig, complain: Complain) -> None:
    """What cannot be, where the data holds the responses and where it does not."""
    sides = len(config.responses)
    if not sides:
        if not run.placement.engines:
            complain("placement.engines", "is 0, so nothing can be sampled; say 1 or more, or name data.responses")
        return
    if run.batch.group_size != sides:
        complain("batch.group_size", f"is {run.batch.group_size}, data.responses gives {sides} a prompt; say {sides}")
    if run.batch.old_logprobs != "recomputed":
        message = f'no engine drew the responses of data.responses; say "recomputed", not {run.batch.old_logprobs!r}'
        complain("batch.old_logprobs", message)


def _faults(
    rows: Rows,
    config: Data.Config,
    run: RunConfig,
    wanted: dict[str, str],
    context: int | None,
    template: str | None,
    given: list[str],
) -> Iterator[str]:
    ruler = Ruler(run.model.path, context - (1 if given else run.rollout.max_tokens)) if context else None
    for i, row in enumerate(rows.scan()):
        if isinstance(row, Refused):
            yield str(row)
            continue
        if lacking := [column for column in wanted if column not in row]:
            yield f"{rows.where(i)}: no column {lacking[0]!r}, which {wanted[lacking[0]]} reads"
            continue
        try:
            prompt = prompt_of(row, config)
            texts = answers(row, given, prompt)
            length = max(ruler.excess(prompt, text) or 0 for text in texts or [""]) if ruler else 0
        except (PromptError, TemplateRefused) as error:
            why = f"the chat template refuses it: {error}" if isinstance(error, TemplateRefused) else error
            yield f"{rows.where(i)}: {why}"
            continue
        if length and given:
            what = f"prompt, response and stop of {length + 1} tokens"
            yield f"{rows.where(i)}: {what} exceed the model's context of {context}"
        elif length:
            yield (
                f"{rows.where(i)}: a prompt of {length} tokens and rollout.max_tokens = {run.rollout.max_tokens} "
                f"exceed the model's context of {context}"
            )
        elif template is None and not config.chat_template and not isinstance(prompt, str):
            yield f"{rows.where(i)}: is a list of chat messages, but {run.model.path} has no chat template"


def _context(run: RunConfig, complain: Complain) -> int | None:
    """Tokens of prompt and response. None where the model folder itself is at fault; the part that owns it says so."""
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
    return int(context)
