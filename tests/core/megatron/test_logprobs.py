"""Log-probabilities and entropies against ``torch.log_softmax`` in float64, whole and split over two ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.megatron.logprobs import token_logprobs


def reference(hidden, weight, tokens, temperature):
    log_p = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, dim=1)
    return log_p.gather(1, tokens[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def problem(seed: int, rows: int, vocab: int, spread: float):
    make = torch.Generator().manual_seed(seed)
    hidden = spread * torch.randn(rows, 7, generator=make)
    weight = torch.randn(vocab, 7, generator=make)
    tokens = torch.randint(0, vocab, (rows,), generator=make)
    return hidden, weight, tokens, torch.randn(2, rows, generator=make)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 9),
    vocab=st.integers(1, 12),
    chunk=st.integers(1, 40),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    spread=st.sampled_from([0.1, 1.0, 20.0]),
    which=st.sampled_from(["both", "logprobs", "entropy"]),
)
def test_equals_log_softmax(seed, rows, vocab, chunk, temperature, spread, which) -> None:
    """Values and gradients, however the rows are cut into chunks and whichever result is used."""
    hidden, weight, tokens, upstream = problem(seed, rows, vocab, spread)
    results = []
    for function in (reference, lambda *a: token_logprobs(*a, chunk_elements=chunk)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = function(h, w, tokens, temperature)
        used = {"logprobs": logprobs * upstream[0], "entropy": entropy * upstream[1]}
        total = sum(value.sum() for name, value in used.items() if which in (name, "both"))
        results.append((logprobs, entropy, *torch.autograd.grad(total, (h, w))))
    scale = max(1.0, *(float(x.detach().abs().max()) for x in results[0] if x.numel()))
    for expected, found in zip(*results, strict=True):
        close(found / scale, expected / scale)


def test_chunks_change_nothing_much_but_memory() -> None:
    """The last chunk's log-probabilities are kept for backward, the others' made again: both must be the same."""
    hidden, weight, tokens, upstream = problem(0, 33, 50, 1.0)
    gradients = []
    for rows in (1, 5, 33, 100):
        h = hidden.clone().requires_grad_()
        logprobs, entropy = token_logprobs(h, weight, tokens, 0.7, chunk_elements=rows * 50)
        gradients.append(torch.autograd.grad((logprobs * upstream[0] + entropy * upstream[1]).sum(), h)[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-5, atol=1e-6)


def test_large_logits_stay_finite() -> None:
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([1]), 1.0)
    assert logprobs.tolist() == [-400.0] and entropy.tolist() == [0.0]


def on_rank(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for seed, vocab in enumerate((2, 8, 30)):
        hidden, weight, tokens, upstream = problem(seed, 11, vocab, 3.0)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = reference(h, w, tokens, 0.5)
        expected = torch.autograd.grad((logprobs * upstream[0] + entropy * upstream[1]).sum(), (h, w))
        mine = weight.chunk(2)[rank].clone().requires_grad_()
        h = hidden.clone().requires_grad_()
        found = token_logprobs(h, mine, tokens, 0.5, dist.group.WORLD, chunk_elements=4 * vocab)
        close(found[0], logprobs)
        close(found[1], entropy)
        share, own = torch.autograd.grad((found[0] * upstream[0] + found[1] * upstream[1]).sum(), (h, mine))
        dist.all_reduce(share)
        close(share, expected[0])
        close(own, expected[1].chunk(2)[rank])
    dist.destroy_process_group()


def test_split_over_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_rank, (str(tmp_path / "meeting"),), nprocs=2)
