"""A run small enough for a test, through the very same loop."""

from __future__ import annotations

import asyncio
import json
import random
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDER, INLINE = (Path(__file__).with_name(name) for name in ("recorder.py", "inline.py"))
DIGITS, WORDS = "0123456789", ["<pad>", "<eos>", *"0123456789", ">", "<"]  # an even number, for two ranks to share

BASE: dict[str, Any] = {
    "steps": 1,
    "batch.groups": 4,
    "batch.group_size": 4,
    "batch.micro_tokens": 64,
    "rollout.max_tokens": 4,
    "optim.lr": 1e-3,
    "eval.every": 1,
}


@dataclass(frozen=True)
class Finished:
    """What a run left: its exit status, what it said of an error, and what is in its folder.

    ``calls`` counts how often a hook was called in a place, ("trainer", "miles_loss"), over all processes of a place.
    A wrapped hook counts once, and so does one that raised."""

    status: int
    said: str
    folder: Path
    metrics: list[dict[str, float]]  # a row a step, the evaluation before the first one being row 0
    calls: Counter[tuple[str, str]]

    @property
    def hooks(self) -> Counter[str]:
        """How often each hook was called, wherever."""
        counted: Counter[str] = Counter()
        for (_, hook), times in self.calls.items():
            counted[hook] += times
        return counted


def run(algorithm: str, data: Path, folder: Path, settings: dict[str, Any]) -> Finished:
    """``miles run`` on what ``write_tiny`` wrote. ``settings`` are keys of a run by their dotted names. Every process
    of it is a thread of this one, in which ``torch.distributed`` has one rank; a run of several ranks is one of real
    processes, on a Ray of its own.

    The task is to say the digits of the prompt; rows have the columns prompt, answer and wrong. ``algorithm`` is a
    name, or the path of a file.
    """
    files = {"model.path": "model", "data.train": "train.jsonl", "data.eval": "eval.jsonl"}
    keys = BASE | {key: f"{data}/{name}" for key, name in files.items()}
    keys |= {"run_dir": str(folder), "algorithm": algorithm, "reward.positions.weight": 1.0} | settings
    alone = keys.get("placement.trainers", 1) == 1 and not keys.get("placement.apart")
    keys["plugins"] = [*keys.get("plugins", []), str(RECORDER), *([str(INLINE)] if alone else [])]
    status, said = _run([f"{key}={json.dumps(value)}" for key, value in keys.items()], folder)
    calls, rows = folder / "hooks.txt", folder / "metrics.jsonl"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return Finished(
        status=status,
        said=said,
        folder=folder,
        metrics=[json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else [],
        calls=Counter((place, hook) for place, _, hook in (line.partition(" ") for line in lines)),
    )


def _run(written: list[str], folder: Path) -> tuple[int, str]:
    """The exit status that the command would have, and what it would say of an error."""
    from ..edges.toml import Source
    from ..edges.toml.assemble import assemble
    from ..types import Refused

    try:
        manifest = assemble(Source([], written)).at(folder)
        with warnings.catch_warnings(action="ignore"):
            from ..loop.driver import train
        with warnings.catch_warnings(action="ignore"):  # Megatron's, about what this machine lacks
            asyncio.run(train(manifest, folder, resume=False))
    except Refused as error:
        return 2, str(error)
    except Exception:
        return 1, traceback.format_exc()
    return 0, ""


def write_tiny(folder: Path) -> Path:
    """Write ``model/``, ``train.jsonl`` and ``eval.jsonl``; the same bytes each time, and no torch is imported."""
    draw = random.Random(0)
    for name, rows in {"train": 64, "eval": 8}.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(rows):
                answer, wrong = ("".join(draw.choices(DIGITS, k=3)) for _ in range(2))
                wrong = wrong if wrong != answer else answer[::-1] + "0"
                file.write(json.dumps({"prompt": f"{answer}>", "answer": answer, "wrong": wrong}) + "\n")
    (folder / "model").mkdir()
    _write_tokenizer(folder / "model")
    _write_model(folder / "model")
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {token: i for i, token in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_model(folder: Path, hidden: int = 32, layers: int = 2, heads: int = 4, width: int = 8) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    draw = np.random.default_rng(0)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": width,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    query, key = heads * width, heads * width // 2
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (len(WORDS), hidden),
        "model.norm": (hidden,),
        "lm_head": (len(WORDS), hidden),
    }
    for i in range(layers):
        parts: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        parts |= {"self_attn.q_norm": (width,), "self_attn.k_norm": (width,)}
        parts |= {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden)}
        parts |= {"self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query)}
        parts |= {f"mlp.{name}_proj": (2 * hidden, hidden) for name in ("gate", "up")}
        parts |= {"mlp.down_proj": (hidden, 2 * hidden)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    tensors = {
        f"{name}.weight": np.ones(shape, np.float32)
        if "norm" in name
        else 0.1 * draw.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
