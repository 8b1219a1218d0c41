"""The name tables, checked against transformers; model folders that cannot be used, refused by their headers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.megatron.names import TABLES, Names
from miles_core.edges.megatron.stored import INDEX, SINGLE, check_weights, read_header
from miles_core.edges.megatron.weights import _parts, _take_apart
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
SIZES = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=50)


def save(folder: Path, kind: str, **sizes):
    """A random model as transformers writes it."""
    torch.manual_seed(0)
    config, model = KINDS[kind]
    built = model(config(**SIZES | dict(num_key_value_heads=2) | sizes))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)  # norms and biases too, or two of them could be exchanged unseen
    built.save_pretrained(folder)
    return built


def table(folder: Path) -> Names:
    return Names(json.loads((folder / "config.json").read_text()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, "qwen2")
    return tmp_path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("qwen2", {}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 16}),
        ("llama", {}),
        ("llama", {"head_dim": 12, "num_key_value_heads": 1}),
    ],
)
def test_tables_name_what_transformers_names(tmp_path: Path, kind: str, sizes: dict, tied: bool) -> None:
    model = save(tmp_path, kind, tie_word_embeddings=tied, **sizes)
    names = table(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert names.tensors() | names.optional() == shapes
    assert names.tensors() == {name: found.shape for name, found in read_header(tmp_path / SINGLE).items()}
    assert check_weights(tmp_path) == []


def config_of(kind: str, groups: int, per_group: int, head: int, ffn: int, vocab: int) -> dict:
    return {
        "model_type": kind,
        "num_hidden_layers": 1,
        "hidden_size": 4,
        "intermediate_size": ffn,
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "head_dim": head,
        "vocab_size": vocab,
    }


def first_layer(names: Names) -> list[str]:
    return [name.format(layer=0) for entry in names.entries for name in entry.megatron]


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(TABLES)),
    ranks=st.sampled_from([1, 2, 4]),
    per_rank=st.integers(1, 3),
    per_group=st.integers(1, 3),
    split_group=st.booleans(),
    head=st.integers(1, 3),
    vocab=st.integers(8, 40),
)
def test_parts_tile_every_tensor_once(
    kind: str, ranks: int, per_rank: int, per_group: int, split_group: bool, head: int, vocab: int
) -> None:
    """Whatever the sizes, the ranks together hold each row of each tensor once, and putting back undoes cutting."""
    if split_group:  # fewer key-value heads than ranks: one group's rows spread over all of them
        groups, per_group, head = 1, per_group * ranks, head * ranks
    else:
        groups = ranks * per_rank
    names = Names(config_of(kind, groups, per_group, head, ffn=ranks * per_rank, vocab=vocab))
    for name in first_layer(names):
        fusion = names.fusion(name, ranks)
        tensors = {tensor: torch.randn(shape) for tensor, shape in fusion.tensors.items()}
        length = fusion.shape(ranks)[fusion.dim] + (3 if fusion.padded else 0)
        parts = []
        for rank in range(ranks if fusion.split else 1):
            blocks = [
                tensors[block.tensor].narrow(fusion.dim, block.start, block.stop - block.start)
                for block in fusion.part(rank, length)
            ]
            rows = torch.cat(blocks, fusion.dim) if blocks else torch.empty(0, *fusion.shape(ranks)[1:])
            padding = length - rows.shape[fusion.dim]
            assert padding == 0 or fusion.padded
            parts.append(torch.cat([rows, rows.new_full((padding, *rows.shape[1:]), 7.0)]) if padding else rows)
        back = dict(_take_apart(fusion, _parts(fusion, ranks, length), parts))
        assert back.keys() == tensors.keys()
        for tensor, value in tensors.items():
            assert torch.equal(back[tensor], value), f"{name}: {tensor}"


def cut(names: Names, megatron: str, tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> torch.Tensor:
    fusion = names.fusion(megatron, ranks)
    parts = fusion.part(rank, fusion.shape(ranks)[fusion.dim])
    return torch.cat([tensors[p.tensor].narrow(fusion.dim, p.start, p.stop - p.start) for p in parts], fusion.dim)


def test_fused_layouts_are_megatrons(tmp_path: Path) -> None:
    """Written out by hand, as Megatron's attention and feed-forward layers view them."""
    save(tmp_path, "qwen3", num_attention_heads=8, num_key_value_heads=4, head_dim=6)
    names, tensors = table(tmp_path), load_file(tmp_path / SINGLE)
    q, k, v = (tensors[f"model.layers.1.self_attn.{x}_proj.weight"].view(4, -1, 32) for x in "qkv")
    qkv = torch.cat([q, k, v], dim=1)  # per query group: two heads of queries, a key, a value
    gate, up = (tensors[f"model.layers.1.mlp.{x}_proj.weight"].chunk(2) for x in ("gate", "up"))
    for rank in range(2):
        fused = cut(names, "decoder.layers.1.self_attention.linear_qkv.weight", tensors, rank, 2)
        assert torch.equal(fused, qkv[2 * rank : 2 * rank + 2].reshape(-1, 32))
        fused = cut(names, "decoder.layers.1.mlp.linear_fc1.weight", tensors, rank, 2)
        assert torch.equal(fused, torch.cat([gate[rank], up[rank]]))


def test_transformer_engine_norms_are_the_local_ones(folder: Path) -> None:
    names = table(folder)
    for local, fused in [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ]:
        assert names.fusion(f"decoder.layers.1.{local}", 2) == names.fusion(f"decoder.layers.1.{fused}", 2)
    assert names.fusion("decoder.layers.1.mlp.router.weight", 1) is None


# -- folders that cannot be used ------------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def only(folder: Path) -> str:
    (complaint,) = check_weights(folder)
    return complaint


def test_no_weights(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert "has no weights" in only(folder) and "pytorch_model.bin" in only(folder) and str(folder) in only(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "has no weights" in only(folder)


def test_wrong_shape(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(47, 32)}))
    assert f"{folder / SINGLE}: tensor {name} has shape [47, 32], not [48, 32]" in only(folder)


def test_missing_and_unknown_tensors(folder: Path) -> None:
    old, new = "model.layers.0.self_attn.k_proj.bias", "model.layers.0.self_attn.k_proj.zero_point"
    rewrite(folder, lambda tensors: tensors.update({new: tensors.pop(old)}))
    missing, unknown = check_weights(folder)
    assert f"tensor {old} [16] is missing" in missing
    assert f"{folder / SINGLE}: tensor {new} [16] has no place in this architecture" in unknown


def test_a_deeper_config_is_one_cause_not_hundreds(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 30}))
    complaints = check_weights(folder)
    assert len(complaints) == 5
    assert f"(and {28 * 12 - 5} more like this)" in complaints[-1]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:keep])
    complaint = only(folder)
    assert complaint.startswith(f"{folder / SINGLE}: ") and complaint.endswith("download it again")
    assert f"{len(data[:keep]):,} bytes" in complaint


@pytest.mark.parametrize("junk", [b"\x10" + bytes(7) + b"not json at all.", b"\x02" + bytes(7) + b"[]", b"PK" * 9])
def test_not_safetensors(folder: Path, junk: bytes) -> None:
    (folder / SINGLE).write_bytes(junk)
    assert only(folder).startswith(f"{folder / SINGLE}: ") and only(folder).endswith("download it again")


def test_lfs_pointer(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "run git lfs pull" in only(folder)


def test_quantized(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"tensor {name} has dtype I8" in only(folder) and "unquantized" in only(folder)


def test_old_frequencies_and_a_spare_output_layer_are_fine(tmp_path: Path) -> None:
    save(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
            }
        ),
    )
    assert check_weights(tmp_path) == []


def test_shards(tmp_path: Path) -> None:
    model = save(tmp_path, "qwen3")
    (tmp_path / SINGLE).unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and check_weights(tmp_path) == []
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    held = sum(file == shards[1].name for file in index.values())
    shards[1].unlink()
    assert only(tmp_path) == f"{shards[1]}: is missing; {INDEX} says it holds {held} tensors; download it"
    (tmp_path / INDEX).write_text("{}")
    assert only(tmp_path).startswith(f"{tmp_path / INDEX}: is not an index")


def test_the_check_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys, pathlib; from miles_core.edges.megatron.weights import check_weights;"
        "assert check_weights(pathlib.Path(sys.argv[1])) == [];"
        "sys.exit(','.join({'torch', 'safetensors', 'transformers', 'megatron'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
