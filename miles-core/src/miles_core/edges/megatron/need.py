"""What a model takes of each GPU: as built, or as planned from config.json, where nothing is allocated or imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...config import RunConfig
from ...types import Complain, Role
from ..sharing import gpu_bytes
from .hf import Architecture, UnsupportedModel, architecture, read

GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes on one rank's GPU. ``activations`` are what a micro-batch keeps at least; a built model tells none."""

    weights: int
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    activations: int = 0

    @property
    def optimizer(self) -> int:
        return self.gradients + self.masters + self.moments

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "fp32 weights": self.masters}
        parts |= {"Adam's moments": self.moments, "activations": self.activations}
        told = " + ".join(f"{size / GB:.1f} {what}" for what, size in parts.items() if size)
        one = not (self.optimizer or self.activations)
        return f"{told[: told.index(' ')]} GB of weights" if one else f"{told} = {self.total / GB:.1f} GB"


def planned(table: dict[str, Any], run: RunConfig, model: Architecture, role: Role) -> Need:
    """On the fullest rank, which is the first: it has the embedding."""
    tensor, pipeline = (int(table.get(f"{kind}_model_parallel_size", 1)) for kind in ("tensor", "pipeline"))
    a, layers = model.arguments, model.arguments["num_layers"] // pipeline
    tables = 1 + (pipeline == 1 and role.head == "token" and a["untie_embeddings_and_output_weights"])
    count = (layers * model.layer + a["hidden_size"] + tables * model.vocab_size * a["hidden_size"]) // tensor
    half = bool(table.get("bf16", run.placement.layout != "cpu"))
    width = 2 if half else 4
    weights = width * count
    if not role.trained:
        return Need(weights)
    ranks = run.placement.trainers // (tensor * pipeline) if table.get("use_distributed_optimizer", True) else 1
    wide = 2 if table.get("grad_reduce_in_bf16") else 4
    kept = layers * (whole := _kept(a, tensor, bool(table.get("sequence_parallel"))))
    if table.get("recompute_granularity"):  # "full" keeps the least: what each layer is given, and all of one
        kept = layers * a["hidden_size"] + whole
    return Need(
        weights,
        wide * count,
        4 * count // ranks if half else 0,
        8 * count // ranks,
        width * kept * run.batch.micro_tokens,
    )


def _kept(a: dict[str, Any], tensor: int, sequence: bool) -> int:
    """Values that a layer keeps of each token for its backward: what norms, products, attention and SwiGLU are given.
    What kernels keep besides is left out."""
    query, key = (a[heads] * a["kv_channels"] for heads in ("num_attention_heads", "num_query_groups"))
    cut = 2 * query + 2 * key + a["qk_layernorm"] * (query + key) + 3 * a["ffn_hidden_size"]
    return int(4 * a["hidden_size"] // (tensor if sequence else 1) + cut // tensor)


def teams(table: dict[str, Any], run: RunConfig, roles: dict[str, Role]) -> list[dict[str, Need]]:
    """What the models take that stand on the same ranks, for each team of ranks. Raises UnsupportedModel."""
    every = {"policy": Role(trained=True)} | roles
    apart = [name for name in every if name in run.placement.apart]
    groups = [[name for name in every if name not in apart], *([name] for name in apart)]
    folders = {name: Path(role.path) if role.path else run.model.path for name, role in every.items()}
    models = {name: architecture(read(folder)) for name, folder in folders.items()}
    return [{name: planned(table, run, models[name], every[name]) for name in names} for names in groups]


def at_once(needs: dict[str, Need]) -> int:
    """Bytes of models on one GPU, of which one at a time has activations."""
    return sum(replace(need, activations=0).total for need in needs.values()) + max(
        need.activations for need in needs.values()
    )


def told(needs: dict[str, Need]) -> str:
    return "; ".join(f"{name} {need}" for name, need in needs.items())


def check(table: dict[str, Any], run: RunConfig, roles: dict[str, Role], complain: Complain) -> None:
    """Complain of ranks that cannot fit on a GPU whose size is known, with the arithmetic."""
    size = gpu_bytes(run)
    if not size:
        return
    try:
        found = teams(table, run, roles)
    except UnsupportedModel:
        return  # whoever reads that model complains
    for needs in found:
        if (most := at_once(needs)) > size:
            both = f"together {most / GB:.1f} GB, " if len(needs) > 1 else ""
            complain(
                "placement.trainers",
                f"does not fit: {told(needs)}, {both}on each GPU and at the least, of {size / GB:.1f} GB. Raise it or "
                "megatron.tensor_model_parallel_size, or lower batch.micro_tokens or set "
                "megatron.recompute_granularity where activations are the most of it",
            )


def explained(table: dict[str, Any], run: RunConfig, roles: dict[str, Role]) -> str:
    """For ``miles plan``, a line for each team of ranks."""
    size = gpu_bytes(run)
    of = f"of {size / GB:.1f} GB" if size else "of a size that placement.gpu_gb can tell"
    lines = []
    for needs in teams(table, run, roles):
        both = f"; together {at_once(needs) / GB:.1f} GB" if len(needs) > 1 else ""
        lines.append(f"{told(needs)}{both}, at the least, on each GPU {of}")
    return "\n".join(lines)
