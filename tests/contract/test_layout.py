"""The rules of the house that a newcomer may rely on, read off the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from miles_core.plugins import BUILTIN
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
CORE = ROOT / "miles-core" / "src" / "miles_core"
DISTRIBUTIONS = sorted(path.parent for path in ROOT.glob("miles-*/pyproject.toml"))
PLUGINS = [folder for folder in DISTRIBUTIONS if folder.name != "miles-core"]
EDGES = sorted(path.parent for path in CORE.glob("edges/*/__init__.py"))

HEAVY = {"torch", "ray", "sglang", "megatron", "transformers"}
PUBLIC = {
    "miles_core",
    "miles_core.config",
    "miles_core.edges.protocols",
    "miles_core.formulas",
    "miles_core.formulas.terms",
    "miles_core.testing",
    "miles_core.tokens",
    "miles_core.types",
}  # what a plugin may import
LEFT = {"dist", "runs", "__pycache__"}
WRITTEN = {*ROOT.glob("examples/*/data"), *ROOT.glob("benchmarks/*/work")}


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


def files(folder: Path, *suffixes: str) -> list[Path]:
    """Sources under ``folder``, without what tools, runs and examples leave there."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.name not in LEFT and path not in WRITTEN:
            found += files(path, *suffixes)
        elif path.suffix in suffixes:
            found.append(path)
    return found


def imported(path: Path, package: str) -> set[str]:
    """Absolute names of the modules that a file imports anywhere, for a type checker too; ``package`` holds it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def package_of(path: Path) -> str:
    """Dotted name of the package a file of a distribution lies in."""
    parts = path.parent.parts
    return ".".join(parts[len(parts) - parts[::-1].index("src") :])


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def project(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return loaded


def heavy_after(statement: str) -> set[str]:
    """Which heavy libraries an interpreter holds once it ran ``statement``."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return HEAVY & set(done.stdout.split())


# -- who may import whom ---------------------------------------------------------------------------------------------


PROTOCOLS = "miles_core.edges.protocols", "miles_core.edges.lasting"
SHARED = (  # what two edges must know of one GPU, of one folder, of a disk that is full, and of asking servers
    "miles_core.edges.sharing",
    "miles_core.edges.identity",
    "miles_core.edges.room",
    "miles_core.edges.http",
)


def test_the_check_itself_notices_a_heavy_library() -> None:
    assert heavy_after("import types; sys.modules['torch'] = types.ModuleType('torch')") == {"torch"}


def test_the_kernel_imports_no_heavy_library() -> None:
    assert not heavy_after("import miles_core, miles_core.cli")


@pytest.mark.parametrize("target", list(BUILTIN.values()), ids=list(BUILTIN))
def test_an_edge_is_cheap_to_import(target: str) -> None:
    module, _, name = target.partition(":")
    assert not heavy_after(f"import {module}; {module}.{name}.Config")


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda path: path.name)
def test_the_kernel_imports_neither_edge_nor_loop_when_it_is_imported(path: Path) -> None:
    lazy = (ast.FunctionDef, ast.If)  # inside functions, and for type checkers
    top = ast.Module([node for node in ast.parse(path.read_text()).body if not isinstance(node, lazy)], [])
    modules = {node.module or "" for node in ast.walk(top) if isinstance(node, ast.ImportFrom)}
    assert not [module for module in modules if re.match(r"(miles_core\.)?(edges|loop)\b", module)]


@pytest.mark.parametrize("path", sorted(CORE.glob("loop/*.py")), ids=lambda path: path.name)
def test_the_loop_imports_no_edge_but_what_edges_promise(path: Path) -> None:
    modules = [m for m in imported(path, package_of(path)) if not any(within(m, shown) for shown in PROTOCOLS)]
    assert not [m for m in modules if within(m, "miles_core.edges")]


@pytest.mark.parametrize("edge", EDGES, ids=names(EDGES))
def test_an_edge_imports_neither_the_loop_nor_another_edge(edge: Path) -> None:
    mine = f"miles_core.edges.{edge.name}"
    for path in files(edge, ".py"):
        for module in imported(path, package_of(path)):
            assert not within(module, "miles_core.loop"), f"{path.name} imports {module}"
            shared = module == "miles_core.edges" or any(
                within(module, package) for package in (mine, *PROTOCOLS, *SHARED)
            )
            other = within(module, "miles_core.edges") and not shared
            assert not other, f"{path.name} imports {module}"


@pytest.mark.parametrize("plugin", PLUGINS, ids=names(PLUGINS))
def test_a_plugin_imports_only_what_is_public(plugin: Path) -> None:
    for path in files(plugin / "src", ".py"):
        modules = {
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        }
        modules |= {a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names}
        assert not [m for m in modules if within(m, "miles_core") and m not in PUBLIC], path.name


# -- what core may say -----------------------------------------------------------------------------------------------

ALGORITHMS = ["grpo", "ppo", "dpo", "gspo", "dapo", "cispo", "rloo", "gigpo", "gmpo", "remax", "kto", "ipo", "orpo"]
ALGORITHMS += ["simpo", "drgrpo", "reinforce"]


def named(text: str) -> list[str]:
    """Algorithms that a text names as words, also as part of an identifier."""
    return [name for name in ALGORITHMS if re.search(rf"(?<![a-z]){name}(?![a-z])", text.lower())]


def test_naming_is_noticed() -> None:
    assert named("class GRPO:") == ["grpo"] and named("dr_grpo") == ["grpo"] and named('"reinforce++"') == ["reinforce"]
    assert named("reinforcement learning, happoned") == []


@pytest.mark.parametrize("path", files(CORE, ".py", ".j2"), ids=lambda path: str(path.relative_to(CORE)))
def test_core_knows_no_algorithm(path: Path) -> None:
    assert not named(path.read_text())


# -- how files and distributions look --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", files(ROOT, ".py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


def test_nothing_depends_on_one_machine() -> None:
    """No absolute path of somebody's machine, no host that packages come from."""
    homes = "|".join(["work", "home", "root", "Users"])
    hosts = "|".join([r"pypi\.org", r"pythonhosted\.org", r"download\.pytorch\.org"])
    foreign = re.compile(rf"(?<![\w.])/(?:{homes})/\w|{hosts}")
    texts = [*files(ROOT, ".py", ".md", ".toml", ".txt", ".j2", ".html"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    assert foreign.search("x = '/" + "home/someone'")
    assert not [f"{path.relative_to(ROOT)}: {m[0]}" for path in texts if (m := foreign.search(path.read_text()))]


@pytest.mark.parametrize("folder", DISTRIBUTIONS, ids=names(DISTRIBUTIONS))
def test_a_distribution_is_complete(folder: Path) -> None:
    about = project(folder)
    module = folder / "src" / folder.name.replace("-", "_")
    assert about["name"] == folder.name and about["license"] == "Apache-2.0"
    assert (module / "__init__.py").is_file() and (module / "py.typed").is_file()
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert len((folder / "README.md").read_text().split()) > 50, "a README says what the package is for"
    newest = re.search(r"^## (\S+)", (folder / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == about["version"]


@pytest.mark.parametrize("folder", PLUGINS, ids=names(PLUGINS))
def test_a_plugin_is_called_what_its_distribution_is(folder: Path) -> None:
    name = folder.name.removeprefix("miles-plugin-")
    entries = project(folder)["entry-points"]["miles"]
    assert entries[name].startswith(f"miles_plugin_{name}:")
    assert all(target.startswith(f"miles_plugin_{name}.{entry}:") for entry, target in entries.items() if entry != name)


@pytest.mark.parametrize("folder", PLUGINS, ids=names(PLUGINS))
def test_a_plugin_claims_a_range_that_holds_this_core(folder: Path) -> None:
    core = next(r for r in map(Requirement, project(folder)["dependencies"]) if r.name == "miles-core")
    assert {s.operator for s in core.specifier} == {">=", "<"}
    assert core.specifier.contains(Version(project(ROOT / "miles-core")["version"]))


def test_tested_versions_lie_in_the_ranges_that_packages_claim() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {r.name: r.specifier for line in lines if (text := line.partition("#")[0]) and (r := Requirement(text))}
    claimed = [Requirement(text) for folder in DISTRIBUTIONS for text in project(folder)["dependencies"]]
    claimed += [Requirement(text) for text in sum(project(ROOT / "miles-core")["optional-dependencies"].values(), [])]
    for need in claimed:
        if need.name != "miles-core":
            version = next(iter(tested[need.name])).version  # a KeyError names what constraints.txt lacks
            assert need.specifier.contains(version), f"{need} leaves out the tested {version}"
