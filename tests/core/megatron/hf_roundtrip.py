"""One of the two processes of ``test_hf_weights.py``: loads, exports and saves each model in each layout."""

import json
import resource
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from miles_core.edges.megatron import device, hf, weights
from miles_core.types import Refused
from safetensors.torch import load_file

LAYOUTS = {"dp2": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}  # tensor and pipeline parallel sizes


def build(folder: Path, padding: int = 0, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A GPTModel of Megatron's own layers, wrapped as a data-parallel model is, every parameter NaN."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    model = hf.architecture(hf.read(folder))
    sizes = {key: model.arguments[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels")}
    sizes |= {key: model.arguments[key] for key in ("num_attention_heads", "num_query_groups")}
    sizes |= {key: model.arguments[key] for key in ("add_qkv_bias", "qk_layernorm")}
    config = TransformerConfig(
        **sizes | {"add_bias_linear": False} | changes,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    module = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm"),
        vocab_size=model.vocab_size + padding,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not model.arguments["untie_embeddings_and_output_weights"],
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
    )
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan)
    return Float16Module(config, module) if dtype == torch.bfloat16 else module


def gathered(tensors: Iterator[tuple[str, torch.Tensor]], stages: int) -> dict[str, torch.Tensor]:
    """What both ranks were given, after checking who was given something."""
    mine = [(name, tensor.clone()) for name, tensor in tensors]
    assert bool(mine) == (dist.get_rank() == 0 or stages == 2), "only the first rank of each stage is a sender"
    both: list = [None, None]
    dist.all_gather_object(both, mine)
    names = [name for given in both for name, _ in given]
    assert len(names) == len(set(names)), "a tensor was exported twice"
    return dict(both[0] + both[1])


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def round_trip(folder: Path, stages: int, dtype: torch.dtype, padding: int) -> torch.nn.Module:
    config = hf.read(folder)
    on_disk = {}
    for file in folder.glob("*.safetensors"):
        on_disk |= {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    if config.get("tie_word_embeddings"):
        on_disk.pop("lm_head.weight", None)
    module = build(folder, padding, dtype)
    weights.load_weights(module, folder)
    assert not any(parameter.isnan().any() for parameter in module.parameters())
    found = gathered(weights.export_weights(module, config), stages)
    equal(found, on_disk)
    export = weights.Export(module, config)
    assert list(found) == list(gathered(export.tensors(), stages))
    for parameter in module.parameters():
        parameter.main_grad = -2 * parameter.data
        parameter.data = 4 * parameter.data  # in other memory: an export knows parameters, not where they lie
    for value, factor in ((lambda parameter: parameter.main_grad, -2), (None, 4)):
        wanted = {name: factor * tensor for name, tensor in on_disk.items()}
        equal(gathered(export.tensors(value), stages), wanted)
    for parameter in module.parameters():
        parameter.data = parameter.data / 4
    return module


def saved(module: torch.nn.Module, source: Path, folder: Path, stages: int) -> None:
    """What ``save_hf`` writes is a model folder again, its config.json naming the dtype of the weights."""
    for _ in range(2):  # the second replaces the first
        weights.save_hf(module, source, folder)
    assert weights.check_weights(folder) == []
    assert (folder / "model.safetensors").exists() == (stages == 1)
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    dtype = next(iter(found.values())).dtype
    assert json.loads((folder / "config.json").read_text()) == hf.read(source) | {"dtype": str(dtype)[6:]}
    assert (folder / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert not (folder / "notes.md").exists()
    assert [path.name for path in folder.parent.iterdir() if "writing" in path.name or "old" in path.name] == []


def refusals(models: Path, out: Path) -> None:
    """Faults that only building the model shows; each is raised on both ranks."""
    with pytest.raises(Refused, match=r"tensor model.layers.0.self_attn.q_norm.weight fits no parameter"):
        weights.load_weights(build(models / "qwen3", qk_layernorm=False), models / "qwen3")
    biased = build(models / "llama", add_bias_linear=True)
    with pytest.raises(Refused, match=r"decoder.layers.\d.self_attention.linear_proj.bias \[32\] has no Hugging Face"):
        weights.load_weights(biased, models / "llama")
    with pytest.raises(Refused, match=r"linear_proj.bias \[32\] has no Hugging Face name"):
        next(weights.export_weights(biased, hf.read(models / "llama")))
    with pytest.raises(Refused, match=r"linear_fc1.weight has shape \[(192|96), 32\] .* it \[(96|48), 32\]"):
        weights.load_weights(build(models / "llama", ffn_hidden_size=96), models / "llama")
    with pytest.raises(Refused, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        weights.load_weights(build(models / "spare_head"), models / "spare_head")
    with pytest.raises(Refused, match=r"config.json cannot be read"):
        weights.load_weights(biased, out)


def unwritable(models: Path, out: Path) -> None:
    """One rank that cannot write is every rank's error, and leaves nothing behind."""
    module = build(models / "qwen2")
    weights.load_weights(module, models / "qwen2")
    (out / "file").touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(OSError, match=r"model-00001-00000.safetensors cannot be written: .*File too large"):
        weights.save_hf(module, models / "qwen2", out / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError):
        weights.save_hf(module, models / "qwen2", out / "file" / "model")
    assert not list(out.glob("*full*"))


def main(rank: int, models: Path, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    device.install()
    from megatron.core import parallel_state as mpu

    with device.running():
        for layout, (tensor, stages) in LAYOUTS.items():
            mpu.initialize_model_parallel(tensor, stages)
            for source in sorted(models.iterdir()):
                if source.name == "spare_head":
                    continue
                padding = 6 if source.name == "qwen2" else 0
                module = round_trip(source, stages, torch.float32, padding)
                saved(module, source, out / f"{layout}-{source.name}", stages)
            if tensor == 2:
                module = round_trip(models / "qwen3", stages, torch.bfloat16, 0)
                saved(module, models / "qwen3", out / "bfloat16", stages)
            if stages == 2:
                unwritable(models, out)
            refusals(models, out)
            mpu.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
