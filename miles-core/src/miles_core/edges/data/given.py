"""Responses that the data holds: demonstrations, or the sides of a preference. Nothing is sampled."""

from __future__ import annotations

import json
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ...tokens import load_tokenizer, stop_tokens, tokenize
from ...types import Group, Refused, Sample
from .prompt import PromptError

if TYPE_CHECKING:
    from ...config import RunConfig
    from ...types import Message


def answers(row: dict[str, Any], columns: list[str], prompt: str | list[Message]) -> list[str]:
    """The responses of a row as text, one a column. Raises PromptError where one is missing or empty, two are equal,
    or a conversation does not begin with the prompt."""
    found = [_answer(row, column, prompt) for column in columns]
    for (one, a), (other, b) in combinations(zip(columns, found, strict=True), 2):
        if a == b:
            raise PromptError(f"{one} and {other} are the same text, which says nothing about either")
    return found


def _answer(row: dict[str, Any], column: str, prompt: str | list[Message]) -> str:
    if column not in row:
        raise PromptError(f"no column {column!r}, which data.responses names; the row has {', '.join(map(repr, row))}")
    value = row[column]
    if isinstance(value, list):
        value = _last_message(value, column, prompt)
    if not isinstance(value, str):
        raise PromptError(f"{column} must be text or a list of messages, this is {type(value).__name__}")
    if not value:
        raise PromptError(f"{column} is empty")
    return value


def _last_message(value: list[Any], column: str, prompt: str | list[Message]) -> Any:
    """What the assistant says in a conversation that repeats the prompt, or is one message long."""
    if isinstance(prompt, str):
        raise PromptError(f"{column} is a list of messages, but the prompt is text; set data.chat_template = true")
    bare = prompt[1:] if prompt[0]["role"] == "system" else prompt  # the run's own message is not in the row
    said = next((value[len(p) :] for p in (prompt, bare) if value[: len(p)] == p), value)
    if len(said) != 1 or not isinstance(said[0], dict) or said[0].get("role") != "assistant":
        raise PromptError(f"{column} does not begin with the prompt and end with one message of the assistant")
    return said[0].get("content")


class Given:
    """Fills samples in from their rows. Holds the tokenizer; one a process."""

    def __init__(self, run: RunConfig, columns: list[str]) -> None:
        self._columns = columns
        self._tokenizer = load_tokenizer(run.model.path)
        self._stops = stop_tokens(self._tokenizer, run.model.path, run.rollout.stop_tokens)
        limit = json.loads((run.model.path / "config.json").read_text()).get("max_position_embeddings")
        self._context = run.model.context or limit

    def fill(self, group: Group) -> Group:
        """The k-th sample gets the response of the k-th column. Raises Refused, naming the sample."""
        prompt = group.samples[0].prompt
        try:
            texts = answers(group.samples[0].info, self._columns, prompt)
        except PromptError as error:
            raise Refused(f"sample {group.samples[0].id}: {error}") from None
        before = tokenize(self._tokenizer, prompt)
        for sample, text in zip(group.samples, texts, strict=True):
            self._fill(sample, before, text)
        return group

    def _fill(self, sample: Sample, prompt: list[int], text: str) -> None:
        written = self._ids(sample, text)
        sample.tokens = prompt + written
        if self._context and len(sample.tokens) > self._context:
            message = f"prompt and response have {len(sample.tokens)} tokens, more than the context of {self._context}"
            raise Refused(f"sample {sample.id}: {message}")
        sample.mask = [False] * len(prompt) + [True] * len(written)
        sample.logprobs = [0.0] * len(sample.tokens)
        sample.versions = [-1] * len(sample.tokens)  # no weights of this run wrote it
        sample.response, sample.finish = text, "stop"

    def _ids(self, sample: Sample, text: str) -> list[int]:
        """The response as the policy would have to write it, with the stop that ends it."""
        ending = [self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else []
        if isinstance(sample.prompt, str):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
            return ids + ending
        messages = [*sample.prompt, {"role": "assistant", "content": text}]
        head = self._tokenizer.apply_chat_template(sample.prompt, add_generation_prompt=True, tokenize=False)
        whole = self._tokenizer.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(head):
            raise Refused(f"sample {sample.id}: the chat template writes the prompt another way before a response")
        ids = self._tokenizer.encode(whole[len(head) :], add_special_tokens=False)
        stops = [i for i, token in enumerate(ids) if token in self._stops]
        return ids[: stops[-1] + 1] if stops else ids + ending  # what a template writes after the stop is not sampled
