"""What a Hugging Face ``config.json`` says of a model the local engine can serve. Imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("qwen2", "qwen3", "llama")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Unsupported(ValueError):
    """The engine cannot serve this model; the message names the setting of config.json that says so."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency scaling of Llama 3.1: wavelengths beyond the original context are stretched by ``factor``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """A decoder with rotary positions, RMS norms, grouped queries and a SiLU-gated feed-forward layer."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    context: int  # tokens of prompt and response, as the model was made for
    tied: bool  # the output layer is the embedding
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: Llama3Scaling | None

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of float32 keys and values one token takes in the cache, over all layers."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder. Raises OSError, or Unsupported when it is not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise Unsupported(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise Unsupported(f"{path} is not a JSON object")
    return config


def architecture(config: dict[str, Any]) -> Architecture:
    """Translate a parsed ``config.json``. Raises Unsupported naming the setting that cannot be honoured."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise Unsupported(f"config.json says model_type {family!r}; the local engine serves {', '.join(FAMILIES)}")
    if missing := [key for key in _REQUIRED if not isinstance(config.get(key), int)]:
        raise Unsupported(f"config.json lacks {', '.join(missing)}, or not as a whole number")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise Unsupported(f"config.json says hidden_act {activation!r}; the local engine computes silu only")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise Unsupported("config.json asks for sliding-window attention, which the local engine does not compute")
    heads, bias = config["num_attention_heads"], bool(config.get("attention_bias", False))
    rope = _rope(config)
    return Architecture(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or (heads if family == "llama" else 32),
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
        eps=config.get("rms_norm_eps", 1e-6),
        context=config.get("max_position_embeddings", 2048 if family == "llama" else 32768),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_llama3(rope),
    )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, wherever the version of transformers that wrote the file puts them."""
    rope = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        rope |= config.get(key) or {}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "llama3"):
        raise Unsupported(f"config.json says rope_type {rope['rope_type']!r}; the local engine has default and llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unsupported("config.json says partial_rotary_factor below 1, which the local engine does not compute")
    return {key: value for key, value in rope.items() if value is not None}


def _llama3(rope: dict[str, Any]) -> Llama3Scaling | None:
    if rope["rope_type"] != "llama3":
        return None
    if missing := [name for name in _LLAMA3 if name not in rope]:
        raise Unsupported(f"config.json says rope_type llama3 but lacks {', '.join(missing)}")
    return Llama3Scaling(**{name: rope[name] for name in _LLAMA3})
