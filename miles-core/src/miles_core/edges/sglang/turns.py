"""The memory of a server on GPUs that trainers use too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Turns:
    """Whether a server has weights and cache now, and whether it will have them while ranks train."""

    shared: bool  # trainers use its GPUs
    may_stay: bool
    stays: bool = False  # it keeps its memory while they train
    slept: bool = False  # it gave its memory up in this update
    asleep: bool = False  # and has not taken it again

    @property
    def gives(self) -> bool:
        """Whether memory is to be given up for a training."""
        return self.shared and not self.stays

    def begin(self) -> bool:
        """An update begins: whether memory is to be given up."""
        self.slept = self.asleep = self.gives
        return self.asleep

    def stay(self, room: int, size: int | None) -> bool:
        """Whether the server keeps its memory from the next update on.

        ``room``: bytes on each GPU that the training left when it took most, the server asleep or not as in this
        update. ``size``: what the server takes when it is awake, None where it does not tell.
        """
        before, needed = self.stays, size if self.slept else 0
        self.stays = self.shared and self.may_stay and needed is not None and room >= needed
        if self.stays != before:
            does = "keeps its memory while ranks train" if self.stays else "gives its memory up while ranks train"
            left = f"{room / 1e9:.1f} GB are to spare beside them"
            print(f"the SGLang server {does}: {left}, {(needed or 0) / 1e9:.1f} GB of it to be taken", flush=True)
        return self.stays
