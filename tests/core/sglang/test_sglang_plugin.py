"""``[sglang]``: what is refused before anything starts, and what the engines are started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from miles_core.config import RunConfig
from miles_core.edges import sharing
from miles_core.edges.sglang import SGLang, arguments, wire

OURS = {"engines": "sglang", "transport": "sglang"}  # on a CPU it is both or neither

# SGLang's parser in miniature: every way in which the true one takes its arguments (arg_groups/arg_utils.py).
PARSER = """
import argparse, json, sys

print("something that a library prints")

class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path", "--model", type=str, required=True)
        parser.add_argument("--tp-size", "--tensor-parallel-size", type=int, default=1)
        parser.add_argument("--mem-fraction-static", type=float)
        parser.add_argument("--attention-backend", choices=["triton", "fa3"])
        parser.add_argument("--disable-cuda-graph", action="store_true")
        parser.add_argument("--disable-radix-cache", action="store_true")
        parser.add_argument("--enable-deterministic-inference", action="store_true")
        parser.add_argument("--enable-replay", action=argparse.BooleanOptionalAction)
        parser.add_argument("--cuda-graph-bs-decode", type=int, nargs="+")
        parser.add_argument("--json-model-override-args", type=json.loads)
        parser.add_argument("--weights-of", dest="weight_version", type=str)
        parser.add_argument("--device", type=str)
        parser.add_argument("--dtype", type=str)
"""


MODEL = {
    "max_position_embeddings": 4096, "vocab_size": 61, "hidden_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed SGLang whose parser is the one above."""
    package = tmp_path / "installed" / "sglang" / "srt"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "server_args.py").write_text(PARSER)
    info = package.parents[1] / "sglang-0.5.16.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.16\n")
    monkeypatch.syspath_prepend(str(package.parents[1]))
    monkeypatch.setenv("PYTHONPATH", str(package.parents[1]))
    arguments._ask.cache_clear()


def plugin(tmp_path: Path, table: dict[str, Any], layout: str = "split", **run: Any) -> SGLang:
    model = {"path": str(tmp_path), **run.pop("model", {})}
    run["placement"] = {"layout": layout, **run.get("placement", {})}
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    config = RunConfig.model_validate({"algorithm": "core", "model": model, **run})
    return SGLang(SGLang.Config.model_validate(table), config)


def complaints(made: SGLang) -> dict[str, str]:
    found: dict[str, str] = {}
    made.miles_check(complain=lambda key, message: found.__setitem__(key, message))
    return found


@pytest.mark.usefixtures("sglang")
def test_the_parser_of_sglang_judges(tmp_path: Path) -> None:
    good: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "mem_fraction_static": 0.8,
        "attention_backend": "triton",
        "disable_cuda_graph": False,
        "cuda_graph_bs_decode": [1, 2],
        "json_model_override_args": {"layers": [1, 2]},
    }
    assert complaints(plugin(tmp_path, good)) == {}
    wrong = {
        "mem_fraction_statik": 0.8,
        "attention_backend": "tritn",
        "disable_cuda_graph": "yes",
        "tp_size": "two",
        "mem_fraction_static": True,
    }
    found = complaints(plugin(tmp_path, wrong | {"cuda_graph_bs_decode": [1]}))
    assert found.keys() == {f"sglang.{key}" for key in wrong}
    assert found["sglang.mem_fraction_statik"] == "no such SGLang argument; did you mean 'mem_fraction_static'?"
    assert "invalid choice: 'tritn' (choose from" in found["sglang.attention_backend"]
    assert found["sglang.disable_cuda_graph"] == "a switch: write true or false, got 'yes'"
    assert "invalid int value: 'two'" in found["sglang.tp_size"]
    assert found["sglang.mem_fraction_static"] == "wants a value, got true"


@pytest.mark.usefixtures("sglang")
def test_what_miles_sets_is_refused_by_name(tmp_path: Path) -> None:
    found = complaints(plugin(tmp_path, {key: 1 for key in arguments.OURS} | {"model": "x", "load_format": "dummy"}))
    assert found.keys() == {f"sglang.{key}" for key in (*arguments.OURS, "model", "load_format")}
    assert found["sglang.port"] == "is not yours to set: an engine listens on a port that it finds free"
    assert found["sglang.model"] == "is not yours to set: it is model.path"
    # by another spelling, which only the parser knows
    assert complaints(plugin(tmp_path, {"weights_of": "1"})) == {
        "sglang.weights_of": f"is not yours to set: {arguments.OURS['weight_version']}"
    }


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("key", arguments.REPLICAS)
def test_replicas_in_a_server_are_refused(tmp_path: Path, key: str) -> None:
    assert "placement.engines" in complaints(plugin(tmp_path, {key: 2}))[f"sglang.{key}"]
    assert f"sglang.{key}" not in {key for key, _ in arguments.refused({key: 2, "enable_dp_attention": True})}


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("key", arguments.STAGES)
def test_stages_of_an_engine_are_refused(tmp_path: Path, key: str) -> None:
    assert "brought to the stages of an engine" in complaints(plugin(tmp_path, {key: 2}))[f"sglang.{key}"]
    assert arguments.refused({key: 1}) == []


def test_without_sglang_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    assert complaints(plugin(tmp_path, {"port": 1})) == {
        "sglang.port": "is not yours to set: an engine listens on a port that it finds free",
        "use.engines": "SGLang is not installed; pip install 'miles-core[sglang]'",
    }


@pytest.mark.usefixtures("sglang")
def test_a_parser_that_does_not_run_is_one_complaint(tmp_path: Path) -> None:
    (tmp_path / "installed" / "sglang" / "srt" / "server_args.py").write_text("import libcuda_that_is_missing")
    assert complaints(plugin(tmp_path, {"tensor_parallel_size": 2})) == {
        "sglang": "SGLang's argument parser does not run here: ModuleNotFoundError: No module named "
        "'libcuda_that_is_missing'"
    }


def test_a_run_on_other_engines_is_not_asked(tmp_path: Path) -> None:
    made = plugin(tmp_path, {"port": 1}, layout="cpu")
    assert complaints(made) == {} and made.miles_explain() == {}


@pytest.mark.usefixtures("sglang")
def test_each_engine_gets_its_gpus_and_its_words(tmp_path: Path) -> None:
    table = {
        "tensor_parallel_size": 2,
        "disable_cuda_graph": True,
        "cuda_graph_bs_decode": [1, 2],
        "enable_replay": False,
    }
    made = plugin(tmp_path, table, placement={"engines": 2}, seed=7, rollout={"timeout_s": 60})
    first, second = made.miles_engines().processes
    words, *rest = second.args
    assert (second.name, second.gpus, rest) == ("engine-1", 2.0, [900, 60, "nccl", 61, False, True, False])
    said = [
        "--tp-size",
        "2",
        "--disable-cuda-graph",
        "--cuda-graph-bs-decode",
        "1",
        "2",
        "--no-enable-replay",
    ]
    own = ["--model-path", str(tmp_path), "--skip-tokenizer-init", "--random-seed", "8"]
    own += ["--dtype", "bfloat16", "--enable-memory-saver", "--custom-weight-loader", wire.RECEIVE]
    assert list(words) == said + own
    assert first.args[0] == tuple(word if word != "8" else "7" for word in words)
    lines = made.miles_explain()["engines"].splitlines()
    assert lines[0] == "2 SGLang 0.5.16 servers, 2 GPUs each" and lines[-1].startswith("sampling differs")


@pytest.mark.usefixtures("sglang")
def test_on_a_cpu_there_is_no_memory_to_save(tmp_path: Path) -> None:
    table = {"device": "cpu", "enable_deterministic_inference": True}
    made = plugin(tmp_path, table, layout="cpu", use=OURS)
    assert complaints(made) == {}
    [process] = made.miles_engines().processes
    assert process.gpus == 0 and process.args[3] == "gloo" and "--enable-memory-saver" not in process.args[0]
    assert made.miles_explain()["engines"] == "1 SGLang 0.5.16 server, on the CPU"


@pytest.mark.parametrize(("context", "asked"), [(1024, "1026"), (4095, "4096"), (4096, "4096"), (8192, "8192")])
def test_a_response_may_fill_the_context(tmp_path: Path, context: int, asked: str) -> None:
    """SGLang stops two tokens earlier, so it is told of two more, where the model has them."""
    words = plugin(tmp_path, {}, model={"context": context})._own(0, False)
    assert words[words.index("--context-length") + 1] == asked


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize(
    ("draw", "table", "key"),
    [
        ({"top_p": 0.9}, {}, "rollout.top_p"),
        ({"top_k": 5000}, {}, "rollout.top_k"),
        ({"top_p": 0.9, "top_k": 5000}, {"sampling_mask_max_tokens": 6000}, None),
        ({"top_p": 0.9, "top_k": 100}, {}, None),
        ({}, {}, None),
    ],
)
def test_a_cut_vocabulary_is_refused_where_its_logprobs_are_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: dict[str, Any], table: dict[str, Any], key: str | None
) -> None:
    monkeypatch.setattr(arguments, "check", lambda table: [])
    found = complaints(plugin(tmp_path, table, rollout=draw))
    assert list(found) == ([key] if key else []) and all("SGLang tells" in message for message in found.values())


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sglang")
def test_in_turns_an_engine_sits_beside_the_trainers_of_its_gpus(tmp_path: Path) -> None:
    made = plugin(tmp_path, {"tp_size": 2}, "colocate", placement={"trainers": 4, "engines": 2})
    assert complaints(made) == {}
    processes = made.miles_engines().processes
    assert "--custom-weight-loader" not in processes[0].args[0]  # handles are opened by SGLang itself
    assert [process.beside for process in processes] == [("trainer-0", "trainer-1"), ("trainer-2", "trainer-3")]
    assert all(process.gpus == 0 and process.args[5] is True for process in processes)
    assert type(made.miles_transport()).__name__ == "HandleTransport"
    assert type(plugin(tmp_path, {}).miles_transport()).__name__ == "BroadcastTransport"


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize(
    ("layout", "table", "run", "key"),
    [
        ("colocate", {}, {"mode": "overlap"}, "mode"),
        ("colocate", {}, {"mode": "async"}, "mode"),
        ("colocate", {}, {"mode": "async", "rollout": {"max_staleness": 0}}, "mode"),
        ("split", {}, {"mode": "async", "rollout": {"weights": "in_place"}}, None),
        ("split", {"disable_radix_cache": True}, {"mode": "async"}, None),
        (
            "split",
            {"disable_radix_cache": True},
            {"mode": "async", "rollout": {"weights": "in_place"}},
            "sglang.disable_radix_cache",
        ),
        ("split", {}, {"mode": "async", "rollout": {"weights": "drain"}}, None),
        ("colocate", {"tp_size": 2}, {}, "placement.engines"),
        ("colocate", {}, {"placement": {"trainers": 2}}, "placement.engines"),
        ("split", {"device": "cpu"}, {}, "sglang.device"),
        ("cpu", {}, {"use": OURS}, "placement.layout"),
        ("cpu", {"device": "cpu"}, {"use": {"engines": "sglang"}}, "use.transport"),
        ("split", {}, {"mode": "overlap", "placement": {"trainers": 2}}, None),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    tmp_path: Path, layout: str, table: dict[str, Any], run: dict[str, Any], key: str | None
) -> None:
    assert list(complaints(plugin(tmp_path, table, layout, **run))) == ([key] if key else [])


# -- memory ------------------------------------------------------------------------------------------------------------


def write_weights(folder: Path, *shapes: list[int]) -> None:
    """The beginning of a safetensors file, which is all that a plan reads."""
    header = json.dumps({"__metadata__": {}} | {f"w{i}": {"shape": shape} for i, shape in enumerate(shapes)}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize(
    ("table", "place", "key", "said"),
    [
        ({}, {"gpu_gb": 1}, "sglang.tp_size", "an engine's weights take 2.0 GB of each GPU and there are 1.0 GB"),
        ({"tp_size": 2}, {"gpu_gb": 1.1}, None, ""),
        ({"dtype": "float32"}, {"gpu_gb": 3}, "sglang.tp_size", "weights take 4.0 GB of each GPU and there are 3.0 GB"),
        ({"mem_fraction_static": 0.5}, {"gpu_gb": 3}, "sglang.mem_fraction_static", "0.5 of 3.0 GB are 1.5 GB, cache"),
        ({"mem_fraction_static": 0.5}, {"gpu_gb": 5}, None, ""),
        ({"mem_fraction_static": 0.5}, {}, None, ""),
    ],
)
def test_an_engine_that_cannot_fit_is_refused_with_its_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], place: dict[str, Any], key: str, said: str
) -> None:
    monkeypatch.setattr(sharing, "_smallest", lambda: 0)  # as on a login node
    write_weights(tmp_path, [1000, 1000, 999], [1_000_000])
    found = complaints(plugin(tmp_path, table, placement=place))
    assert list(found) == ([key] if key else []) and all(said in message for message in found.values())


@pytest.mark.usefixtures("sglang")
def test_a_plan_tells_what_an_engine_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_smallest", lambda: 0)
    write_weights(tmp_path, [1000, 1000, 1000])

    def told(table: dict[str, Any], layout: str = "split", **place: Any) -> str:
        return str(plugin(tmp_path, table, layout, placement=place).miles_explain()["engines"].splitlines()[1])

    each = "2.0 GB of weights on each GPU, and 4,096 bytes of cache for each token"
    assert told({}) == f"{each}; SGLang decides how much cache, or sglang.mem_fraction_static does"
    assert told({"mem_fraction_static": 0.5}) == f"{each}; placement.gpu_gb would tell for how many"
    assert told({"mem_fraction_static": 0.5}, gpu_gb=10) == f"{each}: 3.0 GB for 732,421 tokens in 0.5 of 10.0 GB"
    assert told({"mem_fraction_static": 0.5}, "colocate", gpu_gb=10).endswith(", less where trainers take much of it")
    assert told({"tp_size": 2}).startswith("1.0 GB of weights on each GPU, and 2,048 bytes of cache")


@pytest.mark.parametrize(
    ("run", "client"),
    [
        ({"mode": "async", "rollout": {"max_staleness": 2}}, "StreamingClient"),
        ({"mode": "async", "rollout": {"weights": "in_place"}}, "KeepingClient"),
        ({"mode": "async", "rollout": {"max_staleness": 0}}, "SGLangClient"),
        ({"mode": "async", "rollout": {"max_staleness": 0, "weights": "in_place"}}, "SGLangClient"),
        ({"mode": "overlap"}, "SGLangClient"),
        ({}, "SGLangClient"),
    ],
)
def test_groups_of_an_asynchronous_run_do_not_wait_for_each_other(
    tmp_path: Path, run: dict[str, Any], client: str
) -> None:
    """And only where each call names its keys and values are those of old weights kept."""
    made = plugin(tmp_path, {}, **run).miles_engines()
    assert made.client == f"miles_core.edges.sglang.client:{client}"
    assert made.processes[0].args[-1] is (client == "KeepingClient")
