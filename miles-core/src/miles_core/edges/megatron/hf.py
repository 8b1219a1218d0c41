"""What a Hugging Face ``config.json`` says, in Megatron-LM's words. Plain JSON: nothing heavy is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = ("qwen2", "qwen3", "llama")


class UnsupportedModel(ValueError):
    """The model cannot be trained here; the message says which setting of its config.json forbids it."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Frequency scaling of Llama 3.1: wavelengths beyond the original context are stretched by ``factor``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """``arguments`` under Megatron-LM's names, and what Megatron has no argument for."""

    arguments: dict[str, Any]
    vocab_size: int
    rope_theta: float
    scaling: Llama3Scaling | None

    @property
    def parameters(self) -> int:
        """How many parameters the model has, all of its copies and stages taken once."""
        a = self.arguments
        tables = 1 + a["untie_embeddings_and_output_weights"]
        return int(a["num_layers"] * self.layer + a["hidden_size"] * (1 + tables * self.vocab_size))

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        a = self.arguments
        hidden, width = a["hidden_size"], a["kv_channels"]
        query, key = a["num_attention_heads"] * width, a["num_query_groups"] * width
        attention = hidden * (query + 2 * key) + query * hidden
        attention += (query + 2 * key) * a["add_qkv_bias"] + 2 * width * a["qk_layernorm"]
        return int(attention + 3 * hidden * a["ffn_hidden_size"] + 2 * hidden)


def read(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder. Raises UnsupportedModel when there is none to read."""
    path = folder / "config.json"
    try:
        hf = json.loads(path.read_text())
    except OSError as error:
        raise UnsupportedModel(
            f"{path} cannot be read ({error.strerror}); point model.path at a folder in Hugging Face format"
        ) from None
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}") from None
    if not isinstance(hf, dict):
        raise UnsupportedModel(f"{path} is not a JSON object")
    return hf


def architecture(hf: dict[str, Any]) -> Architecture:
    """Translate a parsed ``config.json``. Raises UnsupportedModel naming the setting that cannot be honoured."""
    kind = hf.get("model_type")
    if kind not in SUPPORTED:
        raise UnsupportedModel(f"config.json says model_type {kind!r}; supported are {', '.join(SUPPORTED)}")
    if missing := [key for key in _REQUIRED if not isinstance(hf.get(key), int)]:
        raise UnsupportedModel(f"config.json lacks {', '.join(missing)}, or not as a whole number")
    _refuse(hf, kind)
    heads = hf["num_attention_heads"]
    rope = _rope(hf)
    arguments: dict[str, Any] = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": hf.get("num_key_value_heads") or (heads if kind == "llama" else 32),
        "kv_channels": hf.get("head_dim") or (128 if kind == "qwen3" else hf["hidden_size"] // heads),
        "max_position_embeddings": hf.get("max_position_embeddings", _POSITIONS[kind]),
        "normalization": "RMSNorm",
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "swiglu": True,
        "disable_bias_linear": True,
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind == "qwen3",
        "untie_embeddings_and_output_weights": not hf.get("tie_word_embeddings", False),
        "position_embedding_type": "none",  # rotary, by our own attention
    }
    return Architecture(arguments, hf["vocab_size"], float(rope.get("rope_theta", 10000.0)), _llama3(rope))


_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_POSITIONS = {"qwen2": 32768, "qwen3": 32768, "llama": 2048}


def _refuse(hf: dict[str, Any], kind: str) -> None:
    if hf.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"config.json says hidden_act {hf['hidden_act']!r}; only silu is supported")
    if hf.get("attention_bias") and kind != "qwen2":
        raise UnsupportedModel("config.json says attention_bias true: a bias on the output projection is not supported")
    if hf.get("mlp_bias"):
        raise UnsupportedModel("config.json says mlp_bias true: a bias in the feed-forward layers is not supported")
    if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()):
        raise UnsupportedModel("config.json asks for sliding-window attention, which is not supported")


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, wherever this version of transformers wrote them."""
    rope = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UnsupportedModel(f"config.json says rope_type {kind!r}; supported are default and llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("config.json says partial_rotary_factor below 1, which is not supported")
    return {key: value for key, value in rope.items() if value is not None}


def _llama3(rope: dict[str, Any]) -> Llama3Scaling | None:
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    names = tuple(Llama3Scaling.__dataclass_fields__)
    if missing := [name for name in names if name not in rope]:
        raise UnsupportedModel(f"config.json asks for rope_type llama3 but lacks {', '.join(missing)}")
    return Llama3Scaling(**{name: rope[name] for name in names})
