"""A role's weights, optimizer, schedule and random-number states in Megatron's distributed checkpoint format."""

from __future__ import annotations

import logging
import queue
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from .build import Trained

# The optimizer's shards are written as they lie in its buffers: nothing is gathered, on writing or reading.
_METADATA = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
_QUIET = ("megatron.core.dist_checkpointing.strategies.torch", "megatron.core.dist_checkpointing.serialization")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read back by these ranks; the message says why and what to change."""


@torch.no_grad()
def save(folder: Path, module: torch.nn.Module, trained: Trained | None) -> None:
    """Write one role into ``folder``, made if need be. A collective. Raises OSError where it cannot be written."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    _prepare_library()
    state = _sharded(module, trained, is_loading=False) | {"layout": _layout()}
    if trained is not None:
        state["scheduler"] = trained.scheduler.state_dict()
    try:
        dist_checkpointing.save(state, str(folder), validate_access_integrity=False)
    except (CheckpointException, CheckpointingException) as error:
        raise OSError(f"{folder}: the checkpoint could not be written: {' '.join(str(error).split())}") from error


@torch.no_grad()  # in float32 the optimizer's own parameters are views of leaves, copied into in place
def load(folder: Path, module: torch.nn.Module, trained: Trained | None) -> None:
    """Restore what ``save`` wrote. A collective. Raises CheckpointError when it is not a checkpoint of these ranks."""
    _prepare_library()
    try:
        written = dist_checkpointing.load_common_state_dict(str(folder)).get("layout")
    except (CheckpointException, CheckpointingException, OSError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {' '.join(str(error).split())}") from error
    if written != _layout():
        raise CheckpointError(
            f"{folder} was written by {_described(written)}, this run has {_described(_layout())}; "
            "set placement.trainers and the parallel sizes in [megatron] to what they were"
        )
    if trained is not None:
        _with_state(trained)
    state = dist_checkpointing.load(
        _sharded(module, trained, is_loading=True), str(folder), validate_access_integrity=False
    )
    module.load_state_dict(state["model"])
    if trained is not None:
        trained.optimizer.load_state_dict(state["optimizer"])
        trained.scheduler.num_steps = 0  # loading adds the checkpoint's count to it
        trained.scheduler.load_state_dict(state["scheduler"])
    _set_random_states(state["random"])


def _with_state(trained: Trained) -> None:
    """Give an optimizer that never stepped the tensors that its checkpoint is read into; torch makes them lazily."""
    for optimizer in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        if not optimizer.optimizer.state:
            optimizer._init_optimizer_states_with_dummy_values()


def _prepare_library() -> None:
    """Megatron writes in this process, so the results need no manager process, which takes seconds to start."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    for name in _QUIET:  # a deprecation of the asynchronous writer, which is not used
        logging.getLogger(name).setLevel(logging.ERROR)


def _sharded(module: torch.nn.Module, trained: Trained | None, is_loading: bool) -> dict[str, Any]:
    model = module.sharded_state_dict(metadata=_METADATA)  # type: ignore[operator]
    state = {"model": model, "random": ShardedObject("random", _random_states(), (dist.get_world_size(),), (dist.get_rank(),))}
    if trained is not None:
        state["optimizer"] = trained.optimizer.sharded_state_dict(
            {"model": model}, is_loading=is_loading, metadata=_METADATA
        )
    return state


def _layout() -> dict[str, int]:
    return {
        "world": dist.get_world_size(),
        "tensor": mpu.get_tensor_model_parallel_world_size(),
        "pipeline": mpu.get_pipeline_model_parallel_world_size(),
    }


def _described(layout: dict[str, int] | None) -> str:
    if layout is None:
        return "something else"
    return f"{layout['world']} ranks (tensor {layout['tensor']}, pipeline {layout['pipeline']})"


def _random_states() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.array(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),  # without a GPU, that of the CPU again
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.cuda.set_rng_state(states["cuda"])
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["megatron"])
