"""A role's weights, optimizer, schedule and random-number states in Megatron's distributed checkpoint format."""

from __future__ import annotations

import logging
import pickle
import queue
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from .build import Trained

# The optimizer's shards are written as they lie in its buffers: nothing is gathered, on writing or reading.
_METADATA = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
# What reading a cut or damaged file raises, here and in torch.distributed.checkpoint.
_UNREADABLE = (
    CheckpointException,
    CheckpointingException,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    pickle.UnpicklingError,
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read back by these ranks; the message says why and what to change."""


@torch.no_grad()
def save(folder: Path, module: torch.nn.Module, trained: Trained | None) -> None:
    """Write one role into ``folder``, made if need be. A collective. Raises OSError where it cannot be written."""
    _make(folder)
    state = _sharded(module, trained, is_loading=False) | {"layout": _layout()}
    if trained is not None:
        state["scheduler"] = trained.scheduler.state_dict()
    try:
        with _library():
            dist_checkpointing.save(state, str(folder), validate_access_integrity=False)
    except (CheckpointException, CheckpointingException) as error:
        failures = [str(what).strip().splitlines()[-1] for what, _ in getattr(error, "failures", {}).values()]
        said = failures[0] if failures else "another rank says why"
        raise OSError(f"{folder}: the checkpoint could not be written: {said}") from error


def _make(folder: Path) -> None:
    """Make the folder; one rank's failure is every rank's."""
    said: list[str | None] = [None] * dist.get_world_size()
    mine = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        mine = f"{folder} cannot be made: {error.strerror}"
    dist.all_gather_object(said, mine)
    if failed := [what for what in said if what]:
        raise OSError(failed[0])


@torch.no_grad()  # in float32 the optimizer's own parameters are views of leaves, copied into in place
def load(folder: Path, module: torch.nn.Module, trained: Trained | None) -> None:
    """Restore what ``save`` wrote. A collective. Raises CheckpointError when it is not a checkpoint of these ranks."""
    try:
        with _library():
            written = dist_checkpointing.load_common_state_dict(str(folder)).get("layout")
    except _UNREADABLE as error:
        raise CheckpointError(_broken(folder, error)) from error
    if written != _layout():
        raise CheckpointError(
            f"{folder} was written by {_described(written)}, this run has {_described(_layout())}; "
            "set placement.trainers and the parallel sizes in [megatron] to what they were"
        )
    if trained is not None:
        _with_state(trained)
    try:
        with _library():
            wanted = _sharded(module, trained, is_loading=True)
            state = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    except _UNREADABLE as error:
        raise CheckpointError(_broken(folder, error)) from error
    module.load_state_dict(state["model"])
    if trained is not None:
        trained.optimizer.load_state_dict(state["optimizer"])
        _restore_step_counts(trained.optimizer)
        trained.scheduler.num_steps = 0  # loading adds the checkpoint's count to it
        trained.scheduler.load_state_dict(state["scheduler"])
    _set_random_states(state["random"])


def _with_state(trained: Trained) -> None:
    """Give an optimizer that never stepped the tensors that its checkpoint is read into; torch makes them lazily."""
    for optimizer in trained.optimizer.chained_optimizers:
        if isinstance(optimizer, DistributedOptimizer) and not optimizer.optimizer.state:
            optimizer._init_optimizer_states_with_dummy_values()


@contextmanager
def _library() -> Iterator[None]:
    """Megatron's checkpoint library, without its deprecation warnings.

    It writes in this process, so its results need no manager process, which would take seconds to start.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        yield


def _broken(folder: Path, error: BaseException) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return f"{folder} is not a whole checkpoint: {said}; resume from an older one"


def _sharded(module: torch.nn.Module, trained: Trained | None, is_loading: bool) -> dict[str, Any]:
    model = module.sharded_state_dict(metadata=_METADATA)  # type: ignore[operator]
    state = {
        "model": model,
        "random": ShardedObject("random", _random_states(), (dist.get_world_size(),), (dist.get_rank(),)),
    }
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


def _restore_step_counts(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own count of Adam's steps, which corrects its bias.

    Megatron reads the count into the parameter groups, where PyTorch's Adam does not look; and where it reads it into
    the parameters, they all get one tensor, which Adam then increments once for each.
    """
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            count = group.pop("step", None)
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone() if count is None else torch.full_like(state["step"], count)


def _random_states() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state()
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
