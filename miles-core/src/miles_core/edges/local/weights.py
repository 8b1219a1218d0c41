"""The engine's weights: fused, in float32, filled in place from tensors under their Hugging Face names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..protocols import EngineError, TransportError
from .architecture import Architecture


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Query, key and value are one matrix, gate and up another: two products instead of five."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    output: Tensor  # [hidden, heads * head_dim]
    output_bias: Tensor | None
    mlp_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None


@dataclass(frozen=True)
class Target:
    """Where one Hugging Face tensor lives: ``view`` of a fused tensor holds it, cut to ``inner``, once per copy."""

    view: Tensor  # [copies, *inner] or [*inner]
    shape: tuple[int, ...]  # as Hugging Face has it
    inner: tuple[int, ...]  # the same elements, in an order that ``view`` can be indexed by

    def write(self, tensor: Tensor) -> None:
        self.view.copy_(tensor.view(self.inner))

    def read(self) -> Tensor:
        copy = self.view[0] if self.view.dim() > len(self.inner) else self.view
        return copy.reshape(self.shape)


class Weights:
    """Every parameter of a model, addressable by its Hugging Face name through ``targets``.

    Rotary pairs (i, i + head_dim / 2) stand side by side in the fused query and key rows, so that a rotation is one
    complex product; scores do not change, since queries and keys are permuted alike.
    """

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self.targets: dict[str, Target] = {}
        self.embedding = torch.zeros(arch.vocab, arch.hidden)
        self.norm = torch.zeros(arch.hidden)
        self.head = self.embedding if arch.tied else torch.zeros(arch.vocab, arch.hidden)
        self._whole("model.embed_tokens.weight", self.embedding)
        self._whole("model.norm.weight", self.norm)
        if not arch.tied:
            self._whole("lm_head.weight", self.head)
        self.layers = [self._layer(f"model.layers.{i}.") for i in range(arch.layers)]

    def _whole(self, name: str, tensor: Tensor) -> None:
        self.targets[name] = Target(tensor, tuple(tensor.shape), tuple(tensor.shape))

    def _layer(self, at: str) -> Layer:
        a = self.arch

        def bias(rows: int, wanted: bool) -> Tensor | None:
            return torch.zeros(rows) if wanted else None

        layer = Layer(
            input_norm=torch.zeros(a.hidden),
            qkv=torch.zeros(a.qkv_rows, a.hidden),
            qkv_bias=bias(a.qkv_rows, a.qkv_bias),
            qk_norm=torch.zeros(a.heads + a.kv_heads, a.head_dim) if a.qk_norm else None,
            output=torch.zeros(a.hidden, a.heads * a.head_dim),
            output_bias=bias(a.hidden, a.output_bias),
            mlp_norm=torch.zeros(a.hidden),
            gate_up=torch.zeros(2 * a.intermediate, a.hidden),
            gate_up_bias=bias(2 * a.intermediate, a.mlp_bias),
            down=torch.zeros(a.hidden, a.intermediate),
            down_bias=bias(a.hidden, a.mlp_bias),
        )
        self._whole(at + "input_layernorm.weight", layer.input_norm)
        self._whole(at + "post_attention_layernorm.weight", layer.mlp_norm)
        self._attention(at + "self_attn.", layer)
        for kind, fused, down in (("weight", layer.gate_up, layer.down), ("bias", layer.gate_up_bias, layer.down_bias)):
            if fused is not None and down is not None:
                self._whole(f"{at}mlp.gate_proj.{kind}", fused[: a.intermediate])
                self._whole(f"{at}mlp.up_proj.{kind}", fused[a.intermediate :])
                self._whole(f"{at}mlp.down_proj.{kind}", down)
        return layer

    def _attention(self, at: str, layer: Layer) -> None:
        a = self.arch
        keys, values = a.heads * a.head_dim, (a.heads + a.kv_heads) * a.head_dim
        for kind, fused, output in (("weight", layer.qkv, layer.output), ("bias", layer.qkv_bias, layer.output_bias)):
            if fused is not None:
                self._rotary(f"{at}q_proj.{kind}", fused[:keys], a.heads)
                self._rotary(f"{at}k_proj.{kind}", fused[keys:values], a.kv_heads)
                self._whole(f"{at}v_proj.{kind}", fused[values:])
            if output is not None:
                self._whole(f"{at}o_proj.{kind}", output)
        if layer.qk_norm is not None:
            half = a.head_dim // 2
            for name, rows in (("q_norm", layer.qk_norm[: a.heads]), ("k_norm", layer.qk_norm[a.heads :])):
                view = rows.view(-1, half, 2).transpose(1, 2)
                self.targets[f"{at}{name}.weight"] = Target(view, (a.head_dim,), (2, half))

    def _rotary(self, name: str, rows: Tensor, heads: int) -> None:
        half, rest = self.arch.head_dim // 2, rows.shape[1:]
        view = rows.view(heads, half, 2, *rest).transpose(1, 2)
        self.targets[name] = Target(view, tuple(rows.shape), (heads, 2, half, *rest))

    def write(self, name: str, tensor: Tensor) -> None:
        """Copy ``tensor``, of any float dtype, over the weight of this name.

        Raises TransportError for a name that the model does not have, or a shape that is not the model's.
        """
        target = self.targets.get(name)
        if target is None:
            tied = "; its output layer is the embedding" if name == "lm_head.weight" else ""
            raise TransportError(f"{name}: the model in the engine has no such weight{tied}")
        if tuple(tensor.shape) != target.shape:
            raise TransportError(
                f"{name}: arrived with shape {list(tensor.shape)}, the model in the engine has {list(target.shape)}"
            )
        target.write(tensor)

    def load(self, folder: Path) -> None:
        """Fill every weight from the safetensors of a model folder.

        Raises EngineError naming the file and the tensor when one is missing, damaged, or not of this model.
        """
        missing = set(self.targets)
        for path in _files(folder):
            try:
                for name, tensor in _tensors(path):
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.arch.tied):
                        continue  # computed here, or a copy of the embedding that some exports keep
                    self.write(name, tensor)
                    missing.discard(name)
            except (OSError, SafetensorError, TransportError) as error:
                raise EngineError(f"{path}: {error}") from None
        if missing:
            raise EngineError(f"{folder}: no tensor {sorted(missing)[0]} ({len(missing)} missing in all)")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"{index} cannot be read: {error}") from None
    return [folder / name for name in sorted(names)]
