"""Every complaint names the key, the file and the line, and all of them come at once."""

import pytest
from miles_core.config import RunConfig
from miles_core.edges.toml import Source


def test_all_complaints_come_at_once_in_the_order_of_the_lines(write, complaints):
    write(
        "run.toml",
        """\
algorithm = "./mine.py"
plugins = [

    "fp9",
]
stepz = 200

[model]
path = "model"
context = [
    1,
]

[optim]
lr = -1e-6

[batch]
groups = "many"
""",
    )
    lines = complaints()
    assert [line.partition(": ")[0] for line in lines] == [
        "run.toml:2", "run.toml:6", "run.toml:10", "run.toml:15", "run.toml:18",
    ]  # fmt: skip
    assert "'fp9' is not installed" in lines[0]
    assert "stepz: no such key; did you mean 'steps'?" in lines[1]
    assert "model.context: input should be a valid integer" in lines[2]
    assert "optim.lr: input should be greater than 0, got -1e-06" in lines[3]
    assert "batch.groups: input should be a valid integer" in lines[4]


def test_a_missing_key_points_at_its_table(write, complaints):
    write("run.toml", 'algorithm = "./mine.py"\n\n[model]\ncontext = 5\n')
    assert complaints() == ["run.toml:3: model.path: missing; it has no default"]


@pytest.mark.parametrize(
    "override, said",
    [
        ("optim.max_normm=2", "--set optim.max_normm=2: optim.max_normm: no such key; did you mean 'max_norm'?"),
        ("optim.lr", "--set optim.lr: write it as --set table.key=value"),
        ("steps.x=1", "--set steps.x=1: steps"),
        ("mode=asink", "--set mode=asink: mode: input should be 'sync', 'overlap' or 'async', got 'asink'"),
    ],
)
def test_an_override_is_named_as_it_was_typed(complaints, override, said):
    assert any(line.startswith(said) for line in complaints(override))


def test_later_files_win_and_complaints_name_the_file_that_wrote_the_value(write, complaints):
    write("more.toml", "[optim]\n\nlr = 0\n")
    assert complaints(files=("run.toml", "more.toml"))[0].startswith("more.toml:3: optim.lr:")


def test_files_merge_by_key(write, tmp_path):
    one, two = write("one.toml", "[optim]\nlr = 1.0\neps = 2.0\n"), write("two.toml", "[optim]\nlr = 3.0\n")
    assert Source([one, two], ["optim.beta1=0.5"]).tree == {"optim": {"lr": 3.0, "eps": 2.0, "beta1": 0.5}}


def test_paths_start_at_their_file_and_in_the_shell_where_it_stands(write, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    source = Source([tmp_path / "run.toml"])
    source.tree["algorithm"] = "x"
    source.tree.pop("data")
    assert source.validate(RunConfig, source.tree).model.path == tmp_path / "model"
    source = Source([tmp_path / "run.toml"], ["model.path=model"])
    source.tree.pop("data")
    assert source.validate(RunConfig, source.tree).model.path == tmp_path / "deep" / "model"


@pytest.mark.parametrize("text, said", [("a = [1,\n", "not TOML"), ("a = 1\na = 2\n", "not TOML")])
def test_a_file_that_is_not_toml(write, complaints, text, said):
    write("run.toml", text)
    assert complaints()[0].startswith(f"run.toml: {said}")


def test_a_file_that_is_not_there(complaints):
    assert "absent.toml: cannot be read" in complaints(files=("absent.toml",))[0]


def test_settings_of_a_plugin_the_run_does_not_use(write, complaints):
    write("run.toml", 'algorithm = "./mine.py"\n[model]\npath = "model"\n[gropo]\nclip = 1\n')
    assert complaints()[0].startswith("run.toml:4: gropo: no such key")
    write("run.toml", 'algorithm = "./mine.py"\n[model]\npath = "model"\n[use]\nlos = "x"\n')
    assert complaints()[0] == "run.toml:5: use.los: no such slot; did you mean 'loss'?"


def test_the_run_survives_the_trip_to_a_worker():
    run = RunConfig(algorithm="a", model={"path": "/m"}, batch={"groups": 8}, mode="overlap")
    assert RunConfig.model_validate_json(run.model_dump_json()) == run
