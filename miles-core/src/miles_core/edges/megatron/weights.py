"""Hugging Face weights: read into Megatron's parameters, exported one tensor at a time, and saved again.

Torch, safetensors and Megatron are imported where they are used, for ``check_weights`` runs on a login node.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...types import Refused
from ..room import naming, sync
from . import hf
from .names import EMBEDDING, OUTPUT, VALUE, Block, Fusion, Head, Names
from .stored import INDEX, SINGLE, Stored, check_weights, find_tensors, some

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Export", "check_weights", "export_weights", "load_weights", "save_hf"]

PART_BYTES = 4 << 30  # of one file that ``save_hf`` writes, and of the memory it takes to do so
_COPIED = (".json", ".jinja", ".model", ".txt")  # configuration and tokenizer


# -- into Megatron --------------------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Megatron's parameters in the order of their construction, layers numbered from the first of the whole model."""
    while hasattr(module, "module"):  # DistributedDataParallel and Float16Module hold the model there
        module = getattr(module, "module")  # noqa: B009 - nn.Module declares its attributes as tensors or modules
    for name, parameter in module.named_parameters():
        head, found, rest = name.partition("decoder.layers.")
        if found and not head:
            local, _, rest = rest.partition(".")
            layer = int(getattr(module.get_submodule(found + local), "layer_number")) - 1  # noqa: B009
            name = f"{found}{layer}.{rest}"
        yield name, parameter


def load_weights(module: nn.Module, folder: Path, head: Head = "token") -> None:
    """Fill this rank's parameters from a model folder, reading only the rows and columns that it holds.

    A collective of the ranks that share one replica. Call it before the optimizer is built: an optimizer that keeps
    parameters of its own (bf16, distributed) copies them then. Raises Refused unless every parameter was filled and
    every tensor of the folder used; all of those ranks raise when one does.
    """
    if complaints := check_weights(folder, head=head):
        raise Refused("\n".join(complaints))
    names, (found, _) = Names(hf.read(folder), head), find_tensors(folder)
    with ExitStack() as stack:
        reader = _Reader(stack, found)
        for name, parameter in parameters(module):
            if fault := _fill(names, name, parameter, reader):
                complaints.append(fault)
    ranks = _over_replica((reader.used, complaints))
    complaints = some(list(dict.fromkeys(fault for _, faults in ranks for fault in faults)))
    if not complaints:
        unused = sorted(names.tensors().keys() - set().union(*(seen for seen, _ in ranks)))
        faults = [f"{found[name].file}: tensor {name} fits no parameter of the model" for name in unused]
        complaints = some(faults, "leave out the [megatron] arguments that change the architecture")
    if complaints:
        raise Refused("\n".join(complaints))


class _Reader:
    """Reads blocks of tensors, opening each file once."""

    def __init__(self, stack: ExitStack, found: dict[str, Stored]) -> None:
        self._stack, self._found = stack, found
        self._open: dict[Path, Any] = {}
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def read(self, name: str, block: Block, dim: int) -> Tensor:
        from safetensors import safe_open

        file = self._found[name].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        part = self._open[file].get_slice(name)
        self.used.add(name)
        tensor: Tensor = part[:, block.start : block.stop] if dim else part[block.start : block.stop]
        return tensor


def _fill(names: Names, name: str, parameter: nn.Parameter, reader: _Reader) -> str | None:
    """Copy one parameter out of the files; returns what forbids it."""
    rank, ranks = _tensor_parallel()
    try:
        fusion = _fusion(names, name, parameter, ranks)
    except ValueError as error:
        return str(error)
    target, at, dim = parameter.data, 0, fusion.dim
    if VALUE in fusion.tensors and VALUE not in reader:
        target.zero_()  # every value is 0 until it has learned
        return None
    for block in fusion.part(rank, target.shape[dim]):
        length = block.stop - block.start
        target.narrow(dim, at, length).copy_(reader.read(block.tensor, block, dim))
        at += length
        if names.tied and block.tensor == EMBEDDING and OUTPUT in reader:
            rows = reader.read(EMBEDDING, block, dim), reader.read(OUTPUT, block, dim)
            if not rows[0].equal(rows[1]):
                return (
                    f"{OUTPUT} differs from {EMBEDDING} although config.json says tie_word_embeddings true; "
                    "set it to false there to train both"
                )
    target.narrow(dim, at, target.shape[dim] - at).zero_()  # padding of the vocabulary
    return None


def _fusion(names: Names, name: str, parameter: nn.Parameter, ranks: int) -> Fusion:
    """Raises ValueError when the table has no such parameter, or one of another shape."""
    fusion = names.fusion(name, ranks)
    if fusion is None:
        raise ValueError(
            f"Megatron's parameter {name} {list(parameter.shape)} has no Hugging Face name; "
            "leave out the [megatron] arguments that add it"
        )
    expected, shape = fusion.shape(ranks), tuple(parameter.shape)
    padded = fusion.padded and shape[1:] == expected[1:] and shape[0] > expected[0]
    if shape != expected and not padded:
        raise ValueError(
            f"Megatron's parameter {name} has shape {list(shape)} on each of {ranks} tensor-parallel ranks, "
            f"where config.json makes it {list(expected)}; leave out the [megatron] arguments that change it"
        )
    return fusion


def _tensor_parallel() -> tuple[int, int]:
    from megatron.core import parallel_state as mpu

    return mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()


def _over_replica[T](value: T) -> list[T]:
    """The value of every tensor-parallel rank of every pipeline stage."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    group = mpu.get_model_parallel_group()
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


# -- and out again --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """How the shard of one tensor-parallel rank is cut: the pieces along it, and whose each of them is."""

    lengths: tuple[int, ...]
    pieces: dict[str, tuple[int, ...]]  # numbers of the pieces of each tensor, in the order of its own rows


def _parts(fusion: Fusion, ranks: int, length: int) -> list[_Part]:
    """For every rank's shard of a parameter, which is ``length`` long there."""
    parts = []
    for rank in range(ranks if fusion.split else 1):
        blocks = fusion.part(rank, length)
        lengths = [block.stop - block.start for block in blocks]
        padding = length - sum(lengths)
        found = {name: tuple(i for i, b in enumerate(blocks) if b.tensor == name) for name in fusion.tensors}
        parts.append(_Part((*lengths, padding) if padding else tuple(lengths), found))
    return parts


class Export:
    """What ``export_weights`` needs to know of a module, found once: looking names up takes longer than sending."""

    def __init__(self, module: nn.Module, config: dict[str, Any], head: Head = "token") -> None:
        """``config`` is the parsed ``config.json``. Raises Refused for a parameter without a Hugging Face name."""
        names, (self._rank, self._ranks) = Names(config, head), _tensor_parallel()
        try:
            found = [
                (_fusion(names, name, parameter, self._ranks), parameter) for name, parameter in parameters(module)
            ]
        except ValueError as error:
            raise Refused(str(error)) from None
        self._plan = [
            (fusion, parameter, _parts(fusion, self._ranks, parameter.shape[fusion.dim]))
            for fusion, parameter in found
            if fusion.exported
        ]

    def tensors(
        self, value: Callable[[nn.Parameter], Tensor] | None = None, everywhere: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Full tensors of this pipeline stage under their Hugging Face names, in an order that never changes.

        ``value`` names a tensor of the parameter's shape to export instead of its data, such as its gradient. Every
        rank iterates to the end, in step: tensors are gathered one at a time over the tensor-parallel group. Only its
        first rank in the first data-parallel replica gets any, unless ``everywhere``: then every rank does. A tensor
        may share the memory of the parameter, so copy what outlives the next step.
        """
        from megatron.core import parallel_state as mpu

        if not everywhere and mpu.get_data_parallel_rank(with_context_parallel=True) != 0:
            return  # its tensor-parallel group holds the same tensors as that of replica 0
        for fusion, parameter, parts in self._plan:
            shard = (parameter if value is None else value(parameter)).detach()
            shards = _gather(shard, everywhere) if fusion.split and self._ranks > 1 else [shard]
            if everywhere or self._rank == 0:
                yield from _take_apart(fusion, parts, shards)


def export_weights(
    module: nn.Module,
    config: dict[str, Any],
    value: Callable[[nn.Parameter], Tensor] | None = None,
    everywhere: bool = False,
    head: Head = "token",
) -> Iterator[tuple[str, Tensor]]:
    """``Export(module, config, head).tensors(value, everywhere)``. Raises Refused before the first tensor."""
    yield from Export(module, config, head).tensors(value, everywhere)


def _gather(shard: Tensor, everywhere: bool) -> list[Tensor]:
    """The shard of every tensor-parallel rank on the first one, or ``everywhere``; nothing on the others."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    rank, ranks = _tensor_parallel()
    group = mpu.get_tensor_model_parallel_group()
    parts = [torch.empty_like(shard) for _ in range(ranks)] if everywhere or rank == 0 else None
    if everywhere:
        dist.all_gather(parts, shard.contiguous(), group=group)
    else:
        dist.gather(shard.contiguous(), parts, group=group, group_dst=0)
    return parts or []


def _take_apart(fusion: Fusion, parts: list[_Part], shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that ``shards``, one per tensor-parallel rank, are made of."""
    import torch

    cut = [
        (part.pieces, shard.split_with_sizes(part.lengths, fusion.dim) if len(part.lengths) > 1 else (shard,))
        for part, shard in zip(parts, shards, strict=True)
    ]
    for name in fusion.tensors:  # blocks run in the order of each tensor's own rows, so its pieces join end to end
        found = [pieces[i] for numbers, pieces in cut for i in numbers[name]]
        yield name, found[0] if len(found) == 1 else torch.cat(found, fusion.dim)


def save_hf(module: nn.Module, source: Path, folder: Path, head: Head = "token") -> None:
    """Write the weights to ``folder`` with the configuration and tokenizer of ``source``, whole or not at all.

    A head of values is the tensor ``score.weight``, as ``load_weights`` reads it.
    Every rank calls it. Each pipeline stage writes its own files, so ``folder`` must be one that all machines see. A
    folder found there is replaced. Raises OSError on every rank when one of them could not write, and can then be
    called again.
    """
    import torch.distributed as dist

    config = hf.read(source)
    writing = folder.with_name(f".{folder.name}.writing")
    first = dist.get_rank() == 0
    _on_every_rank(lambda: _prepare(writing) if first else None)
    try:
        written = _on_every_rank(lambda: _write(export_weights(module, config, head=head), writing))
        _on_every_rank(lambda: _finish(written, config, source, writing, folder) if first else None)
    finally:
        if first:
            shutil.rmtree(writing, ignore_errors=True)  # gone by now, unless something failed


@dataclass
class _Written:
    """What one rank wrote: the tensors of each file, the bytes of them all, and the name of their dtype."""

    files: dict[str, list[str]] = field(default_factory=dict)
    size: int = 0
    dtype: str = ""


def _on_every_rank[T](work: Callable[[], T]) -> list[T]:
    """Do ``work`` and return every rank's result. What one rank raises is raised by all, so that none waits for it."""
    import torch.distributed as dist

    outcome: tuple[T | None, Exception | None]
    try:
        outcome = work(), None
    except Exception as error:
        outcome = None, error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for _, fault in outcomes:
        if fault is not None:
            raise fault
    return [result for result, _ in outcomes]


def _prepare(writing: Path) -> None:
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)


def _write(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> _Written:
    """Write what this rank is given, ``PART_BYTES`` at a time."""
    import torch.distributed as dist

    held: dict[str, Tensor] = {}
    written, bytes_held, fault = _Written(), 0, None
    for name, tensor in tensors:
        if fault is not None:
            continue  # the other ranks are still sending
        size = tensor.numel() * tensor.element_size()
        if held and bytes_held + size > PART_BYTES:
            fault = _flush(held, folder, written, dist.get_rank())
            held, bytes_held = {}, 0
        held[name] = tensor.to("cpu", copy=True).contiguous()
        bytes_held += size
        written.size += size
        written.dtype = str(tensor.dtype).removeprefix("torch.")
    fault = fault or (_flush(held, folder, written, dist.get_rank()) if held else None)
    if fault is not None:
        raise fault
    return written


def _flush(tensors: dict[str, Tensor], folder: Path, written: _Written, rank: int) -> OSError | None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = folder / f"model-{rank:05d}-{len(written.files):05d}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        sync(path)
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or _number(str(error))
        return OSError(number, f"{path.name} cannot be written: {error}", str(path))
    written.files[path.name] = list(tensors)
    return None


def _finish(written: list[_Written], config: dict[str, Any], source: Path, writing: Path, folder: Path) -> None:
    """Add what the weights came with, then put the folder in its place."""
    with naming(writing):
        _add(written, config, source, writing)
        for path in (*writing.iterdir(), writing):
            sync(path)
        aside = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            folder.rename(aside)
        writing.rename(folder)
        sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)


def _add(written: list[_Written], config: dict[str, Any], source: Path, writing: Path) -> None:
    """The index of the weights, where they are several files, the configuration and the tokenizer."""
    files = {file: tensors for rank in written for file, tensors in rank.files.items()}
    if len(files) == 1:
        (writing / next(iter(files))).rename(writing / SINGLE)
    else:
        weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
        index = {"metadata": {"total_size": sum(rank.size for rank in written)}, "weight_map": weight_map}
        (writing / INDEX).write_text(json.dumps(index, indent=2))
    for path in source.iterdir():
        if path.is_file() and path.suffix in _COPIED and path.name != INDEX:
            shutil.copyfile(path, writing / path.name)
    dtype = next(rank.dtype for rank in written if rank.dtype)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # readers load weights as what stands here
    (writing / "config.json").write_text(json.dumps(config | {key: dtype}, indent=2))


def _number(said: str) -> int | None:
    """The errno that an error of safetensors' names, if it names one."""
    found = re.search(r"\(os error (\d+)\)", said)
    return int(found[1]) if found else None
