"""What an engine takes of each of its GPUs, from the files of the model: nothing is allocated or imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

GB = 1e9


@dataclass(frozen=True)
class Need:
    """On each GPU of an engine."""

    weights: int  # bytes
    token: int  # bytes of cache for a token


def need(folder: Path, table: dict[str, Any], gpus: int) -> Need | None:
    """None where the files cannot be read; whoever trains the model complains of that."""
    width = 4 if table.get("dtype") in ("float32", "float") else 2
    narrow = str(table.get("kv_cache_dtype", "")).startswith("fp8")
    try:
        count = sum(prod(shape) for path in folder.glob("*.safetensors") for shape in _shapes(path))
        told = json.loads((folder / "config.json").read_text())
        heads = told["num_attention_heads"]
        head = told.get("head_dim") or told["hidden_size"] // heads
        pairs = max(1, (told.get("num_key_value_heads") or heads) // gpus)
        return Need(width * count // gpus, 2 * told["num_hidden_layers"] * pairs * head * (1 if narrow else width))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _shapes(path: Path) -> list[list[int]]:
    """Of the tensors in a safetensors file: a length, then a JSON header of that length, then the tensors."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [row["shape"] for name, row in header.items() if name != "__metadata__"]


def check(wanted: Need, fraction: float | None, size: int) -> str:
    """What is wrong with an engine on GPUs of ``size`` bytes, of which it may take ``fraction``; "" if nothing."""
    most = int((fraction or 1.0) * size)
    if wanted.weights + wanted.token <= most:
        return ""
    part = f"{fraction} of {size / GB:.1f} GB are {most / GB:.1f} GB" if fraction else f"there are {size / GB:.1f} GB"
    return (
        f"an engine's weights take {wanted.weights / GB:.1f} GB of each GPU and {part}, cache included; raise "
        f"{'it or ' if fraction else ''}sglang.tp_size"
    )


def explained(wanted: Need, fraction: float | None, size: int, shared: bool) -> str:
    """For ``miles plan``. ``shared``: what there is for an engine is what trainers leave."""
    told = f"{wanted.weights / GB:.1f} GB of weights on each GPU, and {wanted.token:,} bytes of cache for each token"
    if not fraction:
        return f"{told}; SGLang decides how much cache, or sglang.mem_fraction_static does"
    if not size:
        return f"{told}; placement.gpu_gb would tell for how many"
    cache = int(fraction * size) - wanted.weights
    left = ", less where trainers take much of it" if shared else ""
    return f"{told}: {cache / GB:.1f} GB for {cache // wanted.token:,} tokens in {fraction} of {size / GB:.1f} GB{left}"
