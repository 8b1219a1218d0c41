"""Losses and gradients equal those of transformers in float64, however the work is split; and resuming is exact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES = dict(
    num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=50, max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(tie_word_embeddings=True, head_dim=16)),
    "llama": (LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=False, rope_parameters=LLAMA3)),
}
LENGTHS = (7, 19, 3, 40, 8, 8, 2, 25, 11)
PROMPTS = {(0, 1, 3): 5, (4, 5): 3}  # which of them begin alike, and the tokens that they share


def case(folder: Path, config, model, settings: dict, temperature: float = 0.8) -> dict:
    """A random model on disk; the loss of random sequences and its gradients by transformers in float64."""
    net = model(config(**SIZES | settings))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    net.save_pretrained(folder)
    sequences = [torch.randint(0, SIZES["vocab_size"], (length,)) for length in LENGTHS]
    # Of both signs, but with a sum far from zero: a relative error is of what is left after cancelling.
    weights = [(1 + torch.randn(length)) * (torch.rand(length) < 0.7) for length in LENGTHS]
    for group, length in PROMPTS.items():
        for i in group:
            sequences[i][:length] = sequences[group[0]][:length]
            weights[i][:length], weights[i][length] = 0.0, 1.0
    logits = [net(tokens[None]).logits[0].detach() for tokens in sequences]
    net = net.double()
    total = torch.zeros((), dtype=torch.float64)
    for tokens, weight in zip(sequences, weights, strict=True):
        weight[0] = 0.0  # nothing stands before the first token
        log_p = torch.log_softmax(net(tokens[None]).logits[0] / temperature, dim=-1)
        logprobs = log_p[:-1].gather(1, tokens[1:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(-1)[:-1]
        total = total + (weight[1:] * (logprobs + 0.3 * entropy)).sum()
    total.backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {
        "sequences": [s.tolist() for s in sequences],
        "weights": [w.tolist() for w in weights],
        "temperature": temperature,
        "logits": logits,
        "loss": float(total.detach()),
        "gradients": gradients,
        "norm": float(torch.stack([g.norm() for g in gradients.values()]).norm()),
    }


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    torch.manual_seed(0)
    torch.save({name: case(folder / name, *model) for name, model in MODELS.items()}, folder / "cases.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_every_layout_agrees_with_transformers(cases: Path, world: int) -> None:
    script, tests = Path(__file__).with_name("layouts.py"), Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(world), cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
