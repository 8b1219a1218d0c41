"""A run's file and its plugins, checked together: everything that is wrong with them is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ... import __version__
from ...config import Loc, RunConfig, suggest
from ...hookspecs import Hooks
from ...plugins import BUILTIN, SPECS, Found, Manifest, PluginError, installed, single_file
from . import Source


def assemble(source: Source) -> Manifest:
    """The run described by ``source``, every table validated. Raises ConfigError with all that is wrong."""
    source.refuse()  # a file that is not TOML
    tree, listed = dict(source.tree), []
    for name, (found, loc) in _named(source).items():
        try:
            cls = found.load()
        except PluginError as error:
            source.complain(loc, str(error))
            tree.pop(name, None)
            continue
        if (config := source.validate(cls.Config, tree.pop(name, {}), (name,))) is not None:
            listed.append((found, config.model_dump_json()))
    for name in installed().keys() & tree.keys() - set(RunConfig.model_fields):
        source.complain((name,), f"has settings, but this run does not use {name}; add it to plugins")
        tree.pop(name)
    if str(algorithm := tree.get("algorithm")).endswith(".py"):
        tree["algorithm"] = Path(str(algorithm)).stem
    run = source.validate(RunConfig, tree)
    for slot in run.use if run else ():
        if SPECS.get(f"miles_{slot}", Hooks.miles_check).kind != "slot":
            slots = [hook.removeprefix("miles_") for hook, spec in SPECS.items() if spec.kind == "slot"]
            source.complain(("use", slot), f"no such slot{suggest(slot, slots)}")
    source.refuse()
    assert run is not None
    manifest = Manifest(__version__, run.model_dump_json(), tuple(listed))
    try:
        registry = manifest.registry("driver")
        tables = {name: plugin.config for name, plugin in registry.plugins.items()}
        registry.check(complain=source.complain, tables=tables, roles=registry.roles())
    except PluginError as error:
        key = next((f"use.{slot}" for slot in run.use if str(error).startswith(f"use.{slot}:")), "algorithm")
        source.complain(key, str(error))
    source.refuse()
    return manifest


def _named(source: Source) -> dict[str, tuple[Found, Loc]]:
    """What the run names and where, in the order of asking: ``plugins``, the algorithm, then core's own."""
    known, chosen = installed(), dict[str, tuple[Found, Loc]]()
    plugins = source.tree.get("plugins", [])
    named: list[tuple[Any, Loc]] = [(name, ("plugins", i)) for i, name in enumerate(plugins)]
    named += [(source.tree["algorithm"], ("algorithm",))] if "algorithm" in source.tree else []
    for name, loc in named:
        if not isinstance(name, str):
            continue  # the table's own validation says so
        try:
            found = single_file(getattr(name, "folder", Path()) / name) if name.endswith(".py") else known[name]
        except PluginError as error:
            source.complain(loc, str(error))
        except KeyError:
            source.complain(loc, f"{name!r} is not installed{suggest(name, known)}")
        else:
            if found.name in chosen and loc[0] == "plugins":
                source.complain(loc, f"{found.name!r} is named twice; name it once")
            if found.name in BUILTIN or found.name in RunConfig.model_fields:
                source.complain(loc, f"{found.name!r} is a name of core's own; leave it out, or rename the file")
            else:
                chosen.setdefault(found.name, (found, loc))
    return chosen | {name: (known[name], (name,)) for name in BUILTIN}
