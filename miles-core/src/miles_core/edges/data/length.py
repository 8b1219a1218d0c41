"""How many tokens a prompt has, without the library whose import takes seconds.

This looks ahead, and lets pass what it cannot judge: a rollout counts again, with the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...types import Message

SPECIAL = 4  # tokens that a tokenizer may put around a text, at most


class TemplateRefused(Exception):
    """The chat template itself says that it does not take these messages."""


def find_template(folder: Path) -> str | None:
    """The chat template of a model folder: chat_template.jinja, or what tokenizer_config.json has."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    named: Any = _tokenizer_config(folder).get("chat_template")
    if isinstance(named, list):
        named = {template["name"]: template["template"] for template in named}.get("default")
    return named if isinstance(named, str) else None


class Ruler:
    """Measures prompts against ``room``, the tokens that the context leaves for one."""

    def __init__(self, folder: Path, room: int) -> None:
        self._folder, self._room = folder, room
        self._tokenizer: Any = None
        self._template: Any = None

    def excess(self, prompt: str | list[Message], response: str = "") -> int | None:
        """Tokens of prompt and response where they are more than the room, else None. Raises TemplateRefused."""
        chat = not isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self._render(prompt)
        text = text and text + response
        # No token stands for less than a byte, so most prompts need no tokenizer to be seen to fit.
        if text is None or len(text.encode(errors="replace")) + SPECIAL <= self._room:
            return None
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        length = len(self._tokenizer.encode(text, add_special_tokens=not chat).ids)
        return length if length > self._room else None

    def _render(self, messages: list[Message]) -> str | None:
        import jinja2

        try:
            if self._template is None:
                self._template = _compile(find_template(self._folder) or "", _tokenizer_config(self._folder))
            text: str = self._template.render(messages=messages, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError):
            return None
        return text


def _compile(template: str, config: dict[str, Any]) -> Any:
    """The environment that templates are written for: blocks trimmed, and a few names given."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateRefused(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    for key, value in config.items():
        if key.endswith("_token") and isinstance(
            value := value.get("content") if isinstance(value, dict) else value, str
        ):
            environment.globals[key] = value
    # A block that only marks what the assistant wrote, and is no part of Jinja.
    template = re.sub(r"(\{%-?\s*)generation(?=\s*-?%\})", r"\1if true", template)
    template = re.sub(r"(\{%-?\s*)endgeneration(?=\s*-?%\})", r"\1endif", template)
    return environment.from_string(template)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config
