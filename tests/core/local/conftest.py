"""Tiny random models of the three families, on disk and in transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.utils import logging

logging.disable_progress_bar()
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "llama-biased": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 4}, attention_bias=True, mlp_bias=True),
}


@dataclass
class Tiny:
    folder: Path
    model: PreTrainedModel

    def logprobs(self, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
        """What transformers gives ``tokens`` after ``prompt``, in one pass without a cache."""
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    def parameters(self) -> dict[str, torch.Tensor]:
        tied = self.model.config.tie_word_embeddings
        return {k: v for k, v in self.model.state_dict().items() if not (tied and k == "lm_head.weight")}


def build(family: str, folder: Path, seed: int) -> Tiny:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # not the ones and zeros they start as
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return Tiny(folder, model)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """``tiny(family, seed=0)``: each is made once."""

    @cache
    def get(family: str, seed: int = 0) -> Tiny:
        return build(family, tmp_path_factory.mktemp(family), seed)

    return get
