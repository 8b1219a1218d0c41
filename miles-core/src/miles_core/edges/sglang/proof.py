"""Whether all weights arrived: the server's are made random before an update, and told by checksum behind it.

SGLang fuses tensors, and cuts them for its ranks, so its checksums are not those of what was sent. They are those of
the model on disk once version 0 has arrived, and every one of them differs from that of the random weights once any
version has.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ..protocols import EngineError, TransportError

Check = Callable[[str], Awaitable[dict[str, Any]]]  # asks the server's /weights_checker for an action

OR_ELSE = "; for an engine with tensors that no file of weights has, sglang.verify_every = -1 leaves them alone"


def checksums(told: dict[str, Any]) -> dict[str, str]:
    """Those that the server's tensor-parallel ranks tell: "0/model.norm.weight" and so on."""
    ranks = told.get("ranks")
    if not ranks:
        raise EngineError("/weights_checker: a reply without checksums")
    return {f"{i}/{name}": value for i, told in enumerate(ranks) for name, value in told["checksums"].items()}


class Proof:
    """Of one update of one server's weights."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._random: dict[str, str] = {}  # checksums of the weights that were to be overwritten

    async def begin(self) -> None:
        """Make every weight random. A server that has no checksums keeps its own, and says so."""
        try:
            checksums(await self._check("checksum"))  # whether it has any
        except EngineError as error:
            print(f"weights that arrive are not compared: the SGLang server has no checksums: {error}", flush=True)
            return
        await self._check("reset_tensors")
        self._random = checksums(await self._check("checksum"))

    async def end(self, disk: dict[str, str] | None) -> None:
        """Raises TransportError where a tensor is not as on ``disk``, or, where that is not known or another version,
        where it is still random."""
        if not (self._random or disk):
            return
        now = checksums(await self._check("checksum"))
        if disk:
            compare(disk, now)
        elif left := [name for name, value in self._random.items() if now.get(name) == value]:
            raise TransportError(
                f"{len(left)} of {len(self._random)} tensors of the engine did not arrive, such as {left[0]}; the "
                f"trainer's model lacks them, or weights were lost on the way{OR_ELSE}"
            )


def compare(disk: dict[str, str], now: dict[str, str]) -> None:
    """Raise TransportError where checksums of weights are not those that the server had of the model on disk."""
    if wrong := [name for name in disk if now.get(name) != disk[name]]:
        raise TransportError(
            f"{len(wrong)} of {len(disk)} tensors are not what the server read from disk, such as {wrong[0]}; the "
            f"trainer's model differs from the engine's, or weights were lost on the way{OR_ELSE}"
        )


class Proving:
    """Which updates of a rank are proved: those that the loop asks for, and every so many; every rank counts alike."""

    def __init__(self, every: int) -> None:
        """``every``: 0 for those asked for alone, -1 for none."""
        self._every, self._count = every, 0

    def now(self, asked: bool) -> bool:
        """Of each update, once."""
        self._count += 1
        return self._every >= 0 and (asked or (self._every > 0 and self._count % self._every == 0))
