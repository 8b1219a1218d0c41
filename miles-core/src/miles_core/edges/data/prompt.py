"""From a row to its prompt: text, or chat messages for the tokenizer's template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...types import Message
    from . import Data


class PromptError(Exception):
    """A row has no prompt that could be used; says why, but not where."""


def prompt_of(row: dict[str, Any], config: Data.Config) -> str | list[Message]:
    """The prompt of a row. Messages always go through the template; text does with ``chat_template``.

    A row's own system message comes before that of the run. Raises PromptError.
    """
    if config.prompt not in row:
        raise PromptError(f"no column {config.prompt!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    prompt = row[config.prompt]
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError(f"{config.prompt} is empty")
        if not config.chat_template:
            return prompt
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list):
        if not prompt or not all(map(_is_message, prompt)):
            raise PromptError(f'{config.prompt} must hold messages such as {{"role": "user", "content": "..."}}')
        messages = prompt
    else:
        raise PromptError(f"{config.prompt} must be text or a list of messages, this is {type(prompt).__name__}")
    if config.system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": config.system}, *messages]
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
