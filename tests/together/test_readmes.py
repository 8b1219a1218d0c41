"""What a plugin's README has one copy into a run file is accepted, once the names of files are one's own."""

import json
import re
from pathlib import Path

import pytest
from miles_core.edges.toml import Source
from miles_core.edges.toml.assemble import assemble
from miles_core.testing.runs import write_tiny

ROOT = Path(__file__).parents[2]
PLUGINS = sorted(path.parent.name.removeprefix("miles-plugin-") for path in ROOT.glob("miles-plugin-*/README.md"))


def snippets():
    for name in PLUGINS:
        text = (ROOT / f"miles-plugin-{name}" / "README.md").read_text()
        for i, block in enumerate(re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
            yield pytest.param(name, block, id=f"{name}-{i}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, and rows that have whatever column a README speaks of."""
    folder = write_tiny(tmp_path_factory.mktemp("data"))
    config = folder / "model/config.json"  # with room for the default of rollout.max_tokens
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    for split in ("train", "eval"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {"chosen": row["answer"], "rejected": row["wrong"], "response": row["answer"]}
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("name", "block"), list(snippets()))
def test_a_snippet_is_accepted(name, block, data, tmp_path):
    (tmp_path / "run.toml").write_text(block)
    keys = [f'model.path="{data}/model"', f'data.train="{data}/train.jsonl"', f'data.eval="{data}/eval.jsonl"']
    if "algorithm" not in block:
        keys.append(f'algorithm="{name}"')
    if "[reward" not in block:
        keys.append("reward.positions.weight=1.0")
    assemble(Source([tmp_path / "run.toml"], keys))


def test_every_readme_of_a_plugin_has_one():
    assert {param.values[0] for param in snippets()} == set(PLUGINS)
