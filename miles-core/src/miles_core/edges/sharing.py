"""A GPU on which trainers and an engine take turns: what both ends of it must know, in the process of the trainer.

An engine that gives its memory up for each training, and takes it again, costs a tenth of a second a step, as much as
moving a model's weights several times. Where both fit, nobody gives anything up: the engine stands still, no more.
"""

from __future__ import annotations

from dataclasses import dataclass

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
