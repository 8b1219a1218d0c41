"""A run as it is written: TOML files plus ``--set``. Every complaint names its key, its file and its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ...config import ConfigError, Loc, Written, suggest


class Source:
    """The tree of values of a run, and where each one was written."""

    def __init__(self, paths: Sequence[Path], overrides: Sequence[str] = ()) -> None:
        self.texts: dict[Path, str] = {}
        self.tree: dict[str, Any] = {}
        self.overrides: dict[Loc, str] = {}
        self.complaints: list[str] = []
        for path in paths:
            try:
                self.texts[path] = path.read_text()
                _merge(self.tree, _written(tomllib.loads(self.texts[path]), path.parent.absolute()))
            except (OSError, UnicodeDecodeError) as error:
                self.complaints.append(f"{path}: cannot be read: {error}")
            except tomllib.TOMLDecodeError as error:
                self.complaints.append(f"{path}: not TOML: {error}")
        for override in overrides:
            self._override(override)

    def _override(self, override: str) -> None:
        key, eq, value = override.partition("=")
        loc = tuple(key.strip().split("."))
        if not eq or "" in loc:
            self.complaints.append(f"--set {override}: write it as --set table.key=value")
            return
        node = self.tree
        for part in loc[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                self.complaints.append(f"--set {override}: {part} is not a table")
                return
        node[loc[-1]] = _written(_literal(value.strip()), Path.cwd())
        self.overrides[loc] = override

    def where(self, loc: Loc) -> str:
        """``file:line`` of the longest written prefix of ``loc``, or the ``--set`` that wrote it."""
        for end in range(len(loc), 0, -1):
            if override := next((o for key, o in self.overrides.items() if key[:end] == loc[:end]), None):
                return f"--set {override}"
            for path, text in reversed(self.texts.items()):
                if line := _line_of(text, loc[:end]):
                    return f"{path}:{line}"
        return str(next(iter(self.texts), "--set"))

    def origin(self, loc: Loc) -> str:
        """Where exactly ``loc`` was written, or "default"."""
        return self.where(loc) if _reach(self.tree, loc) else "default"

    def complain(self, key: Loc | str, message: str) -> None:
        """Add a complaint about ``key``, with the place it was written at."""
        loc = tuple(key.split(".")) if isinstance(key, str) else key
        self.complaints.append(f"{self.where(loc)}: {'.'.join(map(str, loc))}: {message}")

    def validate[M: BaseModel](self, model: type[M], value: Any, at: Loc = ()) -> M | None:
        """``value`` as ``model``, or None after complaining of everything that is wrong with it."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            for e in error.errors(include_url=False):
                inner, what = e["loc"], e["msg"][:1].lower() + e["msg"][1:]
                if e["type"] == "extra_forbidden":
                    what = "no such key" + suggest(str(inner[-1]), _fields(model, inner[:-1]))
                elif e["type"] == "missing":
                    what = "missing; it has no default"
                else:
                    what = f"{what.removeprefix('value error, ')}, got {e['input']!r}"
                self.complain(at + inner, what)
            return None

    def refuse(self) -> None:
        """Raise ConfigError with every complaint so far, if there are any, in the order of the files' lines."""
        if self.complaints:
            numbers = re.compile(r"(\d+)")  # line 10 comes after line 9
            natural = {c: [(int(p), "") if p.isdigit() else (-1, p) for p in numbers.split(c)] for c in self.complaints}
            raise ConfigError("\n".join(sorted(natural, key=natural.__getitem__)))


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _written(value: Any, folder: Path) -> Any:
    """``value`` with every string marked by the folder its relative paths start from."""
    if isinstance(value, dict):
        return {key: _written(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_written(item, folder) for item in value]
    if isinstance(value, str):
        value = Written(value)
        value.folder = folder
    return value


def _literal(text: str) -> Any:
    """A TOML value if it reads as one, else the bare string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


@cache
def _replay(text: str) -> list[tuple[int, dict[str, Any]]]:
    """For each statement, the line it starts on and the file as read up to its end.

    ``tomllib`` keeps no positions; growing prefixes of the file find them, and only when something is wrong.
    """
    lines, start, seen = text.splitlines(keepends=True), 1, []
    for end in range(1, len(lines) + 1):
        if not lines[start - 1].strip():
            start += 1
            continue
        try:
            seen.append((start, tomllib.loads("".join(lines[:end]))))
            start = end + 1
        except tomllib.TOMLDecodeError:
            pass  # inside a value that spans lines
    return seen


def _line_of(text: str, loc: Loc) -> int | None:
    """The line of the statement that first makes ``loc`` exist."""
    return next((start for start, tree in _replay(text) if _reach(tree, loc)), None)


def _reach(node: Any, loc: Loc) -> bool:
    try:
        return bool(reduce(lambda inner, part: inner[part], loc, node) is not None)
    except (KeyError, IndexError, TypeError):
        return False


def _fields(model: type[BaseModel], loc: Loc) -> list[str]:
    for part in loc:
        inner = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
