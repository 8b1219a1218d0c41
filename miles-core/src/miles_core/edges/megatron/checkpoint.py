"""A role's weights, optimizer, schedule and random-number states in Megatron's distributed checkpoint format."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from ..room import FULL, sync
from . import device
from .build import Trained
from .snapshot import Snapshot

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


class Saver:
    """Writes one role in two parts: copies of everything, made by all ranks together, and behind training the files."""

    def __init__(self, module: torch.nn.Module, trained: Trained | None) -> None:
        self._module, self._trained = module, trained
        self._group: dist.ProcessGroup | None = None
        self.snapshot = Snapshot()

    @torch.no_grad()
    def save(self, folder: Path) -> Callable[[], None]:
        """Copy what is to be written into ``folder``, made if need be; returns what writes it. A collective.

        Raises OSError where the folder cannot be made. The function returned is a collective too, on a group of its
        own, for any thread, and raises OSError on every rank where one cannot write. Of a full disk, it can be called
        again, on all of them. Only when it returned may ``save`` be called again: the copies share their memory.
        """
        self._group = self._group or dist.new_group(backend="gloo")
        _make(folder, self._group)
        state = _sharded(self._module, self._trained, is_loading=False) | {"layout": _layout()}
        if self._trained is not None:
            state["scheduler"] = self._trained.scheduler.state_dict()
        apply_factories(state)
        parts = [part for part in nested_values(state) if _written_here(part)]
        for part, copy in zip(parts, self.snapshot.take([part.data for part in parts]), strict=True):
            part.data = copy
        dict_list_map_inplace(_of_now, state)
        return _Writing(folder, state, self.snapshot, self._group)


class _Planned(TorchDistSaveShardedStrategy):
    """Megatron's strategy, which plans who writes what, in a group of its own and up to the writing itself.

    Megatron would plan, and at last tell rank 0 what all others wrote, in the group of the training, which trains on
    meanwhile. The plan alone takes longer than the copies.
    """

    writer: FileSystemWriterAsync
    metadata: Metadata | None  # on rank 0

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._group = group

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "mcore") -> Any:
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        self.writer = FileSystemWriterAsync(checkpoint_dir, thread_count=1)
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        state = mcore_to_pyt_state_dict(named, False)
        (_, self.metadata, _), *_ = save_state_dict_async_plan(state, self.writer, self._group, 0, planner)
        return AsyncRequest(None, (), [])  # for Megatron, which adds to it what is to be done in the end


def _written_here(part: Any) -> bool:
    return isinstance(part, ShardedTensor) and part.data is not None and is_main_replica(part.replica_id)


def _of_now(part: Any) -> Any:
    """What stands beside the sharded tensors, such as Adam's count of steps, which it increments in place."""
    return part.clone() if isinstance(part, torch.Tensor) else part


@dataclass(slots=True)
class _Failed:
    """Why a rank could not write."""

    number: int | None  # of the OSError behind it
    said: str

    @classmethod
    def of(cls, error: BaseException, path: Path | str) -> _Failed:
        """PyTorch's archive raises an error of its own about what a full disk did to it."""
        cause = next((one for one in _chain(error) if getattr(one, "errno", None) in FULL), error)
        return cls(getattr(cause, "errno", None), f"{path}: {getattr(cause, 'strerror', None) or cause}")


@dataclass(slots=True)
class _Writing:
    """Plans who writes what, writes this rank's file, then on rank 0 what stands where in all of them. A collective."""

    folder: Path
    state: dict[str, Any]  # nothing in it changes any more
    snapshot: Snapshot
    group: dist.ProcessGroup
    planned: _Planned | None = None  # once it is
    written: list[WriteResult] | None = None  # where each part is in this rank's file, once that is whole

    def __call__(self) -> None:
        self.snapshot.wait()
        self.planned = self.planned or _plan(self.state, self.folder, self.group)
        mine = _file(self.planned.writer) if self.written is None else self.written
        self.written = None if isinstance(mine, _Failed) else mine
        first, world = dist.get_rank() == 0, dist.get_world_size()
        everyones: list[Any] | None = [None] * world if first else None
        dist.gather_object(mine, everyones, group=self.group)
        said: list[_Failed | None] = [None]
        if everyones:
            failed = [one for one in everyones if isinstance(one, _Failed)]
            worst = sorted(failed, key=lambda one: one.number in FULL)  # no waiting for room mends any other
            said[0] = worst[0] if worst else _metadata(self.folder, self.planned, everyones)
        dist.broadcast_object_list(said, group=self.group)
        if said[0]:
            why = f"the checkpoint could not be written: {said[0].said}"
            raise OSError(said[0].number, why, str(self.folder))


@torch.no_grad()
def _plan(state: dict[str, Any], folder: Path, group: dist.ProcessGroup) -> _Planned:
    """A collective of ``group``. Where a plan was cut short, nothing of it counts: call it with what ``save`` had."""
    _use_library()
    planned = _Planned(group)
    with device.running():
        dist_checkpointing.save(
            state,
            str(folder),
            planned,
            validate_access_integrity=False,
            async_sharded_save=True,
            async_strategy="mcore",
        )
    return planned


def _file(writer: FileSystemWriterAsync) -> list[WriteResult] | _Failed:
    """Where in this rank's file each part of it went, or why it could not be written."""
    written: list[WriteResult] = []
    for number, bucket in enumerate(writer.write_buckets):
        # One file a rank. Megatron's way to write several loses what went wrong.
        _, said = writer.write_preloaded_data([writer.transforms], number, bucket, None, None, use_fsync=True)
        if isinstance(said, Exception):
            failed = _Failed.of(said, bucket[0])
            _forget(said)
            with suppress(OSError):  # half a file is of no use, and others need the room
                os.truncate(bucket[0], 0)
            return failed
        written += said
    return written


def _forget(error: BaseException) -> None:
    """End now what failed. PyTorch's unfinished archive crashes the process when it is left to garbage collection."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what was being handled when it was raised, and so on."""
    while error:
        yield error
        error = error.__context__


def _metadata(folder: Path, planned: _Planned, written: list[list[WriteResult]]) -> _Failed | None:
    try:
        planned.writer.finish(planned.metadata, written)
        save_config(CheckpointingConfig(planned.backend, planned.version), str(folder))
        for path in folder.iterdir():
            sync(path)
    except OSError as error:
        return _Failed.of(error, error.filename or folder / ".metadata")
    return None


def _make(folder: Path, group: dist.ProcessGroup) -> None:
    """Make the folder; one rank's failure is every rank's."""
    said: list[OSError | None] = [None] * dist.get_world_size()
    mine = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        mine = OSError(error.errno, f"cannot be made: {error.strerror}", str(folder))
    dist.all_gather_object(said, mine, group=group)
    if failed := [what for what in said if what]:
        raise failed[0]


@torch.no_grad()  # in float32 the optimizer's own parameters are views of leaves, copied into in place
def load(folder: Path, module: torch.nn.Module, trained: Trained | None) -> None:
    """Restore what ``save`` wrote. A collective. Raises CheckpointError when it is not a checkpoint of these ranks."""
    _use_library()
    try:
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


def _use_library() -> None:
    """Megatron's checkpoint library, without its deprecation warnings, from any thread.

    It writes in this process, so its results need no manager process, which would take seconds to start.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
        logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
        warnings.filterwarnings(
            "ignore", module=r"megatron\.core\.dist_checkpointing|torch\.distributed|torch\.storage"
        )


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
