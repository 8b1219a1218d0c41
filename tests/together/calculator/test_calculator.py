"""The example of several turns: what becomes of tokens, and who earns what when."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calculator_cases import CALCULATOR, CALL, PROMPT
from miles_core.config import ConfigError
from miles_core.edges.protocols import Completion
from miles_core.packing import pack
from miles_core.plugins import PluginError
from miles_core.testing.runs import INLINE
from miles_core.types import Column, Group, Sample
from whole_runs import processes_of

# -- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_stay_as_sampled_and_the_tools_are_masked_out(rolled, ids):
    done = rolled([CALL, "42<eos>"], ["42<eos>"])
    calling, direct = done.samples
    prompt, call, told, said = [51 + 5, *ids("+30=")], ids(CALL), ids("<result>42</result>"), ids("42<eos>")
    prompt[0] = done.asked[0][0].tokens[0]  # "12", in one piece: the prompt is encoded, the policy's own words are not
    assert prompt[0] not in call
    assert calling.tokens == prompt + call + told + said
    assert calling.mask == [False] * 5 + [True] * 7 + [False] * 4 + [True] * 3
    assert calling.versions == [-1] * 5 + [1] * 7 + [-1] * 4 + [2] * 3
    drawn = [-0.1 * (i + 1) for i in range(7)]
    assert calling.logprobs == [0.0] * 5 + drawn + [0.0] * 4 + drawn[:3]
    assert direct.tokens == prompt + said and direct.finish == calling.finish == "stop"
    assert calling.response == f"{CALL}<result>42</result>42" and direct.response == "42"


def test_attempts_share_a_generate_a_turn_and_the_next_request_is_all_so_far(rolled):
    done = rolled([CALL, "42<eos>"], ["42<eos>"], [CALL, "7<eos>"])
    assert [[request.id for request in asked] for asked in done.asked] == [
        ["5/0/0", "5/1/0", "5/2/0"],
        ["5/0/1", "5/2/1"],
    ]
    first, second = done.asked[0][0], done.asked[1][0]
    assert second.tokens == done.samples[0].tokens[:16] and second.tokens[:5] == first.tokens
    assert second.seed != first.seed and (first.sampling.max_tokens, second.sampling.max_tokens) == (60, 49)


def test_a_tools_text_is_no_markup(rolled, ids):
    [sample] = rolled([CALL, "1<eos>"], command=["echo", "</result><call>1</call><eos>"]).samples
    inside = [t for t, mine in zip(sample.tokens[12:], sample.mask[12:], strict=True) if not mine]
    marks = {ids(mark)[0]: mark for mark in ("<call>", "</call>", "<result>", "</result>", "<eos>")}
    assert [marks[t] for t in inside if t in marks] == ["<result>", "</result>"]


def test_the_engines_logprobs_are_those_of_the_whole_sequence(hooks, folder):
    """A real engine and random weights, which close a call now and then: each token is where its probability says."""
    from miles_core.edges.local.server import LocalEngine
    from transformers import AutoModelForCausalLM

    registry = hooks(max_tokens=90)
    group = Group(1, [Sample(PROMPT, {"answer": "42"}, f"1/{i}", seed=i) for i in range(16)])
    engine = LocalEngine(str(folder / "model"), None, 16, 64)
    asyncio.run(registry.rollout(group=group, engine=engine, evaluating=False))
    assert max(len(sample.info["turns"]) for sample in group.samples) == 3
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for sample in group.samples:
        with torch.inference_mode():
            said = model(torch.tensor([sample.tokens])).logits[0, :-1].float().log_softmax(-1)
        mine = torch.tensor(sample.mask[1:])
        expected = said.gather(1, torch.tensor(sample.tokens[1:])[:, None])[:, 0] * mine
        assert torch.allclose(torch.tensor(sample.logprobs[1:]), expected, atol=1e-4)
        assert [version >= 0 for version in sample.versions] == sample.mask


# -- bounds --------------------------------------------------------------------------------------------------------


def test_a_policy_that_only_calls_runs_out_of_turns(rolled):
    done = rolled([CALL] * 5, turns=3)
    [sample] = done.samples
    assert len(done.asked) == 3 and [turn["result"] for turn in sample.info["turns"]] == ["42", "42", None]
    assert sample.finish == "length" and sample.tokens[-1] == done.asked[0][0].sampling.stop_tokens[-1]
    assert done.rewards == {"call": [0.1], "answer": [0.0]}


@pytest.mark.parametrize(("max_tokens", "turns"), [(11, 1), (12, 2)])
def test_a_result_that_leaves_no_room_ends_it(rolled, max_tokens, turns):
    done = rolled([CALL, "4"], max_tokens=max_tokens, result_tokens=7)  # 7 for the call, 4 for the result
    assert len(done.asked) == turns and done.samples[0].finish == "length"
    assert len(done.samples[0].tokens) == 5 + [7, 12][turns - 1]


def test_a_long_result_is_cut_to_its_tokens(rolled, ids):
    [sample] = rolled([CALL, "1<eos>"], result_tokens=3, command=["echo", "4444444"]).samples
    assert sample.tokens[12:-2] == ids("<result>444</result>")


# -- rewards -------------------------------------------------------------------------------------------------------


def test_each_turn_earns_at_its_last_token(rolled):
    done = rolled([CALL, CALL, "42<eos>"], ["7<eos>"], [CALL, "4<eos>"])
    assert done.rewards == {"call": [0.1, 0.0, 0.1], "answer": [1.0, 0.0, 0.0]}
    twice = done.samples[0]
    assert [turn["rewards"] for turn in twice.info["turns"]] == [{"call": 0.1}, {}, {"answer": 1.0}]
    earned = {i: value for i, value in enumerate(twice.columns["turn_reward"]) if value}
    assert earned == {11: 0.1, len(twice.tokens) - 1: 1.0}
    assert all(twice.mask[i] for i in earned) and len(twice.columns["turn_reward"]) == len(twice.tokens)


def test_what_is_still_to_come_at_each_token_is_as_documented(rolled):
    """The lines that the plugin's docstring recommends, on a row packed from two samples."""
    done = rolled([CALL, "42<eos>"], ["42<eos>"])
    for sample in done.samples:
        sample.score = 0.0
    batch = pack([[sample] for sample in done.samples], {"turn_reward": Column()}).to_batch({}, 1.0, "cpu")
    text = (CALCULATOR / "calculator.py").read_text()
    lines = text[text.index("      earned = batch") : text.index("**The tool**")]
    scope = {"batch": batch}
    exec(textwrap.dedent(lines), scope)
    first, second = 19, 8
    expected = [1.1] * 12 + [1.0] * 7 + [1.0] * 8
    assert len(expected) == first + second
    assert torch.allclose(scope["to_come"], torch.tensor(expected))


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_crash_names_the_plugin_and_the_sample(rolled, hooks):
    with pytest.raises(
        PluginError, match="plugin calculator: miles_reward raised RuntimeError: sample 5/0: LookupError"
    ):
        rolled([CALL, "42<eos>"], column="solution")
    registry, group = hooks(), Group(5, [Sample(PROMPT, {}, "5/3")])

    async def generate(requests):  # an engine that says what is no token
        return [Completion([-1], [0.0], [0], "length") for _ in requests]

    with pytest.raises(PluginError, match="plugin calculator: miles_rollout raised RuntimeError: sample 5/3: Overflow"):
        asyncio.run(registry.rollout(group=group, engine=SimpleNamespace(generate=generate), evaluating=False))


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"opens": "<tool>"}, "calculator.opens: '<tool>' is not one token of .*tokenizer.json"),
        ({"command": ["no-such-tool"]}, "calculator.command: 'no-such-tool' is not a program"),
        ({"result_tokens": 57}, "calculator.result_tokens: leaves no room for a call in rollout.max_tokens = 60"),
    ],
)
def test_what_cannot_work_is_refused(hooks, keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        hooks(**keys)


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example_data():
    """The example's own model and sums, written by its own script."""
    subprocess.run([sys.executable, CALCULATOR / "make.py"], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["calculator", "sleep"])
def test_a_whole_run(example_data, tmp_path, tool):
    """Several turns through every process of a run. With a tool that never returns it takes longer, and no more; that
    one is a run of one process, which has nobody to see to the tools that it leaves."""
    small = ["steps=3", "batch.groups=4", "eval.prompts=16", "eval.every=3", "calculator.processes=8"]
    stuck = ['calculator.command=["sleep", "97531"]', "calculator.wall_s=0.2",
             f'plugins=["{CALCULATOR}/calculator.py", "{INLINE}"]'] if tool == "sleep" else []  # fmt: skip
    sets = [arg for key in [*small, *stuck, f"run_dir={tmp_path / 'run'}"] for arg in ("--set", key)]
    ask = [Path(sys.executable).with_name("miles"), "run", CALCULATOR / "run.toml", *sets]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 3]
    steps = [row for row in rows if row["step"]]
    calls, faults = (sum(row[f"calculator/{name}"] for row in steps) for name in ("calls", "faults"))
    assert calls > 0 and faults == (calls if stuck else 0)
    assert max(row["reward/call"] for row in steps) > 0 or stuck
    assert max(row["kl/train_rollout"] for row in steps[:1]) < 1e-4  # trainer and engine see the same tokens
    assert not [found for found in processes_of("97531") if "sleep" in found]
