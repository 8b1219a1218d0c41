"""A model folder with nothing but a tokenizer and a configuration, and a plugin on files of the test's own."""

import json

import pytest
from miles_core.config import RunConfig
from miles_core.edges.data import Data


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<eos>", *"0123456789>:au "])}, merges=[])
    )
    tokenizer.decoder = decoders.Fuse()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    whole.chat_template = (
        "{% for m in messages %}{{ m['content'] }}:{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    whole.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 12}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    return folder


@pytest.fixture
def data(tmp_path, model):
    """``data(rows, key=value)``: the plugin on a train file of these rows, given as objects or as lines of text."""

    def make(rows, suffix=".jsonl", seed=0, run=None, **keys):
        path = tmp_path / f"train{suffix}"
        if suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
        else:
            path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        tables = {"model": {"path": str(model)}, "rollout": {"max_tokens": 4}, **(run or {})}
        config = RunConfig(algorithm="a", seed=seed, **tables)
        return Data(Data.Config(train=path, **keys), config)

    return make


@pytest.fixture
def complaints(data, tmp_path):
    def check(*args, tables=None, **kwargs):
        found = []
        data(*args, **kwargs).miles_check(
            lambda key, message: found.append((key, message.replace(f"{tmp_path}/", ""))), tables or {}
        )
        return found

    return check
