"""One process of ``test_layouts.py``: trains each model in each layout of its ranks and compares with the reference."""

import pickle
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from core.megatron.batches import pack
from miles_core.config import RunConfig
from miles_core.edges.megatron import Megatron, device, hf, weights
from miles_core.types import Batch, Output, Role

SGD = {"lr": 0.1, "eps": 1.0, "max_norm": 0.0, "beta1": 0.0, "beta2": 0.0}  # Adam then moves by lr g / (|g| + eps)
ONE = [{}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}]
TWO = [
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
    {},  # two replicas
    {"use_distributed_optimizer": False},
]


def built(folder: Path, table: dict, world: int, optim: dict, trained: bool = True):
    run = RunConfig(
        algorithm="none", model={"path": folder}, optim=optim, placement={"trainers": world}, steps=10, seed=3
    )
    plugin = Megatron(Megatron.Config(**table), run)
    return plugin, plugin.miles_model("policy", Role(trained=trained))


def forward(plugin: Megatron):
    return lambda module, batch: plugin.miles_forward("policy", module, batch)


def loss(batch: Batch, output: Output) -> torch.Tensor:
    weight = batch.columns["weight"]
    return (weight * output.logprobs).sum() + 0.3 * (weight * output.entropy).sum()


def micro_batches(case: dict, layout, split: str) -> list[Batch]:
    """This rank's share of the same sequences: packed by fours, or one by one; then empty ones up to an even number."""
    size = 1 if split == "single" else 4
    pairs = list(zip(case["sequences"], case["weights"], strict=True))
    rows = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    most = -(-len(rows) // layout.dp_size)
    mine = rows[layout.dp_rank :: layout.dp_size]
    mine += [[]] * (most - len(mine) + 1)  # and one that is empty on every rank
    return [pack([s for s, _ in row], [w for _, w in row], case["temperature"]) for row in mine]


def gathered(tensors) -> dict[str, torch.Tensor]:
    mine, both = [(name, tensor.clone()) for name, tensor in tensors], [None] * dist.get_world_size()
    dist.all_gather_object(both, mine)
    return {name: tensor for given in both for name, tensor in given}


def close(found: dict, expected: dict, tolerance: float) -> float:
    """Largest error of any tensor, relative to that tensor's own size."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error < tolerance, f"{name}: {error:.1e}"
        worst = max(worst, float(error))
    return worst


def summed(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def check_logits(folder: Path, table: dict, case: dict) -> None:
    """All sequences in one row: the logits of each are those of transformers in float32, alone."""
    from miles_core.edges.megatron.attention import row

    _, model = built(folder, table, 1, SGD, trained=False)
    sequences = case["sequences"]
    packed = row([0, *accumulate(map(len, sequences))], torch.device("cpu"))
    with device.running(), torch.no_grad():
        packed.cos, packed.sin = model.module.rotary(packed.positions, torch.float32)
        tokens = torch.tensor([[token for sequence in sequences for token in sequence]])
        logits = model.module(
            input_ids=tokens, position_ids=packed.positions[None], attention_mask=None, packed_seq_params=packed
        )
    for found, expected in zip(logits[0].split(list(map(len, sequences))), case["logits"], strict=True):
        assert (found[:, : expected.shape[1]] - expected).abs().max() < 1e-4


def check_gradients(folder: Path, table: dict, case: dict, split: str) -> None:
    """Values, loss and gradients equal transformers' in float64; then one step moves every weight as they say."""
    plugin, model = built(folder, table, dist.get_world_size(), SGD)
    config, batches, losses = hf.read(folder), micro_batches(case, model.layout, split), []

    def counted(batch: Batch, output: Output) -> torch.Tensor:
        total = loss(batch, output)
        losses.append(float(total.detach()) * model.layout.reports)
        return total

    outputs = model.run(batches, forward(plugin), None)
    assert len(outputs) == (len(batches) if model.layout.last_stage else 0)
    before = gathered(model.export())
    model.run(batches[:1], forward(plugin), counted)  # gradients of several calls add up
    outputs = model.run(batches[1:], forward(plugin), counted)
    for batch, output in zip(batches[1:], outputs, strict=False):
        assert not output.logprobs.requires_grad
        assert (output.logprobs[~batch.mask] == 0).all() and (output.entropy[~batch.mask] == 0).all()
    assert summed(sum(losses)) == pytest.approx(case["loss"], rel=1e-5)

    whole = table.get("use_distributed_optimizer", True) is False or model.layout.dp_size == 1
    found = {}

    def veto(norm: float) -> None:
        assert norm == pytest.approx(case["norm"], rel=1e-5)
        if whole:
            found.update(gathered(weights.export_weights(model.module, config, lambda p: p.main_grad)))

    metrics, skipped = model.step(veto)
    assert skipped is None and metrics["lr"] == SGD["lr"]
    if whole:
        close(found, case["gradients"], 1e-5)
    after = gathered(model.export())
    moved = {name: before[name] - after[name] for name in after}
    close(moved, {name: SGD["lr"] * g / (g.abs() + SGD["eps"]) for name, g in case["gradients"].items()}, 1e-4)


def check_planned(folder: Path, table: dict) -> None:
    """What the fullest rank holds is what a plan says of it, but for norms, which a plan divides like all the rest."""
    from miles_core.edges.megatron import need

    for role in (Role(trained=True), Role(trained=False)):
        plugin, model = built(folder, table, dist.get_world_size(), SGD, role.trained)
        told = need.planned(table, plugin.run, hf.architecture(hf.read(folder)), role)
        each: list = [None] * dist.get_world_size()
        dist.all_gather_object(each, model._needs)
        for part in ("weights", "gradients", "masters", "moments"):
            assert max(getattr(one, part) for one in each) == pytest.approx(getattr(told, part), rel=0.03), part
        assert bool(told.activations) == role.trained


def check_veto(folder: Path, table: dict, case: dict) -> None:
    """A vetoed update changes nothing, forgets its gradients, and does not count for the schedule."""
    optim = {"lr": 0.1, "warmup": 4, "max_norm": 0.5}
    plugin, model = built(folder, table, dist.get_world_size(), optim)
    batches = micro_batches(case, model.layout, "packed")
    before = gathered(model.export())
    model.run(batches, forward(plugin), loss)
    metrics, skipped = model.step(lambda norm: "too steep")
    assert skipped == "too steep" and metrics["grad_norm"] == pytest.approx(case["norm"], rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gathered(model.export()).items())
    for update in (1, 2):
        model.run(batches, forward(plugin), loss)
        metrics, skipped = model.step(lambda norm: None)
        assert skipped is None and metrics["lr"] == pytest.approx(0.1 * update / 4)
        if update == 1:
            assert metrics["grad_norm"] == pytest.approx(case["norm"], rel=1e-5)


def check_frozen(folder: Path, table: dict, case: dict) -> None:
    plugin, model = built(folder, table, dist.get_world_size(), SGD, trained=False)
    batches = micro_batches(case, model.layout, "packed")
    trained, again = (model.run(batches, forward(plugin), None) for _ in range(2))
    for one, two in zip(trained, again, strict=True):
        assert torch.equal(one.logprobs, two.logprobs) and torch.equal(one.entropy, two.entropy)
    with pytest.raises(ValueError, match="policy is frozen"):
        model.run(batches, forward(plugin), loss)
    with pytest.raises(ValueError, match="policy is frozen"):
        model.step(lambda norm: None)
    with pytest.raises(ValueError, match="no micro-batch"):
        model.run([], forward(plugin), None)


def drawn() -> list:
    """A number from every stream there is."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.random(), float(np.random.rand()), torch.rand(1).item(), tracked]


def check_resume(folder: Path, table: dict, case: dict, out: Path) -> None:
    """Three steps, or one, a checkpoint, a new model and two steps: the same weights and random numbers, bit by bit."""
    world, optim = dist.get_world_size(), {"lr": 1e-2, "schedule": "cosine", "warmup": 2, "weight_decay": 0.1}
    plugin, model = built(folder, table, world, optim)
    batches = micro_batches(case, model.layout, "packed")

    def step(model) -> dict[str, float]:
        model.run(batches, forward(plugin), loss)
        return model.step(lambda norm: None)[0]

    step(model)
    torch.use_deterministic_algorithms(True)  # what lies between parameters, and is written too, is the same each time
    waited_for(model, out / "plain")
    write = model.save(out / "aside")
    with ThreadPoolExecutor(1) as behind:
        writing = behind.submit(write)
        straight = [step(model), drawn(), step(model), gathered(model.export())]
        writing.result()
    model.save(out / "later")()  # of later weights, in the memory that the first save copied into
    torch.use_deterministic_algorithms(False)
    check_same(out)
    plugin, model = built(folder, table, world, optim)
    drawn()
    model.load(out / "aside")
    resumed = [step(model), drawn(), step(model), gathered(model.export())]
    assert resumed[:3] == straight[:3]
    assert all(torch.equal(tensor, straight[3][name]) for name, tensor in resumed[3].items())
    check_broken(model, out / "aside")


def waited_for(model, folder: Path) -> None:
    """The same checkpoint by Megatron alone, in one go."""
    from megatron.core import dist_checkpointing
    from miles_core.edges.megatron import checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint._use_library()
    with device.running(), torch.no_grad():
        state = checkpoint._sharded(model.module, model._trained, is_loading=False) | {"layout": checkpoint._layout()}
        state["scheduler"] = model._trained.scheduler.state_dict()
        dist_checkpointing.save(state, str(folder), validate_access_integrity=False)


def check_same(out: Path) -> None:
    """Every byte is what it would have been, and of its moment."""
    plain, aside, later = (
        {p.name: p.read_bytes() for p in (out / name).iterdir()} for name in ("plain", "aside", "later")
    )
    said = [pickle.loads(files.pop(".metadata")) for files in (plain, aside)]  # has a number of its own each time
    assert said[0].storage_data == said[1].storage_data and said[0].planner_data == said[1].planner_data
    assert aside == plain
    assert all(later[name] != plain[name] for name in plain if "distcp" in name)
    dist.barrier()


def check_broken(model, folder: Path) -> None:
    from miles_core.edges.megatron.checkpoint import CheckpointError

    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        model.load(folder / "nothing")
    dist.barrier()
    if dist.get_rank() == 0:
        metadata = folder / ".metadata"
        metadata.write_bytes(metadata.read_bytes()[:100])
    dist.barrier()
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        model.load(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        folder.parent.joinpath("file").touch()
    dist.barrier()
    with pytest.raises(OSError):
        model.save(folder.parent / "file" / "checkpoint")


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting{world}", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    device.install()
    from megatron.core import parallel_state as mpu

    cases = torch.load(folder / "cases.pt")
    for number, table in enumerate(ONE if world == 1 else TWO):
        for name, case in cases.items():
            if world == 1:
                check_logits(folder / name, table, case)
            check_gradients(folder / name, table, case, "packed")
            check_planned(folder / name, table)
            if name == "qwen3":
                check_gradients(folder / name, table, case, "single")
                check_veto(folder / name, table, case)
                check_frozen(folder / name, table, case)
                check_resume(folder / name, table, case, folder / f"out{world}{number}")
        mpu.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
