"""What is wrong with a dataset is found before anything starts, and every fault names its file and line."""

import pytest


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
    assert fault[1].startswith("train.jsonl:1: prompt: ") and said in fault[1]


def test_messages_need_a_template(complaints):
    chat = [{"prompt": [{"role": "user", "content": "1"}]}]
    assert "needs data.chat_template = true" in complaints(chat)[0][1]
    assert complaints(chat, chat_template=True) == []
    assert "must be messages" in complaints([{"prompt": [{"role": "user"}]}], chat_template=True)[0][1]


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
    Data(Data.Config(train=model / "config.json"), run).miles_check(lambda *fault: heard.append(fault))
    assert ("model.context", "13 is more than the 12 tokens that the model was made for") in heard


def test_many_faults_are_cut_short(complaints):
    found = complaints([{"question": "1"}] * 100)
    assert len(found) == 6 and "and more like these" in found[-1][1]


def test_splits_that_contradict(complaints, tmp_path):
    assert complaints(rows(), held_out=3)[0][0] == "data.held_out"
    (tmp_path / "eval.jsonl").write_text('{"prompt": "1"}\n')
    assert complaints(rows(), held_out=0.5, eval=tmp_path / "eval.jsonl")[0][0] == "data.held_out"
    assert complaints(rows(), run={"eval": {"every": 5}})[0][0] == "eval.every"


def test_not_parquet_and_unknown_suffixes(complaints, tmp_path, data):
    (tmp_path / "eval.parquet").write_text("PAR0")
    assert "not a parquet file" in complaints(rows(), eval=tmp_path / "eval.parquet")[0][1]
    (tmp_path / "eval.csv").write_text("prompt\n1\n")
    assert "rows are read from .jsonl and .parquet" in complaints(rows(), eval=tmp_path / "eval.csv")[0][1]
