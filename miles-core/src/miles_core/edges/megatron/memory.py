"""What a trained model takes of its GPU, and how it makes room for an engine on the same one.

While the engine samples, nothing of the trainer is used but its weights, and they only when the sampling is over. Where
both fit on the GPU all stays where it is (see ``sharing``). Elsewhere activations are given back to the driver.
Gradients, fp32 weights and Adam's moments stay as long as they take a small share of what is free, because moving them
costs time at every step; beyond it the gradients are freed and the others wait in pinned memory of the host.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from megatron.core import mpu
from torch import Tensor

from ...types import Refused
from ..sharing import HERE
from .build import Trained
from .need import GB, Need

KEPT = 0.35  # most of the memory free without them that optimizer and gradients keep while an engine uses a GPU


def need(args: Namespace, module: torch.nn.Module, trained: bool) -> Need:
    """What ``module`` and, once it is ``trained``, its gradients and optimizer take."""
    weights = sum(p.nbytes for p in module.parameters())
    if not trained:
        return Need(weights)
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    ranks = mpu.get_data_parallel_world_size() if args.use_distributed_optimizer else 1
    half = args.bf16 or args.fp16
    wide = 4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2
    return Need(weights, wide * count, 4 * count // ranks if half else 0, 8 * count // ranks)


def check(name: str, wanted: Need) -> None:
    """Raise Refused, with the arithmetic, where the GPU has not that much left beside the weights, which are there."""
    free, total = torch.cuda.mem_get_info()
    if wanted.optimizer > free:
        raise Refused(
            f"{name} does not fit: {wanted} on each GPU, before any activation; {(free + wanted.weights) / GB:.1f} of "
            f"{total / GB:.1f} GB are free. Raise placement.trainers or megatron.tensor_model_parallel_size"
        )


class Turns:
    """The trainer's end of a GPU shared with an engine. ``rest`` before the engine's turn, ``wake`` before its own."""

    of_this_rank: ClassVar[list[Turns]] = []  # an engine's turn begins when all of them rest

    def __init__(self, trained: Trained, wanted: Need, settle: Callable[[], None]) -> None:
        """``settle`` lets memory be given away that is still being copied for a checkpoint."""
        self.of_this_rank.append(self)
        self._trained, self._settle = trained, settle
        there = wanted.gradients + wanted.masters  # already; the moments are not
        self.moves = wanted.optimizer > KEPT * (torch.cuda.mem_get_info()[0] + there)
        self._host: dict[tuple[int, str], Tensor] = {}  # pinned, kept from turn to turn
        # Adam's moments come into being in the first step, when the engine has long taken what was free at its start.
        self._reserved = None if self.moves else torch.empty(wanted.moments, dtype=torch.uint8, device="cuda")
        self._resting = False

    def rest(self) -> None:
        """Give memory away, unless the engine never gave up its own. Does nothing the second time."""
        if self._resting or HERE.stays:
            return
        self._resting = True
        self._settle()
        if self.moves:
            self._trained.ddp.offload_grad_buffers(synchronize=False, empty_cache=False)
            self._each(self._to_host)
            torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take it again, to train. Does nothing the second time."""
        HERE.trained = True
        if not self._resting:
            return
        self._resting = False
        self._reserved = None
        if self.moves:
            self._each(lambda tensor, _: tensor.to("cuda", non_blocking=True))
            self._trained.ddp.restore_grad_buffers(synchronize=False)

    def _each(self, move: Any) -> None:
        """Replace every fp32 weight and every tensor of the optimizer's state by what ``move`` makes of it."""
        for optimizer in getattr(self._trained.optimizer, "chained_optimizers", [self._trained.optimizer]):
            inner = optimizer.optimizer
            for group in inner.param_groups:
                for parameter in group["params"]:
                    parameter.data = move(parameter.data, (id(parameter), ""))
            for parameter, state in inner.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim():
                        state[key] = move(value, (id(parameter), key))

    def _to_host(self, tensor: Tensor, key: tuple[int, str]) -> Tensor:
        if key not in self._host:
            self._host[key] = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return self._host[key].copy_(tensor, non_blocking=True)
