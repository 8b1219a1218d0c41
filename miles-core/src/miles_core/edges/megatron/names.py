"""Every parameter of an architecture: its Megatron name, its Hugging Face names, and how one is made of the others.

A Megatron parameter is a concatenation of blocks of Hugging Face tensors along one dimension, written down in the
order in which the tensor-parallel ranks hold them: each rank has an equal part of it. Import cuts a rank's part out of
the files, export puts the parts back, and both follow the same blocks, so that one undoes the other.

Plain Python on parsed JSON: nothing heavy is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .hf import architecture

Shape = tuple[int, ...]
Head = Literal["token", "value"]
Join = Literal[
    "copy",  # the same on every rank
    "rows",  # split by output feature, Megatron's column parallelism
    "columns",  # split by input feature, Megatron's row parallelism
    "vocab",  # rows, of which the last rank may have more than the vocabulary: zeros that no token reaches
    "gate_up",  # each rank's rows of the gate, then the same rows of the up projection
    "qkv",  # for each key-value head: the rows of its query heads, of its key, of its value
]


@dataclass(frozen=True)
class Entry:
    """One row of a table. ``{layer}`` counts from the first layer of the model in both kinds of names."""

    megatron: tuple[str, ...]  # a model has one of them: TransformerEngine keeps a norm inside the layer it feeds
    join: Join
    tensors: dict[str, str]  # Hugging Face name -> what its dimensions are, as keys of ``Names.sizes``
    exported: bool = True  # False where another parameter holds the same tensor


@dataclass(frozen=True)
class Block:
    """Rows (or columns) ``start`` to ``stop`` of a Hugging Face tensor."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True)
class Fusion:
    """How one Megatron parameter is made: ``blocks`` end to end along ``dim``, then an equal part for each rank."""

    tensors: dict[str, Shape]
    blocks: tuple[Block, ...]
    dim: int
    split: bool
    padded: bool  # the parts may be longer than the blocks
    exported: bool

    def shape(self, ranks: int) -> Shape:
        """Of the parameter on each rank, without padding."""
        shape = list(next(iter(self.tensors.values())))
        length = sum(block.stop - block.start for block in self.blocks)
        shape[self.dim] = -(-length // ranks) if self.split else length
        return tuple(shape)

    def part(self, rank: int, length: int) -> list[Block]:
        """The blocks within one rank's ``length`` rows (or columns), in order; what they leave over is padding."""
        first = rank * length if self.split else 0
        part, at = [], 0
        for block in self.blocks:
            start = max(block.start, block.start + first - at)
            stop = min(block.stop, block.start + first + length - at)
            if start < stop:
                part.append(Block(block.tensor, start, stop))
            at += block.stop - block.start
        return part


class Names:
    """The table of one model. Raises ``hf.UnsupportedModel`` for a ``config.json`` that no table covers."""

    def __init__(self, config: dict[str, Any], head: Head = "token") -> None:
        """``head`` "value": the last layer gives one number a token instead of one for each entry of the vocabulary."""
        sizes = architecture(config)
        arguments = sizes.arguments
        self.layers: int = arguments["num_layers"]
        self.heads: int = arguments["num_attention_heads"]
        self.groups: int = arguments["num_query_groups"]
        self.sizes: dict[str, int] = {
            "one": 1,
            "vocab": sizes.vocab_size,
            "hidden": arguments["hidden_size"],
            "ffn": arguments["ffn_hidden_size"],
            "head": arguments["kv_channels"],
            "q": arguments["kv_channels"] * self.heads,
            "kv": arguments["kv_channels"] * self.groups,
        }
        self.head = head
        self.tied = head == "token" and not arguments["untie_embeddings_and_output_weights"]
        last = _VALUE if head == "value" else _TIED if self.tied else _UNTIED
        self.entries = TABLES[config["model_type"]] + last
        self._by_megatron = {name: entry for entry in self.entries for name in entry.megatron}

    def tensors(self) -> dict[str, Shape]:
        """Every Hugging Face tensor that the model must have, and its shape."""
        return {
            name.format(layer=layer): self._shape(dims)
            for entry in self.entries
            for name, dims in entry.tensors.items()
            if name != VALUE
            for layer in (range(self.layers) if "{layer}" in name else range(1))
        }

    def optional(self) -> dict[str, Shape]:
        """Tensors that some files hold although the model has no place for them."""
        unused = {OUTPUT: self._shape("vocab hidden")} if self.tied or self.head == "value" else {}
        return unused | ({VALUE: self._shape("one hidden")} if self.head == "value" else {})

    def fusion(self, megatron: str, ranks: int) -> Fusion | None:
        """How the parameter of this name is made for ``ranks`` tensor-parallel ranks; None for a name not known.

        The number in the name must count from the first layer of the model, not of a pipeline stage.
        """
        found = _LAYER.search(megatron)
        entry = self._by_megatron.get(_LAYER.sub(".layers.{layer}.", megatron))
        if entry is None:
            return None
        layer = found.group(1) if found else ""
        tensors = {name.format(layer=layer): self._shape(dims) for name, dims in entry.tensors.items()}
        return Fusion(
            tensors=tensors,
            blocks=tuple(self._blocks(entry.join, tensors, ranks)),
            dim=1 if entry.join == "columns" else 0,
            split=entry.join != "copy",
            padded=entry.join == "vocab",
            exported=entry.exported,
        )

    def _shape(self, dims: str) -> Shape:
        return tuple(self.sizes[dim] for dim in dims.split())

    def _blocks(self, join: Join, tensors: dict[str, Shape], ranks: int) -> Iterable[Block]:
        lengths = {name: shape[1 if join == "columns" else 0] for name, shape in tensors.items()}
        # "rows" of one tensor are a single piece of it, whoever holds which part
        pieces = {"gate_up": ranks, "qkv": self.groups}.get(join, 1)
        for piece in range(pieces):
            for name, length in lengths.items():
                yield Block(name, piece * length // pieces, (piece + 1) * length // pieces)


def is_buffer(name: str) -> bool:
    """Whether a Hugging Face tensor is not a weight: old files hold the frequencies that config.json determines."""
    return name.endswith(".rotary_emb.inv_freq")


EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
VALUE = "score.weight"  # as transformers calls the head of a model that classifies

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_M = "decoder.layers.{layer}."
_H = "model.layers.{layer}."

_DECODER = (
    Entry(("embedding.word_embeddings.weight",), "vocab", {EMBEDDING: "vocab hidden"}),
    Entry(
        (_M + "input_layernorm.weight", _M + "self_attention.linear_qkv.layer_norm_weight"),
        "copy",
        {_H + "input_layernorm.weight": "hidden"},
    ),
    Entry(
        (_M + "self_attention.linear_qkv.weight",),
        "qkv",
        {
            _H + "self_attn.q_proj.weight": "q hidden",
            _H + "self_attn.k_proj.weight": "kv hidden",
            _H + "self_attn.v_proj.weight": "kv hidden",
        },
    ),
    Entry((_M + "self_attention.linear_proj.weight",), "columns", {_H + "self_attn.o_proj.weight": "hidden q"}),
    Entry(
        (_M + "pre_mlp_layernorm.weight", _M + "mlp.linear_fc1.layer_norm_weight"),
        "copy",
        {_H + "post_attention_layernorm.weight": "hidden"},
    ),
    Entry(
        (_M + "mlp.linear_fc1.weight",),
        "gate_up",
        {_H + "mlp.gate_proj.weight": "ffn hidden", _H + "mlp.up_proj.weight": "ffn hidden"},
    ),
    Entry((_M + "mlp.linear_fc2.weight",), "columns", {_H + "mlp.down_proj.weight": "hidden ffn"}),
    Entry(("decoder.final_layernorm.weight",), "copy", {"model.norm.weight": "hidden"}),
)
_QKV_BIAS = (
    Entry(
        (_M + "self_attention.linear_qkv.bias",),
        "qkv",
        {
            _H + "self_attn.q_proj.bias": "q",
            _H + "self_attn.k_proj.bias": "kv",
            _H + "self_attn.v_proj.bias": "kv",
        },
    ),
)
_QK_NORM = (
    Entry((_M + "self_attention.q_layernorm.weight",), "copy", {_H + "self_attn.q_norm.weight": "head"}),
    Entry((_M + "self_attention.k_layernorm.weight",), "copy", {_H + "self_attn.k_norm.weight": "head"}),
)
_UNTIED = (Entry(("output_layer.weight",), "vocab", {OUTPUT: "vocab hidden"}),)
_VALUE = (Entry(("output_layer.weight",), "copy", {VALUE: "one hidden"}),)
# The output layer is the embedding; the last of several pipeline stages holds a copy, which the first one exports.
_TIED = (Entry(("output_layer.weight",), "vocab", {EMBEDDING: "vocab hidden"}, exported=False),)

TABLES: dict[str, tuple[Entry, ...]] = {
    "llama": _DECODER,
    "qwen2": _DECODER + _QKV_BIAS,
    "qwen3": _DECODER + _QK_NORM,
}
