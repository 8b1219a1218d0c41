"""A critic's values are those of a transformers backbone under a linear head, however the work is split; and a frozen
model that is cached says what it says without being asked twice."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layouts import LENGTHS, MODELS, PROMPTS, SIZES

pytestmark = pytest.mark.slow
STEP = {"lr": 0.1, "eps": 1.0}  # of layouts.SGD: a weight moves by lr g / (|g| + eps)
HEADS = {"qwen3": "qwen3", "llama": "llama", "zero": "qwen3"}  # "zero" has no score.weight on disk


def case(folder: Path, config, model, settings: dict, head: bool) -> dict:
    """A random critic on disk; its values, the loss of random sequences, and the values after a step, in float64."""
    net = model(config(**SIZES | settings))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    net.save_pretrained(folder)
    score = torch.randn(1, SIZES["hidden_size"]) * (0.3 if head else 0.0)
    if head:
        file = folder / "model.safetensors"
        save_file(load_file(file) | {"score.weight": score}, file, metadata={"format": "pt"})
    sequences = [torch.randint(0, SIZES["vocab_size"], (length,)) for length in LENGTHS]
    weights = [(1 + torch.randn(length)) * (torch.rand(length) < 0.7) for length in LENGTHS]
    for group, length in PROMPTS.items():
        for i in group:
            sequences[i][:length] = sequences[group[0]][:length]
            weights[i][:length], weights[i][length] = 0.0, 1.0
    backbone, score = net.model.double(), score.double().requires_grad_()

    def values(tokens: torch.Tensor) -> torch.Tensor:
        """Of the state that each token is drawn in; nothing stands before the first."""
        hidden = backbone(tokens[None]).last_hidden_state[0, :-1]
        return torch.cat([torch.zeros(1, dtype=torch.float64), hidden @ score[0]])

    before = [values(tokens) for tokens in sequences]
    for weight in weights:
        weight[0] = 0.0
    total = torch.stack([(w * v).sum() for w, v in zip(weights, before, strict=True)]).sum()
    total.backward()
    parameters = [*backbone.parameters(), score]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    with torch.no_grad():
        for p in parameters:
            p -= STEP["lr"] * p.grad / (p.grad.abs() + STEP["eps"])
        after = [values(tokens) for tokens in sequences]
    return {
        "sequences": [s.tolist() for s in sequences],
        "weights": [w.tolist() for w in weights],
        "temperature": 0.8,
        "before": [v.detach() for v in before],
        "after": after,
        "loss": float(total.detach()),
        "norm": float(norm),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    torch.manual_seed(0)
    made = {name: case(folder / name, *MODELS[kind], head=name != "zero") for name, kind in HEADS.items()}
    assert not any(v.any() for v in made["zero"]["before"]) and any(v.any() for v in made["zero"]["after"])
    torch.save(made, folder / "cases.pt")
    shutil.copytree(folder / "qwen3", folder / "moved")  # one weight of the last layer is another
    file = folder / "moved" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    # the cache is asked for log-probabilities, of a folder without a value head
    for name in ("qwen3", "moved"):
        shutil.copytree(folder / name, folder / "policies" / name)
        file = folder / "policies" / name / "model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if k != "score.weight"}, file, metadata={"format": "pt"})
    return folder


def ranks(what: str, models: Path, world: int) -> tuple[list[int], str]:
    script, tests = Path(__file__).with_name("values.py"), Path(__file__).parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, script, what, str(rank), str(world), models],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in started]
    finally:
        for rank in started:
            rank.kill()
    return [rank.returncode for rank in started], "\n".join(said)


@pytest.mark.parametrize("world", [1, 2])
def test_critics_and_cached_references_agree_with_transformers_in_every_layout(models: Path, world: int) -> None:
    codes, said = ranks("layouts", models, world)
    assert codes == [0] * world, said


def test_a_cache_whose_writer_was_killed_is_whole(models: Path) -> None:
    codes, said = ranks("die", models, 1)
    assert codes == [-signal.SIGXFSZ], said
    codes, said = ranks("read", models, 1)
    assert codes == [0], said


def test_a_cache_that_is_damaged_or_held_is_named(models: Path) -> None:
    codes, said = ranks("faults", models, 1)
    assert codes == [0], said
