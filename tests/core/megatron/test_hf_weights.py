"""Import then export is the identity on every tensor, in one process a replica, tensor and pipeline parallel."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES = dict(num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=50)


def save(folder: Path, config, model, shard: str = "1GB", **sizes) -> None:
    built = model(config(**SIZES | sizes))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter)
    built.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.md").write_text("stays behind")


@pytest.mark.slow
def test_round_trip_in_every_layout(tmp_path: Path) -> None:
    """Two processes, so that two replicas (each whole), two tensor shards and two stages are all run for real."""
    torch.manual_seed(0)
    models, out = tmp_path / "models", tmp_path / "out"
    out.mkdir()
    save(models / "qwen2", Qwen2Config, Qwen2ForCausalLM, num_key_value_heads=2, tie_word_embeddings=True)
    save(models / "qwen3", Qwen3Config, Qwen3ForCausalLM, "20KB", num_key_value_heads=2, head_dim=16)
    save(models / "llama", LlamaConfig, LlamaForCausalLM, num_key_value_heads=1)  # fewer than tensor-parallel ranks
    save(models / "spare_head", LlamaConfig, LlamaForCausalLM, num_key_value_heads=4, tie_word_embeddings=True)
    weights = load_file(models / "spare_head" / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(50, 32)}, models / "spare_head" / "model.safetensors")

    script = Path(__file__).with_name("hf_roundtrip.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), models, out],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
