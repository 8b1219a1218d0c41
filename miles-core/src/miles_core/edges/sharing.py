"""A GPU on which trainers and an engine take turns: what both ends of it must know, in the process of the trainer.
And how large it is, for plans of what is to stand on it.

An engine that gives its memory up for each training, and takes it again, costs a tenth of a second a step, as much as
moving a model's weights several times. Where both fit, nobody gives anything up: the engine stands still, no more.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache

from ..config import RunConfig

SPARE = 0.05  # of a GPU's memory, which must be free when both fit: rows of other lengths take somewhat more


@dataclass(slots=True)
class Sharing:
    """One in each training rank."""

    trained: bool = False  # so that ``room`` knows what a training takes
    stays: bool = False  # the engine keeps its memory while ranks train, so they keep theirs while it samples

    def room(self) -> int:
        """Bytes that an engine may have taken beside the training that took most so far; negative before the first."""
        import torch

        if not (self.trained and torch.cuda.is_available()):
            return -1
        free, total = torch.cuda.mem_get_info()
        mine = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()  # which that training took besides
        return free - mine - int(SPARE * total)


HERE = Sharing()


def gpu_bytes(run: RunConfig) -> int:
    """Memory of each GPU as ``placement.gpu_gb`` tells it, or else of the smallest of this machine; 0 where there is
    none, as on a login node."""
    return int(run.placement.gpu_gb * 1e9) if run.placement.gpu_gb else _smallest()


@cache
def _smallest() -> int:
    """By the driver's own tool, which allocates nothing there and needs no library."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(int(line) << 20 for line in said.split("\n") if line.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
