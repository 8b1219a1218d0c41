"""From prompts to tokens, for whoever answers ``miles_rollout``. transformers is imported where it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..types import Refused

if TYPE_CHECKING:
    from ..types import Message


GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # all that they are stands in tokenizer.json


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, from its files alone. Raises Refused where it cannot be read."""
    try:
        config = folder / "tokenizer_config.json"
        if config.is_file() and json.loads(config.read_text()).get("tokenizer_class") in GENERIC:
            from transformers import PreTrainedTokenizerFast as Tokenizer  # the other brings all models' configurations
        else:
            from transformers import AutoTokenizer as Tokenizer
        return Tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise Refused(f"model.path: the tokenizer in {folder} cannot be read: {error}") from None


def tokenize(tokenizer: Any, prompt: str | list[Message]) -> list[int]:
    """Token ids of text, or of messages in the tokenizer's chat template, ready for the answer."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer.encode(prompt)
        return ids
    if not tokenizer.chat_template:
        raise Refused("model.path: the tokenizer has no chat template; add one, or give the prompts as text")
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)  # the template wrote them already
    return ids


def stop_tokens(tokenizer: Any, folder: Path, more: list[int]) -> tuple[int, ...]:
    """The end of sequence, by the tokenizer and by generation_config.json, and those of the run."""
    found = [tokenizer.eos_token_id, *more]
    path = folder / "generation_config.json"
    if path.is_file():
        eos = json.loads(path.read_text()).get("eos_token_id")
        found += eos if isinstance(eos, list) else [eos]
    return tuple(sorted({token for token in found if token is not None}))
