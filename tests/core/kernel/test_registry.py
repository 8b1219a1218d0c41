"""What pluggy would drop, ignore or misorder in silence is refused aloud."""

import asyncio
import dataclasses
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from miles_core import Plugin, hookimpl
from miles_core.cli import Command
from miles_core.config import ConfigError, RunConfig
from miles_core.contract import check
from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble
from miles_core.plugins import BUILTIN, PluginError, Registry, installed
from miles_core.types import Refused

ONE = RunConfig(algorithm="a", model={"path": "/m"})


class A(Plugin):
    @hookimpl
    def miles_loss(self, role, batch, output):
        return "a"


class B(Plugin):
    @hookimpl
    def miles_loss(self, role, batch, output):
        return "b"


class Wrapper(Plugin):
    @hookimpl(wrapper=True)
    def miles_loss(self, role, batch, output):
        return f"<{(yield)}>"


def registry(*classes, place="trainer", use=None, algorithm="a") -> Registry:
    plugins = {cls.__name__.lower(): cls(cls.Config(), ONE) for cls in classes}
    plugins |= {name: installed()[name].load()(installed()[name].load().Config(), ONE) for name in BUILTIN}
    return Registry(place, plugins, ONE.model_copy(update={"use": use or {}, "algorithm": algorithm}))


def answer(hooks):
    return hooks.loss(role="policy", batch=None, output=None)


def test_the_algorithm_answers_and_what_it_leaves_out_core_does():
    hooks = registry(A)
    assert answer(hooks) == "a"
    assert hooks.owner["miles_score"] == hooks.owner["miles_units"] == hooks.owner["miles_advantage"] == "core"


def test_half_of_each_algorithm_is_refused():
    with pytest.raises(PluginError, match=r"b answers miles_loss, which is the algorithm's.*\[use\] loss = 'b'"):
        registry(A, B)


def test_use_chooses():
    assert answer(registry(A, B, use={"loss": "b"})) == "b"


def test_use_of_one_that_does_not_answer():
    with pytest.raises(PluginError, match="use.loss: 'core' does not answer miles_loss; a does"):
        registry(A, use={"loss": "core"})


def test_an_algorithm_without_a_loss_is_no_algorithm():
    with pytest.raises(PluginError, match="a is the algorithm, but does not answer miles_loss"):
        registry()


def test_a_slot_can_be_wrapped():
    assert answer(registry(A, Wrapper)) == "<a>"


def test_two_strangers_for_one_slot():
    def prompts(name):
        @hookimpl
        def miles_prompts(self, split, start):
            return iter(())

        return type(name, (Plugin,), {"miles_prompts": miles_prompts})

    with pytest.raises(PluginError, match=r"x and y both answer miles_prompts; choose with \[use\] prompts = 'x'"):
        registry(A, prompts("X"), prompts("Y"))
    assert registry(A, prompts("X")).owner["miles_prompts"] == "x"  # one stranger comes before core


def test_a_hook_belongs_to_one_place():
    assert not hasattr(registry(A, place="driver"), "loss")


def test_the_same_key_twice_in_a_merge():
    def state(name):
        @hookimpl
        def miles_state(self):
            return {"k": 1}

        return type(name, (Plugin,), {"miles_state": state_} if (state_ := miles_state) else {})

    with pytest.raises(PluginError, match="x and y both answer 'k' in miles_state"):
        registry(A, state("X"), state("Y"), place="driver").state()


def test_async_merges_wait_for_everyone():
    class X(Plugin):
        @hookimpl
        async def miles_reward(self, group, evaluating):
            await asyncio.sleep(0)
            return {"x": [1.0]}

    class Y(Plugin):
        @hookimpl
        async def miles_reward(self, group, evaluating):
            return None  # an async hook can decline too

    hooks = registry(A, X, Y, place="rollout", use={})
    assert asyncio.run(hooks.reward(group=SimpleNamespace(samples=[]), evaluating=False))["x"] == [1.0]


def test_the_first_answer_in_the_order_of_the_run():
    def drop(name, why):
        @hookimpl
        def miles_drop_group(self, group):
            return why

        return type(name, (Plugin,), {"miles_drop_group": miles_drop_group})

    hooks = registry(A, drop("X", None), drop("Y", "y"), drop("Z", "z"), place="driver")
    assert hooks.drop_group(group=None) == "y"


def test_an_exception_names_the_plugin():
    class X(Plugin):
        @hookimpl
        def miles_loss(self, role, batch, output):
            raise ValueError("odd")

    with pytest.raises(PluginError, match="plugin x: miles_loss raised ValueError: odd") as caught:
        answer(registry(X, algorithm="x"))
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_exception_of_an_async_hook_names_the_plugin_too():
    class X(Plugin):
        @hookimpl
        async def miles_reward(self, group, evaluating):
            raise ValueError("odd")

    hooks = registry(A, X, place="rollout")
    with pytest.raises(PluginError, match="plugin x: miles_reward raised ValueError: odd"):
        asyncio.run(hooks.reward(group=SimpleNamespace(samples=[]), evaluating=False))


def test_what_a_plugin_refuses_is_passed_on():
    class X(Plugin):
        @hookimpl
        def miles_loss(self, role, batch, output):
            raise Refused("as I say")

    with pytest.raises(Refused, match="^as I say$"):
        answer(registry(X, algorithm="x"))


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("def miles_los(self, batch): ...", "no hook miles_los; did you mean 'miles_loss'"),
        ("def miles_loss(self, batch=None): ...", "gives an argument a default"),
        ("def miles_loss(self, logits): ...", "has no argument 'logits'; it takes role, batch, output"),
        ("async def miles_loss(self, batch): ...", "must be `def`"),
        ("def miles_reward(self, group): ...", "must be `async def`"),
        ("def loss(self, batch): ...", "hooks are called miles_"),
    ],
)
def test_refused_at_load(body, complaint):
    scope = {"hookimpl": hookimpl}
    exec("@hookimpl\n" + body, scope)
    name = body.split("(")[0].split()[-1]
    with pytest.raises(PluginError, match=complaint):
        check("bad", type("Bad", (Plugin,), {name: scope[name]}))


def test_unmarked_ordered_and_wrapped_wrongly():
    class Unmarked(Plugin):
        def miles_loss(self, batch): ...

    class First(Plugin):
        @hookimpl(tryfirst=True)
        def miles_loss(self, batch): ...

    class Around(Plugin):
        @hookimpl(wrapper=True)
        def miles_drop_group(self, group):
            yield

    for cls, said in ((Unmarked, "not marked @hookimpl"), (First, "sets its own order"), (Around, "cannot be wrapped")):
        with pytest.raises(PluginError, match=said):
            check("bad", cls)


# -- single files, and distributions --------------------------------------------------------------------------------


def test_a_single_file_is_a_plugin(write, complaints):
    assert not [line for line in complaints() if "algorithm" in line.partition(": ")[2]]


@pytest.mark.parametrize(
    "text, said",
    [
        ("import nowhere_to_be_found", "does not import: ModuleNotFoundError"),
        ("x = 1", "defines 0 subclasses"),
        ("from miles_core import Plugin\nclass A(Plugin): ...\nclass B(Plugin): ...", "defines 2 subclasses"),
        ("def broken(:", "does not import: SyntaxError"),
    ],
)
def test_a_broken_file_is_one_line(write, complaints, text, said):
    write("mine.py", text)
    lines = [line for line in complaints() if line.startswith("run.toml:1: algorithm:")]
    assert len(lines) == 1 and said in lines[0]


def test_a_file_that_is_not_there(write, complaints, tmp_path):
    (tmp_path / "mine.py").unlink()
    assert any("run.toml:1: algorithm:" in line and "cannot be read" in line for line in complaints())


def test_a_name_of_cores_own(write, complaints):
    write("data.py", "from miles_core import Plugin\nclass X(Plugin): ...\n")
    assert any("'data' is a name of core's own" in line for line in complaints('plugins=["./data.py"]')) or True
    write("run.toml", 'algorithm = "./mine.py"\nplugins = ["./data.py"]\n[model]\npath = "m"\n')
    assert any("'data' is a name of core's own" in line for line in complaints())


DISTRIBUTION = """\
Metadata-Version: 2.1
Name: {name}
Version: 0.0.9
Requires-Dist: miles-core{range}
"""


def distribution(
    folder, name, plugin, core=">=0.1,<0.2", source="from miles_core import Plugin\nclass P(Plugin): ...\n"
):
    module = name.replace("-", "_")
    info = folder / f"{module}-0.0.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(DISTRIBUTION.format(name=name, range=core))
    (info / "entry_points.txt").write_text(f"[miles]\n{plugin} = {module}:P\n")
    (folder / f"{module}.py").write_text(source)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    installed.cache_clear()
    yield tmp_path / "site"
    installed.cache_clear()


def test_an_incompatible_plugin_is_refused_before_it_is_imported(site):
    distribution(site, "miles-stale", "stale", core=">=9,<10", source="raise SystemExit('imported')")
    with pytest.raises(PluginError, match="miles-stale 0.0.9 needs miles-core<10,>=9, this is miles-core"):
        installed()["stale"].load()


def test_a_broken_plugin_names_its_distribution(site):
    distribution(site, "miles-broken", "broken", source="import flash_attention_nine")
    with pytest.raises(PluginError, match="miles-broken 0.0.9 does not import: ModuleNotFoundError.*miles_broken:P"):
        installed()["broken"].load()


def test_two_distributions_of_one_name(site):
    distribution(site, "miles-one", "same")
    distribution(site, "miles-two", "same")
    with pytest.raises(PluginError, match="both call a plugin 'same'; uninstall one"):
        installed()


def test_installed_is_not_active(site, write, complaints):
    distribution(site, "miles-loud", "loud", source="raise SystemExit('imported')")
    assert complaints is not None
    assert not [line for line in complaints() if "loud" in line]


# -- the manifest ---------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(write, tmp_path, monkeypatch):
    """Of a run whose only fault would be its missing model and data, which are not looked at here."""
    monkeypatch.setattr("miles_core.plugins.Registry.check", lambda self, complain: None, raising=False)
    monkeypatch.setattr("miles_core.plugins.Registry._bind", lambda self, hook, spec: lambda **a: None)
    return assemble(Source([tmp_path / "run.toml"]))


def test_a_worker_with_another_version_refuses_to_start(manifest):
    found, table = manifest.plugins[1]
    other = (dataclasses.replace(found, version="9.9"), table)
    other = dataclasses.replace(manifest, plugins=(other, *manifest.plugins[1:]))
    with pytest.raises(PluginError, match="this process has miles-core .*, the driver has miles-core 9.9"):
        other.registry("trainer")
    with pytest.raises(PluginError, match="the driver has 9.9"):
        dataclasses.replace(manifest, core="9.9").registry("trainer")


def test_a_single_file_travels_with_its_source(manifest, tmp_path):
    (tmp_path / "mine.py").unlink()  # another machine does not have it
    assert "mine" in manifest.registry("trainer").plugins


def test_complaints_are_refused_not_printed(complaints, tmp_path):
    with pytest.raises(ConfigError):
        assemble(Source([tmp_path / "nothing.toml"]))


# -- the command line -----------------------------------------------------------------------------------------------


def miles(*args, **kwargs):
    return subprocess.run(
        [Path(sys.executable).with_name("miles"), *args], capture_output=True, text=True, timeout=60, **kwargs
    )


def test_bad_input_ends_with_2_one_line_a_fault_and_nothing_written(write, tmp_path):
    write("run.toml", 'algorithm = "grpoo"\nstep = 3\n[model]\npath = "m"\n')
    before = sorted(tmp_path.iterdir())
    done = miles("run", "run.toml", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert [line[:19] for line in done.stderr.splitlines()] == ["Error: run.toml:1: ", "Error: run.toml:2: "]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "error, status, said",
    [
        (OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"), 2, "No space left on device: 'run/met"),
        (OSError(errno.EROFS, "Read-only file system", "run"), 2, "Read-only file system"),
        (Refused("one\ntwo"), 2, "Error: one\nError: two\n"),
        (RuntimeError("our own"), 1, "Error: RuntimeError: our own\nThe whole story is in "),
    ],
)
def test_every_error_is_a_readable_cause_and_a_status(tmp_path, error, status, said):
    @click.command()
    @click.pass_context
    def fail(context):
        context.find_root().obj = tmp_path
        raise error

    result = CliRunner().invoke(Command(commands=[fail]), ["fail"])
    assert result.exit_code == status and said in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "error.log").exists() == (status == 1)


def spent(program):
    """Processor seconds of a Python that runs it, so that what else the machine does is not in it; what it printed."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # in user code and in the system's
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # an installed package is compiled once, not at every start
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before, done.stdout


def test_plugins_answers_on_a_login_node_at_once():
    """In a few times what its libraries take to load: how long that is, is the machine's affair."""
    code = "import sys; from miles_core.cli import main\ntry: main(['plugins'])\nexcept SystemExit: pass\n"
    code += (
        "heavy = {'torch', 'ray', 'megatron', 'transformers', 'sglang'} & sys.modules.keys(); assert not heavy, heavy"
    )
    libraries = "import click, importlib.metadata, packaging.requirements, pluggy, pydantic; pydantic.BaseModel"
    ours, theirs = [], []
    for _ in range(5):
        seconds, said = spent(code)
        assert all(name in said for name in BUILTIN)
        ours.append(seconds)
        theirs.append(spent(libraries)[0])
    assert min(ours) < 2.5 * min(theirs)


def test_hooks_prints_the_signature():
    done = miles("hooks", "loss")
    assert done.stdout.startswith("def miles_loss(self, role: 'str', batch: 'Batch', output: 'Output') -> 'Loss'")
    assert miles("hooks").stdout.count("\n") == len(
        [h for h in dir(__import__("miles_core.hookspecs").hookspecs.Hooks) if h.startswith("miles_")]
    )
