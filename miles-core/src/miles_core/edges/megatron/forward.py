"""One micro-batch through this stage of the model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from ...types import Batch, Output
from .attention import row
from .logprobs import token_logprobs


def forward(module: torch.nn.Module, batch: Batch) -> Output:
    """Log-probabilities and entropies on the last pipeline stage, hidden states on the others.

    A row is padded at its end, by a sequence of zeros that nothing looks at, to one token at least and to a multiple
    of the tensor-parallel size: an empty micro-batch thus runs like any other and keeps every collective in step.
    """
    config = get_model_config(module)
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    length = len(batch.tokens)
    padding = max(-(-length // multiple), 1) * multiple - length
    starts = batch.starts.tolist()
    packed = row([*starts, length + padding] if padding else starts, batch.tokens.device)
    packed.cos, packed.sin = unwrapped(module).rotary(packed.positions, config.params_dtype)  # type: ignore[operator]
    tokens = torch.nn.functional.pad(batch.tokens, (0, padding))[None]
    result = module(
        input_ids=tokens,
        position_ids=packed.positions[None],  # type: ignore[index]
        attention_mask=None,
        packed_seq_params=packed,
        output_processor=_logprobs,
        output_processor_context=batch,
    )
    if isinstance(result, Tensor):
        return Output(hidden=result)
    logprobs, entropy = result
    return Output(logprobs=logprobs, entropy=entropy)


def _logprobs(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Batch, config: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """In place of Megatron's output layer: only trained tokens get a row of logits. Both results are [T] float32."""
    trained = context.mask.nonzero().squeeze(1)
    hidden = hidden_states.squeeze(1)
    if config.sequence_parallel:  # its backward adds up the shares of the tensor-parallel ranks
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    hidden = hidden.index_select(0, trained - 1)  # a token is drawn from what stands before it
    if not config.sequence_parallel:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    weight = output_layer.weight if output_weight is None else output_weight
    parts = token_logprobs(hidden, weight, context.tokens[trained], context.temperature, output_layer.tp_group)
    nothing = hidden.new_zeros(len(context.mask), dtype=torch.float32)
    logprobs, entropy = (nothing.index_copy(0, trained, part) for part in parts)
    return logprobs, entropy


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside its wrappers for data parallelism and half precision."""
    inner: torch.nn.Module = get_attr_wrapped_model(module, "decoder", return_model_obj=True)
    return inner
