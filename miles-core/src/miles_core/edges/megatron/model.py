"""``Model`` of ``miles_core.types`` on Megatron: pipeline schedules, gradient reduction, optimizer, checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ...types import Batch, Layout, Output
from ..protocols import Forward
from . import checkpoint, device, hf, memory, weights
from .build import Trained
from .forward import unwrapped
from .names import Head
from .need import GB


class MegatronModel:
    """One role's model on this rank. A frozen one has no ``trained`` part and refuses to step.

    Every method enters the CPU layer where there is no GPU, so it may be called from any thread.
    """

    def __init__(
        self,
        name: str,
        args: Namespace,
        folder: Path,
        module: torch.nn.Module,
        trained: Trained | None,
        shared: bool = False,
        head: Head = "token",
    ) -> None:
        """``shared``: an engine uses the same GPU, in turns; ``export`` begins its turn, training ends it."""
        self.name, self.folder, self.shared, self.head = name, folder, shared, head
        self.module = unwrapped(module)
        self._args, self._trained = args, trained
        self._whole = trained.ddp if trained else module
        self._device = next(module.parameters()).device
        self.layout = layout()
        self._needs = memory.need(args, module, trained is not None)
        self._saver = checkpoint.Saver(self.module, trained)
        settle = self._saver.snapshot.settle
        self._turns = memory.Turns(trained, self._needs, settle) if trained and shared else None
        self._export: weights.Export | None = None  # once it is asked for: of a critic nobody does

    def total(self, tensor: Tensor) -> Tensor:
        """See ``types.Model.total``."""
        tensor = tensor.clone()
        with device.running():
            torch.distributed.all_reduce(tensor, group=mpu.get_data_parallel_group())
        return tensor

    def memory(self) -> str:
        """See ``types.Model.memory``."""
        if self._device.type != "cuda":
            return ""
        free, total = torch.cuda.mem_get_info()
        how = ""
        if self._turns:
            how = ", optimizer and gradients move to the host" if self._turns.moves else ", which stay in its turns"
            how = f"; shared with an engine{how}"
        return f"{self.name} takes {self._needs} of {total / GB:.1f}{how}; {free / GB:.1f} GB are free"

    def run(
        self, batches: list[Batch], forward: Forward, loss: Callable[[Batch, Output], Tensor] | None
    ) -> list[Output]:
        """See ``types.Model.run``. Every data-parallel rank must pass the same number of micro-batches, at least one.

        A micro-batch may be empty (no sequence, T = 0): it goes forward and backward like any other and adds nothing.
        """
        if not batches:
            raise ValueError(f"{self.name}: no micro-batch to run; a rank without data passes empty ones")
        if loss is not None and self._trained is None:
            raise ValueError(f"{self.name} is frozen, so it cannot be run with a loss; make it Role(trained=True)")
        if loss is not None and self._turns:
            self._turns.wake()
        outputs: list[Output] = []
        with device.running(), torch.set_grad_enabled(loss is not None), ExitStack() as native:
            if self._whole.training != (loss is not None):
                self._whole.train(loss is not None)
            get_forward_backward_func()(
                forward_step_func=self._forward_step(forward, loss, outputs),
                data_iterator=_each(batches, native),
                model=self._whole,
                num_microbatches=len(batches),
                seq_length=1,  # unused: stages tell each other the length of each row
                micro_batch_size=1,
                forward_only=loss is None,
            )
        return outputs

    def _forward_step(
        self, forward: Forward, loss: Callable[[Batch, Output], Tensor] | None, outputs: list[Output]
    ) -> Callable[[Iterator[Batch], torch.nn.Module], tuple[Any, Callable[[Output], Any] | None]]:
        """What Megatron's schedules call for each micro-batch."""
        nothing = torch.zeros((), device=self._device)
        no_tokens = torch.zeros((), dtype=torch.int, device=self._device)

        def forward_step(
            batches: Iterator[Batch], module: torch.nn.Module
        ) -> tuple[Any, Callable[[Output], Any] | None]:
            batch = next(batches)
            output = forward(module, batch)
            if not self.layout.last_stage:
                return output.hidden, None

            def finish(output: Output) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                total = nothing if loss is None else _anchored(loss(batch, output), output)
                outputs.append(_detached(output))
                return total, no_tokens, {}

            return output, finish

        return forward_step

    @torch.no_grad()
    def step(self, veto: Callable[[float], str | None]) -> tuple[dict[str, float], str | None]:
        """See ``types.Model.step``. A vetoed update moves neither the weights nor the learning-rate schedule."""
        if self._trained is None:
            raise ValueError(f"{self.name} is frozen, so it has no optimizer to step; make it Role(trained=True)")
        ddp, optimizer, scheduler = self._trained.ddp, self._trained.optimizer, self._trained.scheduler
        with device.running():
            finalize_model_grads([ddp])
            optimizer.prepare_grads()
            norm = float(optimizer.get_grad_norm())
            reason = veto(norm)
            self._saver.snapshot.settle()
            if reason is None:
                if self._args.clip_grad > 0:
                    clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self._args.clip_grad, norm)
                scheduler.step(1)  # before the update, so that the first one already has a learning rate
                optimizer.step_with_ready_grads()
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
        return {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}, reason

    def saves_often(self) -> None:
        """Reserve the memory that a save takes, so that the first is as quick as the others."""
        copied = self._needs.masters + self._needs.moments
        if self.layout.dp_rank == 0:  # the other replicas' weights are not written
            copied += self._needs.weights
        self._saver.snapshot.reserve(copied + copied // 64)  # between parameters there may be room

    def save(self, folder: Path) -> Callable[[], None]:
        """See ``types.Model.save``: weights, optimizer, schedule and random-number states."""
        with device.running():
            return self._saver.save(folder)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, bit by bit. Raises CheckpointError where the layout of ranks differs."""
        if self._turns:
            self._turns.wake()
        with device.running():
            self._saver.snapshot.settle()
            checkpoint.load(folder, self.module, self._trained)

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names; see ``weights.Export``."""
        for turns in memory.Turns.of_this_rank:  # the critic's too
            turns.rest()
        with device.running():
            self._export = self._export or weights.Export(self.module, hf.read(self.folder))
            yield from self._export.tensors(everywhere=self.shared)

    def save_hf(self, folder: Path) -> None:
        """See ``types.Model.save_hf``."""
        with device.running(), torch.no_grad():
            weights.save_hf(self.module, self.folder, folder, self.head)


def layout() -> Layout:
    """Where this rank stands in Megatron's groups."""
    last = mpu.is_pipeline_last_stage()
    return Layout(
        rank=torch.distributed.get_rank(),
        world=torch.distributed.get_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        last_stage=last,
        reports=last and mpu.get_tensor_model_parallel_rank() == 0,
    )


def _each(batches: list[Batch], native: ExitStack) -> Iterator[Batch]:
    """A schedule names its device only before its first micro-batch; from there on PyTorch is called directly."""
    native.enter_context(device.native())
    yield from batches


def _anchored(loss: Tensor, output: Output) -> Tensor:
    """``loss``, tied to the forward pass even if it is a constant, as that of an empty micro-batch may be."""
    said = output.values if output.logprobs is None else output.logprobs
    return loss if loss.requires_grad or said is None else loss + 0.0 * said.sum()


def _detached(output: Output) -> Output:
    logprobs, entropy, values = (
        None if x is None else x.detach() for x in (output.logprobs, output.entropy, output.values)
    )
    return Output(logprobs=logprobs, entropy=entropy, values=values)
