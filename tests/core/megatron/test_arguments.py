"""``[megatron]`` and ``config.json``: what is refused, what is advised, and who is asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from miles_core.config import RunConfig
from miles_core.edges.megatron import Megatron, arguments, hf, limits

CONFIG = dict(
    num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, max_position_embeddings=64, head_dim=8,
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen3"}))
    return tmp_path


def run(model: Path, trainers: int = 2, **settings) -> RunConfig:
    return RunConfig(algorithm="none", model={"path": model}, placement={"trainers": trainers}, **settings)


def read(**config) -> hf.Architecture:
    return hf.architecture(CONFIG | config)


# -- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_the_parameters_that_transformers_makes(kind: str, tied: bool) -> None:
    import transformers

    made = transformers.AutoConfig.for_model(kind, **CONFIG | {"tie_word_embeddings": tied})
    found = hf.architecture(json.loads(made.to_json_string()))
    net = transformers.AutoModelForCausalLM.from_config(made)
    assert found.parameters == sum(parameter.numel() for parameter in net.parameters())


def test_reads_both_spellings_of_rotary_settings() -> None:
    old = read(model_type="llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = read(model_type="llama", rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3})
    assert old == new
    assert new.rope_theta == 5e5 and new.scaling == hf.Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert read(model_type="qwen2").scaling is None


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; supported are qwen2, qwen3, llama"),
        ({"model_type": "qwen3", "hidden_size": "32"}, "lacks hidden_size"),
        ({"model_type": "qwen3", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias true"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias true"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding-window"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'"),
        ({"model_type": "qwen2", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3"}}, "lacks factor"),
    ],
)
def test_refuses_what_it_cannot_train(config: dict, said: str) -> None:
    with pytest.raises(hf.UnsupportedModel, match=said):
        read(**config)


def test_says_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(hf.UnsupportedModel, match=r"config.json cannot be read \(No such file"):
        hf.read(tmp_path)
    for text, said in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(hf.UnsupportedModel, match=said):
            hf.read(tmp_path)


# -- without asking Megatron -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("lr", 1e-3, "set optim.lr"),
        ("seed", 1, "set seed, at the top"),
        ("micro_batch_size", 1, "set batch.micro_tokens"),
        ("global_batch_size", 8, "set batch.groups"),
        ("num_layers", 2, "read from config.json"),
        ("tokenizer_type", "x", "Miles does this part"),
        ("context_parallel_size", 2, "needs Transformer Engine"),
        ("moe_grouped_gemm", True, "need a GPU"),
        ("fp8_format", "e4m3", "needs Transformer Engine"),
        ("attention_dropout", 0.1, "no dropout"),
        ("num_layers_per_virtual_pipeline_stage", 1, "interleaved"),
        ("transformer_impl", "inference_optimized", "there are layers for"),
    ],
)
def test_refuses_by_name(key: str, value: object, advice: str) -> None:
    ((where, said),) = limits.refused({key: value}, gpu=True)
    assert where == f"megatron.{key}" and advice in said


def test_layers_of_transformer_engine_need_a_gpu() -> None:
    ((where, said),) = limits.refused({"transformer_impl": "transformer_engine"}, gpu=False)
    assert where == "megatron.transformer_impl" and "needs a GPU" in said
    assert limits.refused({"transformer_impl": "transformer_engine"}, gpu=True) == []


def test_a_stage_cannot_feed_the_engine_beside_it() -> None:
    def said(layout: str) -> list[tuple[str, str]]:
        tables = {"algorithm": "x", "model": {"path": "m"}, "placement": {"layout": layout, "trainers": 2}}
        return limits.turns({"pipeline_model_parallel_size": 2}, RunConfig.model_validate(tables))

    assert [key for key, _ in said("colocate")] == ["megatron.pipeline_model_parallel_size"]
    assert said("split") == said("cpu") == []


def test_leaves_alone_what_is_the_users() -> None:
    assert limits.refused({"bf16": True, "tensor_model_parallel_size": 2, "moe_grouped_gemm": False}, gpu=False) == []


@pytest.mark.parametrize(
    ("table", "trainers", "said"),
    [
        ({}, 3, []),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4, []),
        ({"tensor_model_parallel_size": 2}, 3, ["does not divide placement.trainers = 3; set it to a multiple of 2"]),
        ({"tensor_model_parallel_size": 4}, 4, ["2 key-value heads; sizes that do: 1, 2", "50 vocabulary entries"]),
        ({"pipeline_model_parallel_size": 3}, 3, ["4 layers; sizes that do: 1, 2, 4"]),
        ({"pipeline_model_parallel_size": 0}, 1, ["whole number of at least 1, got 0"]),
        ({"tensor_model_parallel_size": "two"}, 1, ["whole number of at least 1, got 'two'"]),
        ({"sequence_parallel": True}, 1, ["needs tensor_model_parallel_size of 2 or more"]),
    ],
)
def test_sizes(table: dict, trainers: int, said: list[str]) -> None:
    found = limits.sizes(table, read(model_type="qwen3"), trainers)
    assert len(found) == len(said)
    assert all(part in message for part, (_, message) in zip(said, found, strict=True))
    assert {key.removeprefix("megatron.") for key, _ in found} <= table.keys()


def test_schedule(model: Path) -> None:
    found = limits.schedule(run(model, steps=5, batch={"updates": 2}, optim={"lr": 1.0, "min_lr": 2.0, "warmup": 11}))
    assert [key for key, _ in found] == ["optim.min_lr", "optim.warmup"] and "makes 10" in found[1][1]
    assert limits.schedule(run(model, steps=5, optim={"lr": 1.0, "min_lr": 1.0, "warmup": 5})) == []


def test_an_empty_table_asks_nobody(model: Path) -> None:
    """Planning a run that says nothing of Megatron must not wait for torch and Megatron to load."""
    code = (
        "import sys; from pathlib import Path; from miles_core.config import RunConfig\n"
        "from miles_core.edges.megatron import Megatron, arguments\n"
        f"run = RunConfig(algorithm='none', model=dict(path=Path({str(model)!r})))\n"
        "plugin = Megatron(Megatron.Config(), run)\n"
        "assert arguments.check(plugin.table, run) == [] and plugin.miles_explain({})['model'].startswith('4 layers')\n"
        "assert not {'torch', 'megatron', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- asking Megatron -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["apart", "here"])
def where_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-LM is asked in a process of its own, or in this one, which has loaded it."""
    if request.param == "here":
        arguments._parser()
    else:
        monkeypatch.delitem(sys.modules, "megatron.training.arguments", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("where_asked")
def test_every_fault_at_once(model: Path) -> None:
    table = {
        "tensor_paralel_size": 2,
        "lr": 1,
        "bf16": 3,
        "recompute_granularity": "some",
        "recompute_num_layers": [1, 2],
        "recompute_modules": ["core_attn", "mlp"],
        "overlap_grad_reduce": False,
    }
    complaints: dict[str, str] = {}
    Megatron(Megatron.Config(**table), run(model)).miles_check(complaints.__setitem__, {}, {})
    assert complaints.pop("megatron.lr") == "set optim.lr"
    assert "did you mean 'tensor_model_parallel_size'" in complaints.pop("megatron.tensor_paralel_size")
    assert "a switch: write true or false, got 3" in complaints.pop("megatron.bf16")
    assert "invalid choice: 'some' (choose from" in complaints.pop("megatron.recompute_granularity")
    assert "one value, got a list of 2" in complaints.pop("megatron.recompute_num_layers")
    assert "model.path" in complaints and len(complaints) == 1  # no weights in the folder


@pytest.mark.slow
def test_megatron_has_the_last_word(model: Path) -> None:
    good = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "no_align_grad_reduce": True, "bf16": True}
    assert arguments.check(good, run(model)) == []
    ((key, said),) = arguments.check({"recompute_granularity": "full"}, run(model))
    assert key == "megatron.recompute_granularity" and "recompute_method must be" in said


@pytest.mark.slow
def test_the_parser_that_is_made_once_forgets_what_it_was_asked(model: Path) -> None:
    def parsed(**table) -> dict:
        return vars(arguments.parse(arguments.settings(table, run(model), hf.architecture(hf.read(model))), 2))

    first, other, again = parsed(), parsed(recompute_modules=["mlp"], bf16=True, eval_interval=7), parsed()
    assert first == again != other
    assert not [key for key in first if isinstance(first[key], list | dict) and first[key] is again[key]]
