"""Packed rows: no token is lost, nothing crosses from one sequence into another, gradients follow the formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.megatron import device, hf
from miles_core.edges.megatron.rotary import Rotary, rotate

attention = device.import_megatron("miles_core.edges.megatron.attention")
layers = device.import_megatron("miles_core.edges.megatron.layers")
CPU = torch.device("cpu")
lengths = st.lists(st.integers(0, 70), min_size=1, max_size=12).filter(sum)


def starts_of(sizes: list[int]) -> list[int]:
    return [0, *torch.tensor(sizes).cumsum(0).tolist()]


def angles(positions: torch.Tensor, width: int, dtype=torch.float64):
    model = hf.Architecture({}, 1, 100.0, None)
    cos, sin = Rotary(width, model, CPU)(positions, torch.float32)
    return cos.to(dtype), sin.to(dtype)


@settings(deadline=None)
@given(lengths)
def test_a_row_places_every_token_once(sizes: list[int]) -> None:
    made = attention.row(starts_of(sizes), CPU)
    total, places = sum(sizes), sum(rows * width for rows, width in made.blocks)
    assert made.positions.tolist() == [p for size in sizes for p in range(size)]
    assert sum(rows for rows, _ in made.blocks) == sum(size > 0 for size in sizes)
    assert places <= 2 * total
    if made.padded is None:
        assert made.packed is None and places == total
    else:
        assert len(made.padded) == places and made.padded[made.packed].tolist() == list(range(total))


def reference(q, k, v, cos, sin, sizes: list[int], scale: float) -> torch.Tensor:
    """Attention written out, one sequence at a time."""

    def turned(x):
        half = x.shape[-1] // 2
        swapped = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos + swapped * torch.cat((sin, sin), -1)

    q, k = turned(q), turned(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    out = []
    for a, b, c in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        scores = torch.einsum("thd,shd->hts", a, b) * scale
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        out.append(torch.einsum("hts,shd->thd", scores.masked_fill(future, -math.inf).softmax(-1), c).flatten(1))
    return torch.cat(out)


@settings(deadline=None, max_examples=25)
@given(lengths, st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.integers(0, 2**31))
def test_attention_stays_within_each_sequence(sizes: list[int], heads: tuple[int, int], seed: int) -> None:
    sizes = [size for size in sizes if size]
    make, width = torch.Generator().manual_seed(seed), 8
    shapes = [(sum(sizes), 1, count, width) for count in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_() for shape in shapes]
    made = attention.row(starts_of(sizes), CPU)
    made.cos, made.sin = angles(made.positions, width)
    module = attention.PackedAttention(SimpleNamespace(), softmax_scale=0.4)
    found = module(*inputs, None, packed_seq_params=made).squeeze(1)
    expected = reference(*(x.squeeze(1) for x in inputs), made.cos, made.sin, sizes, 0.4)
    upstream = torch.randn(found.shape, generator=make, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_rotation_gradient() -> None:
    x = torch.randn(5, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *angles(torch.arange(5), 6)), x)


def test_llama3_scaling_equals_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **scaling)
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    found = Rotary(128, hf.Architecture({}, 1, 5e5, hf.Llama3Scaling(**scaling)), CPU).frequencies
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(4, 6), (3, 1, 2, 6)])
def test_norm_and_activation(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: layers._RMSNorm.apply(x, w, 1e-3), (x, weight))
    norm = layers.RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True), 6, 1e-3)
    assert norm.weight.sequence_parallel
    expected = torch.nn.functional.rms_norm(x.float(), (6,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x.float()), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    gate, up = x.chunk(2, -1)
    expected, out = torch.nn.functional.silu(gate) * up, layers.SwiGLU(None)(x * 1.0)
    torch.testing.assert_close(out, expected)
    sent = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(expected, x, sent)
    (found,) = torch.autograd.grad(out, x, sent, retain_graph=True)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # the first pass used its input up
        torch.autograd.grad(out, x, sent)
