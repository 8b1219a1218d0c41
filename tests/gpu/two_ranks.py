"""One process of ``test_two_gpus.py``: the gradients of each layout of two ranks beside those of one GPU."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_cases import error, errors, pack, run_of, trainer, weighted

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {"use_distributed_optimizer": False},
    "sharded": {},  # data parallelism, each rank with half of the optimizer
}
WORST, WHOLE = 0.08, 0.05


def gathered(mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    both: list[Any] = [None, None]
    dist.all_gather_object(both, {name: tensor.cpu() for name, tensor in mine.items()})
    return {name: tensor for given in both for name, tensor in given.items()}


def check(name: str, tiny: Path, case: dict[str, Any], layers: str) -> None:
    """The gradients just before a step, where every rank has them; their norm, and that the step moves every weight."""
    with trainer(run_of(tiny, trainers=2), transformer_impl=layers, **LAYOUTS[name]) as one:
        layout = one.model.layout
        mine = case["sequences"][layout.dp_rank :: layout.dp_size]
        rows = [mine[:2], mine[2:], []]
        outputs = one.model.run([pack(row) for row in rows], one.forward, weighted)
        assert len(outputs) == 3 * layout.last_stage
        found: dict[str, torch.Tensor] = {}

        def veto(norm: float) -> None:
            assert abs(norm / case["norm"] - 1) < WHOLE, f"{name}: norm {norm}, {case['norm']} on one GPU"
            if name != "sharded":
                found.update(gathered(one.gradients()))

        before = gathered(one.export())
        one.model.step(veto)
        after = gathered(one.export())
        # A norm's weight is 1 at first, and the learning rate is less than what bfloat16 can add to that.
        still = [key for key in after if "norm" not in key and torch.equal(before[key], after[key])]
        assert before.keys() == after.keys() and not still, f"{name}: {still}"
        if name != "sharded":
            apart = errors(found, case["gradients"])
            assert max(apart.values()) < WORST, f"{name}: {apart}"
            joined = [torch.cat([g[key].flatten().cpu() for key in sorted(g)]) for g in (found, case["gradients"])]
            assert error(*joined) < WHOLE
    print(name, "agrees", flush=True)


def main(rank: int, folder: Path, tiny: Path, layers: str) -> None:
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    from megatron.core import parallel_state as mpu
    from miles_core.edges.megatron import device

    device.install()
    case = torch.load(folder / "case.pt")
    for name in LAYOUTS:
        check(name, tiny, case, layers)
        mpu.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
