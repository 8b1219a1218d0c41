"""What a plugin's class must keep to, beyond what pluggy asks of it, and what it must answer."""

from __future__ import annotations

import inspect
from typing import Any

from ..config import suggest
from ..plugins import SPECS, Plugin, PluginError
from ..types import Loss


def check(name: str, cls: type[Plugin]) -> None:
    """Refuse at load time what pluggy would only ignore at call time."""
    for attr, function in inspect.getmembers(cls, inspect.isfunction):
        if not attr.startswith("miles_"):
            if getattr(function, "miles_impl", None) is not None:
                raise PluginError(f"plugin {name}: {attr} is marked @hookimpl, but hooks are called miles_...")
            continue
        if attr not in SPECS:
            raise PluginError(f"plugin {name}: no hook {attr}{suggest(attr, SPECS)}")
        spec, marks = SPECS[attr], getattr(function, "miles_impl", None)
        given, known = inspect.signature(function).parameters, inspect.signature(spec).parameters
        if marks is None:
            raise PluginError(f"plugin {name}: {attr} is not marked @hookimpl")
        if marks["tryfirst"] or marks["trylast"]:
            raise PluginError(f"plugin {name}: {attr} sets its own order; order belongs to plugins = [...]")
        if marks["hookwrapper"] or (marks["wrapper"] and not _wrappable(spec, function)):
            raise PluginError(f"plugin {name}: {attr} cannot be wrapped; only a plain slot can, with wrapper=True")
        if not marks["wrapper"] and inspect.iscoroutinefunction(spec) != inspect.iscoroutinefunction(function):
            want = "async def" if inspect.iscoroutinefunction(spec) else "def"
            raise PluginError(f"plugin {name}: {attr} must be `{want}`")
        if function.__defaults__ or function.__kwdefaults__:
            raise PluginError(f"plugin {name}: {attr} gives an argument a default; hooks always pass it")
        if unknown := [p for p in given if p not in known]:
            takes = ", ".join(list(known)[1:]) or "no arguments"
            raise PluginError(f"plugin {name}: {attr} has no argument {unknown[0]!r}; it takes {takes}")


def _wrappable(spec: Any, function: Any) -> bool:
    """A wrapper around an async slot ends before what it wraps begins, so it may only take note of the call."""
    return spec.kind == "slot" and (not inspect.iscoroutinefunction(spec) or getattr(function, "takes_note", False))


def check_loss(answer: Any, name: str) -> Loss:
    """What ``miles_loss`` of plugin ``name`` answered. Raises PluginError where that is no sum to descend."""
    if not isinstance(answer, Loss):
        raise PluginError(f"plugin {name}: miles_loss answered {type(answer).__name__}; return Loss(sum, per, metrics)")
    if answer.sum.dim():
        shape = list(answer.sum.shape)
        raise PluginError(f"plugin {name}: miles_loss answered a Loss of shape {shape}; sum it over the micro-batch")
    return answer
