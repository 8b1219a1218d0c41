"""Everything CI runs, and nothing CI does not. ``nox -l`` lists it; the Makefile needs nothing installed.

Packages are the folders ``miles-*`` that hold a pyproject.toml: a new one is picked up without a change here. Every
environment is filled by uv with ``constraints.txt``, from one cache: torch is downloaded once for all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from zipfile import ZipFile

import nox
from packaging.requirements import Requirement
from packaging.version import Version

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"  # `uv pip install` brings an old one up to date in a second
nox.options.sessions = ["budget", "side_by_side", "tests", "together", "floor", "slow"]

ROOT = Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("miles-*/pyproject.toml"))
PLUGINS = [name for name in PACKAGES if name != "miles-core"]
CONSTRAINTS = ("--constraint", "constraints.txt")
CORE = "miles-core/src/miles_core"
BUDGETS = {  # most lines, blank ones and comments too; edges/ and testing/ stand outside
    "core": (1800, [f"{CORE}/*.py", f"{CORE}/loop/*.py"]),
    "loop": (1200, [f"{CORE}/loop/*.py"]),
}
SPREAD = ("--numprocesses=logical", "--maxprocesses=4", "--dist=loadfile")  # much of a test's time is waiting
FORMULAS = ("click", "numpy", "packaging", "pluggy", "pydantic", "torch")  # what core's formulas and tables import


def project(package: str) -> dict[str, object]:
    loaded: dict[str, object] = tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]
    return loaded


def requirement(package: str, name: str) -> Requirement:
    """What ``package`` says it needs of ``name``."""
    return next(r for r in map(Requirement, project(package)["dependencies"]) if r.name == name)  # type: ignore[call-overload]


def oldest(requirement: Requirement) -> str:
    """The version that a requirement's ``>=`` names."""
    return next(s.version for s in requirement.specifier if s.operator == ">=")


def prepare(
    session: nox.Session,
    *what: str,
    group: str | None = None,
    silent: bool = True,
    constraints: tuple[str, ...] = CONSTRAINTS,
) -> None:
    """Fill the environment, and make what runs in it use one thread a process and keep its bytecode."""
    tools = nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), group) if group else ()
    session.install(*constraints, *tools, *what, silent=silent)
    compiled(Path(session.virtualenv.location).resolve())
    session.env["OMP_NUM_THREADS"] = "1"
    session.env["PYTHONDONTWRITEBYTECODE"] = ""  # torch and Megatron, compiled anew by each process, are slow to import


def compiled(venv: Path) -> None:
    """Give an environment the bytecode that others have of the very same files, which uv links from its cache.

    Compiling what torch and Megatron import is a dozen seconds of work for each process that is the first to.
    """
    for mine in venv.glob("lib/python3*/site-packages"):
        others = [str(other) for other in venv.parent.glob(f"*/{mine.relative_to(venv)}") if other != mine]
        for folder, _, files in os.walk(mine):
            if sources := {file for file in files if file.endswith(".py")}:
                for other in others:
                    linked(folder, sources, other + folder.removeprefix(str(mine)))


def linked(mine: str, sources: set[str], other: str) -> None:
    """The bytecode of one folder. No paths but of text: there are thousands of folders, and ten others of each."""
    there, theirs = f"{mine}/__pycache__", f"{other}/__pycache__"
    if not os.path.isdir(theirs):
        return
    known = os.listdir(there) if os.path.isdir(there) else []
    for name in set(os.listdir(theirs)).difference(known):
        source = f"{name.partition('.')[0]}.py"
        if source in sources and os.path.exists(f"{other}/{source}"):
            if os.path.samefile(f"{mine}/{source}", f"{other}/{source}"):
                os.makedirs(there, exist_ok=True)
                os.link(f"{theirs}/{name}", f"{there}/{name}")


def loosened(session: nox.Session, *theirs: str) -> tuple[str, ...]:
    """The constraints, but for packages that something else in the environment has its own say about."""
    loose = Path(session.create_tmp()) / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    loose.write_text("\n".join(line for line in lines if not line.startswith(theirs)))
    return ("--constraint", str(loose))


def editable(*packages: str) -> list[str]:
    return [arg for package in packages for arg in ("--editable", package)]


def tests_of(package: str) -> str:
    return f"tests/{package.removeprefix('miles-').removeprefix('plugin-')}"


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lint everything; type-check every package, core included, strictly."""
    prepare(session, *editable(*PACKAGES), group="lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy", *(f"{package}/src" for package in PACKAGES))


@nox.session(python=False)
def budget(session: nox.Session) -> None:
    """Core stays small enough to read in an evening."""
    over = []
    for what, (limit, patterns) in BUDGETS.items():
        count = sum(len(f.read_text().splitlines()) for pattern in patterns for f in ROOT.glob(pattern))
        session.log(f"{what}: {count} of {limit} lines")
        if count > limit:
            over.append(f"{what} is {count - limit} lines over its budget of {limit}")
    if over:
        session.error("; ".join(over))


TRAINING, OTHERS = ("third_party",), ("lint", "build", "oracles")  # none of them asks how long something takes


@nox.session(python=False)
def side_by_side(session: nox.Session) -> None:
    """Sessions that keep one core busy each: a training on one side, all others on the other."""
    ask = (sys.executable, "-m", "nox", "--session")
    session.run(*ask, "lint", "--install-only")  # what both sides install is downloaded once
    with TemporaryFile("w+") as said:  # and told in one piece
        training = subprocess.Popen([*ask, *TRAINING], stdout=said, stderr=subprocess.STDOUT)
        try:
            session.run(*ask, *OTHERS)
        finally:
            status = training.wait()
            said.seek(0)
            print(said.read(), flush=True)
    if status:
        session.error(f"{', '.join(TRAINING)} failed: see above")


STANDS_ALONE = (
    "tests/contract/test_plugins.py",
    "tests/contract/test_hooks.py",
)  # the rest is the same beside any core


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """One package beside this checkout's core, and no other plugin."""
    prepare(session, *editable(*dict.fromkeys(("miles-core", package))), group="test")
    rules = ("tests/contract",) if package == "miles-core" else STANDS_ALONE
    session.run("pytest", *SPREAD, tests_of(package), *rules, *session.posargs)


@nox.session
def together(session: nox.Session) -> None:
    """Every plugin in one environment, as a container ships them; what only a GPU can run is at least imported."""
    prepare(session, *editable(*PACKAGES), group="test")
    session.run("pytest", "--collect-only", "--quiet", "-m", "gpu", "tests/gpu", silent=True)
    session.run("pytest", "tests/together", *STANDS_ALONE, *session.posargs)


FLOORS: dict[str, list[str]] = {}  # the plugins that say they work with a core, by the oldest one they name
for plugin in PLUGINS:
    FLOORS.setdefault(oldest(requirement(plugin, "miles-core")), []).append(plugin)


@nox.session
@nox.parametrize("version", list(FLOORS), ids=list(FLOORS))
def floor(session: nox.Session, version: str) -> None:
    """Plugins beside the oldest core, and the oldest pluggy of that core, that they say they work with."""
    if Version(version) == Version(str(project("miles-core")["version"])):
        core = "./miles-core"  # this checkout is that version, released or not
    else:
        core = f"miles-core @ git+{ROOT.as_uri()}@miles-core-v{version}#subdirectory=miles-core"
    prepare(session, "--reinstall-package=miles-core", core, *editable(*FLOORS[version]), group="test")
    session.install(f"pluggy=={oldest(requirement('miles-core', 'pluggy'))}")
    session.run("pytest", *SPREAD, *map(tests_of, FLOORS[version]), *STANDS_ALONE, *session.posargs)


@nox.session
@nox.parametrize("reference", ["trl", "verl"], ids=["trl", "verl"])
def oracles(session: nox.Session, reference: str) -> None:
    """Every formula against a reference's own code, in float64; without Ray and Megatron on our side.

    What a reference needs excludes what the other does, and what the constraints say of these.
    """
    loose = loosened(session, "transformers", "tokenizers", "huggingface-hub", "packaging")
    needs = [str(requirement("miles-core", name)) for name in FORMULAS]
    prepare(session, reference, *needs, group="test", constraints=loose)
    session.install("--no-deps", *editable(*PACKAGES))
    session.run("pytest", f"tests/oracles/{reference}", *session.posargs)


LONGEST = ("chaos", "together", "core")  # minutes for a file, which no other core can help with


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take more than ten seconds, the longest first: none is left when a core has nothing else to do."""
    names = [] if session.posargs else [folder.name for folder in sorted(ROOT.glob("tests/[a-z]*/"))]
    names.sort(key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST))
    marked(session, "slow", "--no-loadscope-reorder", *(f"tests/{name}" for name in names))


@nox.session
def chaos(session: nox.Session) -> None:
    """Runs under kills, two hundred in one; `-- --seed 7` for others than those of seed 0. Takes twenty minutes."""
    marked(session, "chaos", "tests/chaos", "tests/core/sglang", "tests/together/test_full_disk.py")


@nox.session
def gpu(session: nox.Session) -> None:
    """Tests that need a GPU, and SGLang; without network `python -m pytest -m gpu tests/gpu` does the same."""
    prepare(session, *editable("./miles-core[sglang]", *PLUGINS), group="test")
    session.run("pytest", "-m", "gpu", "tests/gpu", *session.posargs)


@nox.session
def sglang_cpu(session: nox.Session) -> None:
    """The engine with SGLang's own server, 0.5.23, on the CPU; some minutes, most of it the server's start.

    PyPI has no build of SGLang's kernels for a CPU; ``stand_ins`` are what it imports in their place.
    """
    here = "tests/sglang_cpu"
    loose = loosened(session, "torch", "triton", "transformers", "tokenizers", "sglang")
    needs = ("--requirement", f"{here}/requirements.txt", *editable("miles-core", "miles-plugin-grpo"))
    prepare(session, *needs, group="test", constraints=loose)
    session.install("--no-deps", "sglang==0.5.23")
    session.env.update({"PYTHONPATH": str(ROOT / here / "stand_ins"), "SGLANG_USE_CPU_ENGINE": "1"})
    # Once before several processes do it at a time: compiling all that is imported takes longer than the tests wait.
    session.run("python", "-m", "sglang.launch_server", "--help", silent=True)
    session.run("pytest", "-m", "sglang_cpu", here, *session.posargs)


def marked(session: nox.Session, marker: str, *where: str) -> None:
    prepare(session, *editable(*PACKAGES), group="test")
    session.run("pytest", *SPREAD, "-m", marker, *where, *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Sdists, and the wheels made of them; then what each installed wheel holds and answers, far from the checkout."""
    prepare(session, group="build")
    dist = built(session, PACKAGES)
    session.run("twine", "check", "--strict", *map(str, sorted(dist.glob("*.[wt]*"))))
    fresh = str(Path(session.create_tmp()).resolve() / "installed")
    for package in PACKAGES:
        both = [next(dist.glob(f"{name.replace('-', '_')}-*.whl")) for name in dict.fromkeys(("miles-core", package))]
        session.log(f"{both[-1].name}: {', '.join(sorted(ZipFile(both[-1]).namelist()))}")
        session.run("uv", "venv", "--clear", "--quiet", "--python", sys.executable, fresh)
        session.run("uv", "pip", "install", "--quiet", "--python", fresh, *CONSTRAINTS, *map(str, both))
        with session.chdir(session.create_tmp()):  # where no checkout could stand in for a file the wheel lacks
            session.run(f"{fresh}/bin/miles", "plugins", external=True)


def built(session: nox.Session, folders: Iterable[str], *only: str) -> Path:
    """Where their sdists and wheels are, and nothing else; ``--wheel`` for these alone."""
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for folder in folders:
        session.run("uv", "build", folder, *only, "--python", sys.executable, "--out-dir", str(dist), "--quiet",
                    "--build-constraints", "constraints.txt")  # fmt: skip
    return dist


def wheels(session: nox.Session, *folders: str) -> list[Path]:
    return sorted(built(session, folders, "--wheel").glob("*.whl"))


def trained(session: nox.Session, least: float, *keys: str) -> None:
    """Train what run.toml says on the quickstart's task, in the present folder, and look at what it has learned."""
    session.run("python", "-m", "miles_core.testing.reverse", "data")
    shutil.rmtree("run", ignore_errors=True)
    session.run("miles", "run", "run.toml", "--set", "run_dir=run", *(x for key in keys for x in ("--set", key)))
    accuracy = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["eval/accuracy"]
    session.log(f"held-out accuracy {accuracy:.2f}, at least {least} is asked for")
    if accuracy < least:
        session.error("it has not learned")


@nox.session
def third_party(session: nox.Session) -> None:
    """A stranger's package, from its wheel and beside core's wheel alone: its own tests, then its training."""
    package = ROOT / "examples/third_party/miles-plugin-kto"
    core, kto = wheels(session, "miles-core", str(package))
    fresh = [f"--reinstall-package={name}" for name in ("miles-core", package.name)]
    prepare(session, *fresh, str(core), f"{kto}[test]")
    with session.chdir(session.create_tmp()):
        session.run("pytest", str(package / "tests"), "-p", "no:cacheprovider")
        shutil.copy(package / "run.toml", ".")
        trained(session, 0.75)  # it was seen to reach 0.87


@nox.session(reuse_venv=False)  # where an older probe is installed, its name is taken
def new_plugin(session: nox.Session) -> None:
    """What `miles new plugin` writes, far from this checkout: installed beside core's wheel, tested, trained."""
    (core,) = wheels(session, "miles-core")
    prepare(session, "--reinstall-package=miles-core", str(core))
    with TemporaryDirectory() as far:  # where no file of this checkout is above it, pytest's settings neither
        with session.chdir(far):
            session.run("miles", "new", "plugin", "probe")
        package = Path(far) / "miles-plugin-probe"
        session.install(*CONSTRAINTS, "--reinstall-package=miles-plugin-probe", f"{package}[test]")
        with session.chdir(package):
            session.run("pytest")
            trained(session, 0.9, "steps=80")  # it was seen to reach 1.00 in 60 of its 120


@nox.session
def quickstart(session: nox.Session) -> None:
    """From nothing to a trained model: make the example's data, then run it."""
    session.log("installing torch, Megatron-core, Ray and Miles; the first time downloads about 3 GB")
    prepare(session, *editable("miles-core", "miles-plugin-grpo"), silent=False)
    session.run("python", "examples/reverse/make.py")
    session.run("miles", "run", "examples/reverse/run.toml", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what the tables in benchmarks/ say, on this machine; give a name to run one of them."""
    prepare(session, *editable(*PACKAGES))
    for script in sorted(ROOT.glob("benchmarks/*.py")):
        if not session.posargs or script.stem in session.posargs:
            session.run("python", str(script.relative_to(ROOT)))


@nox.session
def bench_trl(session: nox.Session) -> None:
    """Miles against TRL's GRPOTrainer, which gets an environment of its own with the same torch."""
    prepare(session, *editable("miles-core", "miles-plugin-grpo"))
    trl = f"{session.create_tmp()}/trl"
    session.run("uv", "venv", "--clear", "--quiet", "--python", sys.executable, trl)
    session.run("uv", "pip", "install", "--quiet", "--python", trl, "trl==1.16.0", "torch==2.11.0")
    session.run("python", "benchmarks/trl/compare.py", "--trl-python", f"{trl}/bin/python", *session.posargs)
