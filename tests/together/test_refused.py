"""Bad input at run time: status 2, one readable line, nothing left running."""

import json

import pytest
from miles_core.testing.runs import INLINE
from whole_runs import in_threads, processes_of

pytestmark = pytest.mark.slow

REWARDS = {
    "raises": ('raise ValueError("odd digits")', ["raises", "sample 1/0", "ValueError: odd digits"]),
    "nan": ('return {"mine": [float("nan")] * len(group.samples)}', ["reward mine, sample 1/0: nan is not a finite"]),
    "count": ('return {"mine": [1.0]}', ["reward mine, group 1: 1 values for 4 samples"]),
}


def plugin(runs, name, body, *more):
    (runs.folder / f"{name}.py").write_text(
        "from miles_core import Plugin, hookimpl\n\n\nclass P(Plugin):\n    @hookimpl\n"
        f"    async def miles_reward(self, group, evaluating):\n        {body}\n"
    )
    return ["--set", f"plugins={json.dumps([f'./{name}.py', *more])}", "--set", "eval.every=0", "--set", "steps=1"]


@pytest.mark.parametrize("name", ["nan", "count"])
def test_a_plugin_whose_rewards_cannot_be_used(runs, name):
    body, said = REWARDS[name]
    threads = [] if name == "nan" else [str(INLINE)]  # what processes leave behind is the same for both
    err = runs.run(f"bad-{name}", *plugin(runs, name, body, *threads), expect=2).stderr
    assert all(text in err for text in said), err
    assert "Traceback" not in err
    assert not processes_of(str(runs.folder / f"bad-{name}"))


def test_a_plugin_that_raises_is_named(runs):
    body, _ = REWARDS["raises"]
    err = runs.run("bad-raises", *plugin(runs, "raises", body, str(INLINE)), expect=2).stderr
    assert "plugin raises: miles_reward raised ValueError: odd digits" in err and "Traceback" not in err
    assert "raises.py" in (runs.folder / "bad-raises" / "error.log").read_text()  # where its author looks


def test_a_scorer_that_raises_names_the_sample(runs):
    (runs.folder / "scorer.py").write_text("def score(sample):\n    return 1 / 0\n")
    keys = ["reward.mine.kind=python", "reward.mine.path=./scorer.py:score", "eval.every=0", f'plugins=["{INLINE}"]']
    err = runs.run("bad-scorer", *(x for key in keys for x in ("--set", key)), expect=2).stderr
    assert "mine" in err and "1/0" in err and "ZeroDivisionError" in err and "Traceback" not in err


def test_a_run_folder_that_cannot_be_written(runs):
    err = runs.run("/proc/nowhere", expect=2).stderr
    assert "/proc/nowhere" in err and "Traceback" not in err


def test_a_checkpoint_cut_in_half_is_passed_over(runs, capsys):
    file, folder = runs.folder / "run.toml", runs.folder / "cut"
    in_threads(file, folder)
    part = max((folder / "checkpoints/step-000006/policy").rglob("*"), key=lambda p: p.stat().st_size)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    capsys.readouterr()
    in_threads(file, folder, resume=True)
    out = capsys.readouterr().out
    assert "step-000006 is not whole" in out and "going on after step 4" in out
    assert [row["step"] for row in runs.metrics("cut")] == [0, 1, 2, 3, 4, 5, 6]
