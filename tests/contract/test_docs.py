"""Pages say what the sources say, and the tutorial's code is code that works."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import miles_core.hookspecs
import pytest
from miles_core.contract import check
from miles_core.plugins import SPECS

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / "docs" / "hooks"
TUTORIAL = ROOT / "docs" / "tutorial.md"
LEFT = {"dist", "runs", "build", "__pycache__"}


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def signatures() -> dict[str, str]:
    """Each hook as its source declares it."""
    tree = ast.parse(inspect.getsource(miles_core.hookspecs))
    (hooks,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Hooks"]
    found = {}
    for node in hooks.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            assert node.returns
            found[node.name] = f"{word} {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}: ..."
    return found


def test_every_hook_has_a_page_and_every_page_a_hook() -> None:
    assert {f"miles_{page.stem}" for page in HOOKS.glob("*.md")} - {"miles_README"} == set(SPECS)


@pytest.mark.parametrize("hook", SPECS)
def test_a_page_has_the_signature_of_the_source(hook: str) -> None:
    page = HOOKS / f"{hook.removeprefix('miles_')}.md"
    assert blocks(page)[0].strip() == signatures()[hook]


@pytest.mark.parametrize("hook", SPECS)
def test_a_page_says_kind_and_place(hook: str) -> None:
    spec, text = SPECS[hook], (HOOKS / f"{hook.removeprefix('miles_')}.md").read_text()
    assert f"Kind: {spec.kind}. Place: {' and '.join(spec.places)}." in text
    assert ("Owned by the algorithm." in text) == spec.algorithm


@pytest.mark.parametrize("hook", SPECS)
def test_the_example_on_a_page_answers_that_hook(hook: str) -> None:
    (function,) = ast.parse(blocks(HOOKS / f"{hook.removeprefix('miles_')}.md")[1]).body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.name == hook
    known = set(inspect.signature(getattr(miles_core.hookspecs.Hooks, hook)).parameters)
    assert {argument.arg for argument in function.args.args} <= known
    assert isinstance(function, ast.AsyncFunctionDef) == inspect.iscoroutinefunction(SPECS[hook])


def test_the_index_lists_them_in_order() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+)\*? \| ([\w ]+) \|", (HOOKS / "README.md").read_text(), re.M)
    expected = [(hook.removeprefix("miles_"), spec.kind, " and ".join(spec.places)) for hook, spec in SPECS.items()]
    assert [(name, kind, place) for name, _, kind, place in rows] == expected


def pages() -> Iterator[Path]:
    for page in ROOT.rglob("*.md"):
        parts = page.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in LEFT for part in parts):
            yield page


@pytest.mark.parametrize("page", sorted(pages()), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tutorial's package, written from its page."""
    module, test = blocks(TUTORIAL)[:2]
    folder = tmp_path / "miles_plugin_opo"
    folder.mkdir()
    (folder / "__init__.py").write_text(module)
    (tmp_path / "test_opo.py").write_text(test)
    installed = tmp_path / "miles_plugin_opo-0.1.0.dist-info"  # what pip would write
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: miles-plugin-opo\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text("[miles]\nopo = miles_plugin_opo:Opo\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "miles_plugin_opo", raising=False)
    return tmp_path


def test_the_tutorial_s_plugin_is_short_and_loads(package: Path) -> None:
    assert len((package / "miles_plugin_opo" / "__init__.py").read_text().splitlines()) < 40
    from miles_plugin_opo import Opo  # type: ignore[import-not-found]

    check("opo", Opo)


def test_every_block_of_the_tutorial_is_python() -> None:
    for block in blocks(TUTORIAL):
        compile(block, str(TUTORIAL), "exec")


pytest_plugins = ["pytester"]


@pytest.mark.slow
def test_the_tutorial_s_package_passes_the_kit(package: Path, pytester: pytest.Pytester) -> None:
    outcome = pytester.runpytest_subprocess(str(package / "test_opo.py"), "-q", "-p", "no:cacheprovider")
    assert outcome.ret == 0
