"""Find plugins, load the ones a run names, and decide who answers each hook."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.requirements import Requirement

from . import __version__
from .config import RunConfig, Table
from .hookspecs import Hooks, Place
from .types import Refused

SPECS: dict[str, Any] = {name: spec for name, spec in vars(Hooks).items() if hasattr(spec, "kind")}

# What core brings. Always there, asked last; each is imported only when a run is loaded, and none imports torch.
BUILTIN = {
    "ray": "miles_core.edges.cluster:Ray",
    "megatron": "miles_core.edges.megatron:Megatron",
    "local": "miles_core.edges.local:Local",
    "sglang": "miles_core.edges.sglang:SGLang",
    "shm": "miles_core.edges.transport:SharedMemory",
    "data": "miles_core.edges.data:Data",
    "reward": "miles_core.edges.reward:Reward",
    "queue": "miles_core.edges.queue:Queue",
    "correction": "miles_core.edges.correction:Correction",
    "tracking": "miles_core.edges.tracking:Tracking",
    "store": "miles_core.edges.store:Folder",
    "core": "miles_core.edges.default:Default",
}


class PluginError(Refused):
    """A plugin cannot be used as asked; the message says whose fault and what to change."""


class Plugin:
    """Base of every plugin: a Config, validated from the table named after the plugin, and the run it is part of."""

    class Config(Table):
        pass

    def __init__(self, config: Config, run: RunConfig) -> None:
        self.config, self.run = config, run


@dataclass(frozen=True)
class Found:
    """A plugin seen, not imported yet: an entry point, something core brings, or a single file."""

    name: str
    dist: str
    version: str
    entry: EntryPoint
    core: Requirement | None = None
    source: str | None = None  # of a single-file plugin

    def load(self) -> type[Plugin]:
        """Its class. Raises PluginError, before importing anything where the versions already forbid it."""
        if self.core and not self.core.specifier.contains(__version__, prereleases=True):
            raise PluginError(f"{self.dist} {self.version} needs {self.core}, this is miles-core {__version__}")
        try:
            cls = self.entry.load() if self.source is None else _only_class(self)
        except PluginError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error} ({self.entry.value})"
            raise PluginError(f"{self.dist} {self.version} does not import: {why}") from error
        if not (isinstance(cls, type) and issubclass(cls, Plugin)):
            raise PluginError(f"{self.dist} {self.version}: {self.entry.value} is not a miles_core.Plugin")
        from .contract import check  # which imports this module

        check(self.name, cls)
        return cls


@cache
def installed() -> dict[str, Found]:
    """Every plugin in this environment, by name; metadata only. Raises PluginError where two share a name."""
    found = {name: Found(name, "miles-core", __version__, EntryPoint(name, t, "miles")) for name, t in BUILTIN.items()}
    for dist in distributions():
        for entry in dist.entry_points.select(group="miles"):
            core = next((r for r in map(Requirement, dist.requires or ()) if r.name == "miles-core"), None)
            old = found.setdefault(entry.name, new := Found(entry.name, dist.name, dist.version, entry, core))
            if old.dist != new.dist:
                raise PluginError(f"{old.dist} and {new.dist} both call a plugin {entry.name!r}; uninstall one")
    return dict(sorted(found.items()))


def single_file(path: Path) -> Found:
    """A plugin that is one file, named by its path in the run. Raises PluginError when it cannot be read."""
    try:
        source = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(f"{path} cannot be read: {error}") from None
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    return Found(path.stem, str(path), f"sha256:{digest}", EntryPoint(path.stem, str(path), "miles"), source=source)


def _only_class(found: Found) -> type[Plugin]:
    module = sys.modules.get(f"miles_file_{found.name}")
    if module is None or module.__dict__.get("__source__") != found.source:
        module = ModuleType(f"miles_file_{found.name}")
        module.__file__, module.__dict__["__source__"] = found.entry.value, found.source
        sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
        exec(compile(found.source or "", found.entry.value, "exec"), module.__dict__)
    mine = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    classes = [c for c in mine if issubclass(c, Plugin)]
    if len(classes) != 1:
        raise PluginError(f"{found.dist} defines {len(classes)} subclasses of miles_core.Plugin; define exactly one")
    return classes[0]


class Registry:
    """The plugins of one run, as seen from one place. ``registry.loss(...)`` calls ``miles_loss``.

    ``plugins`` stand in the order they are asked: those the run lists, the algorithm, then core's own.
    Raises PluginError on a tie, an empty slot or half an algorithm.
    """

    def __init__(self, place: Place, plugins: dict[str, Plugin], run: RunConfig) -> None:
        self.plugins, self.run, self._pm = plugins, run, pluggy.PluginManager("miles")
        self._pm.add_hookspecs(Hooks)
        for name, plugin in reversed(plugins.items()):  # pluggy asks the last one registered first
            self._pm.register(plugin, name)
        self.owner = {hook: self._owner(hook, run) for hook, spec in SPECS.items() if spec.kind == "slot"}
        for hook, spec in SPECS.items():
            if place in spec.places:
                setattr(self, hook.removeprefix("miles_"), self._bind(hook, spec))

    if TYPE_CHECKING:

        def __getattr__(self, hook: str) -> Callable[..., Any]: ...

    def answerers(self, hook: str) -> list[str]:
        """Plugins that answer this hook, first asked first; wrappers do not answer."""
        impls = reversed(getattr(self._pm.hook, hook).get_hookimpls())
        return [impl.plugin_name for impl in impls if not impl.wrapper]

    def _owner(self, hook: str, run: RunConfig) -> str:
        slot, names, use, algorithm = hook.removeprefix("miles_"), self.answerers(hook), run.use, run.algorithm
        own = [name for name in names if run.own.get(slot, name) == name]
        rivals = [name for name in names if name not in BUILTIN] or own
        if slot in use:
            if use[slot] not in names:
                who = " and ".join(names) or "nobody"
                raise PluginError(f"use.{slot}: {use[slot]!r} does not answer {hook}; {who} does")
            return use[slot]
        if SPECS[hook].algorithm:
            if others := [name for name in rivals if name not in (algorithm, *BUILTIN)]:
                raise PluginError(
                    f"{others[0]} answers {hook}, which is the algorithm's; say algorithm = {others[0]!r}, "
                    f"or [use] {slot} = {others[0]!r} to mix it into {algorithm}"
                )
        if not names:  # core answers all but this one
            raise PluginError(f"{algorithm} is the algorithm, but does not answer {hook}")
        if len(rivals) > 1:
            raise PluginError(f"{' and '.join(rivals)} both answer {hook}; choose with [use] {slot} = {rivals[0]!r}")
        return rivals[0]

    def _only(self, hook: str, name: str) -> Callable[..., Any]:
        """Call ``hook`` of one plugin, and of whoever wraps it; an exception says whose it was."""
        others = [self.plugins[n] for n in self.answerers(hook) if n != name]
        caller = self._pm.subset_hook_caller(hook, others)

        def call(**args: Any) -> Any:
            with _blame(hook, name):
                return caller(**args)

        async def call_async(**args: Any) -> Any:
            with _blame(hook, name):
                answer = caller(**args)
                return [await part for part in answer] if isinstance(answer, list) else await answer

        return call_async if inspect.iscoroutinefunction(SPECS[hook]) else call

    def _bind(self, hook: str, spec: Any) -> Callable[..., Any]:
        if spec.kind == "slot":
            return self._only(hook, self.owner[hook])
        parts = {name: self._only(hook, name) for name in self.answerers(hook)}

        def first(**args: Any) -> Any:
            return next((answer for part in parts.values() if (answer := part(**args)) is not None), None)

        def event(**args: Any) -> None:
            for part in parts.values():
                part(**args)

        def merge(**args: Any) -> dict[str, Any]:
            return merged(part(**args) for part in parts.values())

        async def merge_async(**args: Any) -> dict[str, Any]:
            import asyncio  # here, since `miles plugins` is quicker without

            return merged(await asyncio.gather(*(part(**args) for part in parts.values())))

        def merged(answers: Iterable[list[dict[str, Any] | None]]) -> dict[str, Any]:
            result: dict[str, tuple[str, Any]] = {}
            for name, listed in zip(parts, answers, strict=True):
                for key, value in ((key, value) for answer in listed if answer for key, value in answer.items()):
                    if key in result:
                        raise PluginError(f"{result[key][0]} and {name} both answer {key!r} in {hook}")
                    result[key] = name, value
            return {key: value for key, (_, value) in result.items()}

        merging = merge_async if inspect.iscoroutinefunction(spec) else merge
        return {"merge": merging, "first": first, "event": event}[spec.kind]


@contextmanager
def _blame(hook: str, name: str) -> Iterator[None]:
    """What a plugin raises is for its user to mend, so it ends the run with status 2 and says whose it is."""
    try:
        yield
    except Exception as error:
        from .edges.protocols import EngineError, WorkerDied  # not the plugin's own, only passing through

        if name in BUILTIN or isinstance(error, Refused | EngineError | WorkerDied):
            raise
        raise PluginError(f"plugin {name}: {hook} raised {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Manifest:
    """What a run is made of. Every process rebuilds its plugins from it, or refuses to start."""

    core: str
    run: str  # JSON
    plugins: tuple[tuple[Found, str], ...]  # and the JSON of its table

    def registry(self, place: Place) -> Registry:
        """The plugins as seen from ``place``. Raises PluginError where this environment differs from the driver's."""
        if self.core != __version__:
            raise PluginError(f"this process has miles-core {__version__}, the driver has {self.core}")
        run, plugins, here = RunConfig.model_validate_json(self.run), {}, installed()
        for found, config in self.plugins:
            if found.source is None:
                mine = here.get(found.name)
                if mine is None or (mine.dist, mine.version) != (found.dist, found.version):
                    have = f"{mine.dist} {mine.version}" if mine else f"no plugin {found.name!r}"
                    raise PluginError(f"this process has {have}, the driver has {found.dist} {found.version}")
            cls = found.load()
            plugins[found.name] = cls(cls.Config.model_validate_json(config), run)
        return Registry(place, plugins, run)

    def at(self, folder: Path) -> Manifest:
        """The same run, its folder known to every plugin."""
        run = RunConfig.model_validate_json(self.run).model_copy(update={"run_dir": folder.absolute()})
        return replace(self, run=run.model_dump_json())

    @property
    def tables(self) -> dict[str, Any]:
        run: dict[str, Any] = json.loads(self.run)
        return run | {found.name: json.loads(config) for found, config in self.plugins}

    @property
    def versions(self) -> dict[str, str]:
        return {found.name: f"{found.dist} {found.version}" for found, _ in self.plugins}
