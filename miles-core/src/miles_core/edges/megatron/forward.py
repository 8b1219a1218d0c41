"""One micro-batch through this stage of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from ...types import Batch, Output
from .attention import row, to_device
from .compact import compact
from .layers import ValueHead
from .logprobs import token_logprobs


def forward(module: torch.nn.Module, batch: Batch) -> Output:
    """Log-probabilities and entropies on the last pipeline stage, hidden states on the others.

    The model computes what ``compact`` leaves of the micro-batch. That row is padded at its end, by a sequence of zeros
    that nothing looks at, to one token at least and to a multiple of the tensor-parallel size: an empty micro-batch
    thus runs like any other and keeps every collective in step.
    """
    config = get_model_config(module)
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    where = batch.tokens.device
    tokens, mask = (getattr(batch.host or batch, name) for name in ("tokens", "mask"))
    if batch.host is None:  # waits for the GPU
        tokens, mask = tokens.numpy(force=True), mask.numpy(force=True)
        starts = batch.starts.tolist()
    else:
        starts = [0, *np.cumsum(batch.host.lengths).tolist()]
    small, trained = compact(starts, tokens, mask), mask.nonzero()[0]
    length = len(small.tokens)
    padding = max(-(-length // multiple), 1) * multiple - length
    if padding:
        small.starts.append(small.starts[-1] + padding)
        small.seen = np.append(small.seen, np.arange(length, length + padding))
    packed = row(small.starts, where, small.seen)
    packed.cos, packed.sin = unwrapped(module).rotary(packed.positions, config.params_dtype)  # type: ignore[operator]
    drawn_from = small.place[trained - 1]  # a token is drawn from what stands before it
    result = module(
        input_ids=to_device(np.pad(tokens[small.tokens], (0, padding)), where)[None],
        position_ids=packed.positions[None],  # type: ignore[index]
        attention_mask=None,
        packed_seq_params=packed,
        output_processor=_output,
        output_processor_context=(batch, to_device(trained, where), to_device(drawn_from, where)),
    )
    return Output(hidden=result) if isinstance(result, Tensor) else result


def _output(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: tuple[Batch, Tensor, Tensor],
    config: Any,
    **_: Any,
) -> Output:
    """In place of Megatron's output layer: only trained tokens get a row of logits, or a value."""
    batch, trained, drawn_from = context
    values, hidden = isinstance(output_layer, ValueHead), hidden_states.squeeze(1)
    if config.sequence_parallel:
        # The backward pass of logits, each rank having a part of the vocabulary, adds up the shares of the
        # tensor-parallel ranks. Values every rank computes alike: there it takes its own tokens.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=not values)
    hidden = hidden.index_select(0, drawn_from)
    nothing = hidden.new_zeros(len(batch.mask), dtype=torch.float32)
    if values:
        return Output(values=nothing.index_copy(0, trained, output_layer(hidden)))
    if not config.sequence_parallel:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    weight = output_layer.weight if output_weight is None else output_weight
    parts = token_logprobs(hidden, weight, batch.tokens[trained], batch.temperature, output_layer.tp_group)
    logprobs, entropy = (nothing.index_copy(0, trained, part) for part in parts)
    return Output(logprobs=logprobs, entropy=entropy)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside its wrappers for data parallelism and half precision."""
    inner: torch.nn.Module = get_attr_wrapped_model(module, "decoder", return_model_obj=True)
    return inner
