"""The account of every prompt of a run: which state it is in, and how it came there, on disk before it counts."""

from __future__ import annotations

from .ledger import Ledger

__all__ = ["Ledger"]
