"""Shapes that are measured, with random weights, and what this GPU can do at best."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Shape:
    """A Qwen3, its output layer tied to its embedding."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    groups: int
    width: int = 128  # of a head
    vocab: int = 151936

    def flops(self, parameters: int, lengths: list[int]) -> float:
        """Of a forward and a backward pass over sequences of these lengths.

        6 for each parameter and token, the embedding counted once, for it is the output layer; and causal attention,
        which needs half of its 4 n^2 heads x width forwards and twice that backwards. What is computed again for
        want of memory does not count (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with the causal half).
        """
        attention = 6 * self.layers * self.heads * self.width * sum(n * n for n in lengths)
        return 6.0 * parameters * sum(lengths) + attention


SHAPES = {
    "0.1B": Shape(768, 3072, 12, 12, 6, 64, 512),
    "0.6B": Shape(1024, 3072, 28, 16, 8),
    "4B": Shape(2560, 9728, 36, 32, 8),
}


def write(work: Path, name: str, shape: Shape | None = None) -> Path:
    """The model's folder under ``work``, in bfloat16; made when it is not there yet."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder, shape = work / name, shape or SHAPES[name]
    if folder.exists():
        return folder
    config = Qwen3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        head_dim=shape.width, max_position_embeddings=40960, tie_word_embeddings=True, rope_theta=1e6,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    writing = work / f"{name}.writing"
    model.save_pretrained(writing)
    write_tokenizer(writing)
    writing.rename(folder)
    del model
    forget()
    return folder


def write_tokenizer(folder: Path) -> None:
    """One that a run can load; prompts are tokens here, so what it knows does not matter."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(vocab={"<pad>": 0, "<eos>": 1}, merges=[], unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def run_of(folder: Path, layout: str, **tables: Any) -> Any:
    """The configuration of a run with this model, one trainer and one engine."""
    from miles_core.config import RunConfig

    given = {"algorithm": "none", "model": {"path": folder}, "optim": {"lr": 1e-6}, "steps": 1000, "seed": 3}
    return RunConfig.model_validate(given | {"placement": {"layout": layout}} | tables)


@contextmanager
def rank(gpu: int = 0) -> Iterator[None]:
    """This process as the only training rank."""
    torch.cuda.set_device(gpu)
    with tempfile.TemporaryDirectory() as folder:
        # Bound to a device, this group would be split to make others, and no server could meet it in one.
        dist.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds(work: Callable[[], Any]) -> float:
    """Until the GPU is done with it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate(n: int = 8192, times: int = 30, samples: int = 25) -> float:
    """FLOP/s of a product of two random bfloat16 matrices [n, n]; zeros would run faster.

    The median over about a second, for a card that was cold runs faster at first than it can for long.
    """
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(times):
            a @ b

    products()
    return 2 * n**3 * times / statistics.median(seconds(products) for _ in range(samples))


def copy_seconds(size: int, times: int = 9) -> float:
    """For ``size`` bytes from one place on the GPU to another."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    target.copy_(source)
    return statistics.median(seconds(lambda: target.copy_(source)) for _ in range(times))
