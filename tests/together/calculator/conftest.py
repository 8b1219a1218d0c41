"""The calculator example as a rollout worker has it, with policies that say what a test wants."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from calculator_cases import PROMPT, RUN, module
from miles_core.edges.protocols import Completion
from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble
from miles_core.types import Group, Sample


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A run of the example with random weights, and one more token: "12", which encoding prefers to "1" and "2"."""
    folder = tmp_path_factory.mktemp("calculator")
    make = module("make")
    make.write_tokenizer(folder / "model")
    path = folder / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["12"] = len(content["model"]["vocab"])
    content["model"]["merges"] = [["1", "2"]]
    path.write_text(json.dumps(content))
    model = make.new_model()
    model.resize_token_embeddings(len(content["model"]["vocab"]))
    model.save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text(json.dumps({"prompt": PROMPT, "answer": "42"}) + "\n")
    (folder / "run.toml").write_text(RUN)
    return folder


@pytest.fixture(scope="session")
def ids(folder):
    """Token ids one character at a time, as a policy may write them and encoding would not."""
    vocabulary = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    marks = ["<call>", "</call>", "<result>", "</result>", "<eos>"]

    def spell(text):
        found = []
        while text:
            piece = next((mark for mark in marks if text.startswith(mark)), text[0])
            found.append(vocabulary[piece])
            text = text[len(piece) :]
        return found

    return spell


@pytest.fixture
def hooks(folder):
    """``hooks(turns=3)``: the plugins of a run with these keys of [calculator], as a rollout worker has them."""

    def load(max_tokens=60, **keys):
        overrides = [f"calculator.{key}={json.dumps(value)}" for key, value in keys.items()]
        source = Source((folder / "run.toml",), (*overrides, f"rollout.max_tokens={max_tokens}"))
        registry = assemble(source).registry("rollout")
        registry.rollout_start()
        return registry

    return load


@pytest.fixture
def rolled(hooks, ids):
    """``rolled([said in turn 1, in turn 2, ...], ...)``: what comes of policies that say just that."""

    def roll(*attempts, answer="42", **keys):
        registry, asked = hooks(**keys), []
        samples = [Sample(PROMPT, {"answer": answer}, f"5/{i}", seed=i) for i in range(len(attempts))]
        group = Group(5, samples)

        async def generate(requests):
            asked.append(requests)
            return [completion(ids(attempts[int(r.id[2])][len(asked) - 1])) for r in requests]

        def completion(tokens):
            n, version = len(tokens), len(asked)
            stopped = tokens[-1] in (ids("<eos>")[0], ids("</call>")[0])
            return Completion(
                tokens, [-0.1 * (i + 1) for i in range(n)], [version] * n, "stop" if stopped else "length"
            )

        async def both():
            await registry.rollout(group=group, engine=SimpleNamespace(generate=generate), evaluating=False)
            return await registry.reward(group=group, evaluating=False)

        rewards = asyncio.run(both())
        return SimpleNamespace(group=group, samples=samples, asked=asked, rewards=rewards)

    return roll
