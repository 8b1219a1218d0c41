"""What is wrong with a dataset is found before anything starts, and every fault names its file and line."""

import shutil
import subprocess
import sys

import pytest
from miles_core.types import Refused
from pydantic import ValidationError


def rows(n=3):
    return [{"prompt": f"{i}>", "answer": str(i)} for i in range(n)]


def test_good_rows_are_passed(complaints):
    assert complaints(rows()) == complaints(rows(), suffix=".parquet") == []


def test_a_missing_file(complaints, tmp_path):
    found = complaints(rows(), eval=tmp_path / "absent.jsonl")
    assert found == [("data.eval", "absent.jsonl: no such file")]


@pytest.mark.parametrize("content", [[], ["\n", "  \n"]])
def test_an_empty_file(complaints, content):
    assert complaints(content) == [("data.train", "train.jsonl: the file has no rows")]


def test_malformed_lines_are_numbered_blank_ones_counted(complaints):
    found = complaints(['{"prompt": "1"}\n', "\n", '{"prompt": \n', "[1]\n"])
    assert [key for key, _ in found] == ["data.train"] * 2
    assert found[0][1].startswith("train.jsonl:3: not JSON: ")
    assert found[1][1] == "train.jsonl:4: a row must be a JSON object, this is list"


def test_a_missing_column_names_those_there_are(complaints):
    assert complaints([{"prompt": "1"}, {"question": "1"}]) == [
        ("data.train", "train.jsonl:2: no column 'prompt'; the row has 'question'")
    ]
    found = complaints([{"question": "1"}], suffix=".parquet")
    assert found == [("data.train", "train.parquet: row 1: no column 'prompt'; the row has 'question'")]


@pytest.mark.parametrize("value, said", [(5, "this is int"), ("", "is empty"), (None, "this is NoneType")])
def test_a_prompt_of_the_wrong_type(complaints, value, said):
    (fault,) = complaints([{"prompt": value}])
    assert fault[1].startswith("train.jsonl:1: prompt ") and said in fault[1]


@pytest.mark.parametrize("messages", [[], ["1"], [{"role": "user"}], [{"role": "user", "content": 1}]])
def test_messages_of_the_wrong_shape(complaints, messages):
    assert "train.jsonl:1: prompt must hold messages such as" in complaints([{"prompt": messages}])[0][1]


def test_messages_need_a_template(complaints, model, tmp_path):
    chat = [{"prompt": [{"role": "user", "content": "1"}]}]
    assert complaints(chat) == complaints(chat, chat_template=True) == []
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    run = {"model": {"path": str(bare)}}
    assert "train.jsonl:1: is a list of chat messages, but bare has no chat template" in complaints(chat, run=run)[0][1]
    ((key, said),) = complaints(rows(), run=run, chat_template=True)
    assert key == "data.chat_template" and "bare has no chat template" in said


def test_messages_that_the_template_refuses(complaints, model, tmp_path):
    strict = shutil.copytree(model, tmp_path / "strict")
    (strict / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    chat = [{"prompt": [{"role": role, "content": "1"}]} for role in ("user", "system")]
    found = complaints(chat, run={"model": {"path": str(strict)}})
    assert found == [("data.train", "train.jsonl:2: the chat template refuses it: no system message")]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("text", ["1", "12345", "12:34 a>u", "1" * 30, " 9 " * 12])
def test_a_prompt_is_measured_as_a_rollout_will(model, chat, text):
    from miles_core.edges.data.length import Ruler
    from miles_core.tokens import load_tokenizer, tokenize

    prompt = [{"role": "user", "content": text}] if chat else text
    length = len(tokenize(load_tokenizer(model), prompt))
    assert Ruler(model, length - 1).excess(prompt) == length
    assert Ruler(model, length).excess(prompt) is None


def test_a_check_imports_neither_transformers_nor_torch(model, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": [{"role": "user", "content": "12345678"}]}\n')
    code = (
        "import sys\nfrom miles_core.config import RunConfig\nfrom miles_core.edges.data import Data\n"
        f"run = RunConfig(algorithm='a', model={{'path': {str(model)!r}}}, rollout={{'max_tokens': 4}})\n"
        f"data = Data(Data.Config(train={str(tmp_path / 'train.jsonl')!r}), run)\n"
        "data.miles_check(lambda key, text: print(text), {})\n"
        "print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "a prompt of 10 tokens" in said and said.endswith("set()\n")


def test_a_prompt_longer_than_the_context(complaints):
    found = complaints([{"prompt": "12345678"}, {"prompt": "123456789"}])
    assert found == [
        (
            "data.train",
            "train.jsonl:2: a prompt of 9 tokens and rollout.max_tokens = 4 exceed the model's context of 12",
        )
    ]
    assert len(complaints([{"prompt": "1234567"}], chat_template=True)) == 1  # the template adds two tokens


def test_a_context_beyond_the_models(model):
    from miles_core.config import RunConfig
    from miles_core.edges.data import Data

    heard = []
    run = RunConfig(algorithm="a", model={"path": str(model), "context": 13}, rollout={"max_tokens": 4})
    Data(Data.Config(train=model / "config.json"), run).miles_check(lambda *fault: heard.append(fault), {})
    assert ("model.context", "13 is more than the 12 tokens that the model was made for") in heard


def test_a_column_that_a_reward_reads(complaints):
    from miles_core.edges.reward import Reward

    def tables(**scorers):
        return {"reward": Reward.Config.model_validate(scorers)}

    lacking = [{"prompt": "1", "answer": "1"}, {"prompt": "2"}]
    said = [("data.train", "train.jsonl:2: no column 'answer', which reward.right.answer reads")]
    assert complaints(lacking, tables=tables(right={"kind": "exact_match"})) == said
    assert complaints(lacking, tables=tables(right={"kind": "numeric", "answer": "prompt"})) == []
    assert complaints(lacking, tables=tables(shape={"kind": "regex", "pattern": "1"})) == []  # reads no answer


def test_many_faults_are_cut_short(complaints):
    found = complaints([{"question": "1"}] * 100)
    assert len(found) == 6 and "and more like these" in found[-1][1]


def test_splits_that_contradict(complaints, tmp_path):
    assert complaints(rows(), held_out=3)[0][0] == "data.held_out"
    (tmp_path / "eval.jsonl").write_text('{"prompt": "1"}\n')
    assert complaints(rows(), held_out=0.5, eval=tmp_path / "eval.jsonl")[0][0] == "data.held_out"
    assert complaints(rows(), run={"eval": {"every": 5}})[0][0] == "eval.every"


def test_no_prompts_at_all(model):
    from miles_core.config import RunConfig
    from miles_core.edges.data import Data

    def heard(**keys):
        found = []
        Data(Data.Config(), RunConfig(algorithm="a", model={"path": str(model)}, **keys)).miles_check(
            lambda *fault: found.append(fault), {}
        )
        return [key for key, _ in found]

    assert heard() == heard(use={"prompts": "data"}, plugins=["mine"]) == ["data.train"]
    assert heard(plugins=["mine"]) == heard(use={"prompts": "mine"}, plugins=["mine"]) == []  # it may answer
    with pytest.raises(Refused, match="no prompts: set data.train"):
        Data(Data.Config(), RunConfig(algorithm="a", model={"path": str(model)})).miles_prompts("train", 0)


def test_part_of_a_row_cannot_be_held_out(data):
    with pytest.raises(ValidationError, match="a whole number of rows"):
        data(rows(), held_out=1.5)


def test_not_parquet_and_unknown_suffixes(complaints, tmp_path, data):
    (tmp_path / "eval.parquet").write_text("PAR0")
    assert "not a parquet file" in complaints(rows(), eval=tmp_path / "eval.parquet")[0][1]
    (tmp_path / "eval.csv").write_text("prompt\n1\n")
    assert "rows are read from .jsonl and .parquet" in complaints(rows(), eval=tmp_path / "eval.csv")[0][1]
