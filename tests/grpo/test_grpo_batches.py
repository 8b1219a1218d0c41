"""How samples are dealt into micro-batches changes no number; nothing at all, or nonsense, breaks none."""

import pytest
import torch
from grpo_cases import Case, cases, examples, plugin, total
from hypothesis import given
from hypothesis import strategies as st
from miles_plugin_grpo.config import VARIANTS

HARDEST = {"kl": 0.1, "entropy": 0.05}
variants = pytest.mark.parametrize("variant", list(VARIANTS))


@variants
@examples
@given(case=cases, data=st.data())
def test_any_split_into_micro_batches_has_the_same_gradient_loss_and_metrics(variant, case, data):
    grpo = plugin(variant=variant, **HARDEST)
    places = data.draw(st.lists(st.integers(0, 3), min_size=len(case.masks), max_size=len(case.masks)))
    order = data.draw(st.permutations(range(len(case.masks))))
    rows = [[i for i in order if places[i] == row] for row in range(4)]  # some of them empty

    def step(rows):
        losses, metrics = [], {}
        gradient = torch.zeros(sum(map(len, case.masks)), dtype=torch.float64)
        starts = torch.tensor([0, *map(len, case.masks)]).cumsum(0)
        for row in rows:
            batch, output = case.packed(row)
            loss = total(grpo, batch, output)
            loss.backward()
            losses.append(loss.detach())
            where = torch.tensor([int(starts[i]) + t for i in row for t in range(len(case.masks[i]))], dtype=torch.long)
            gradient[where] += output.logprobs.grad
            for name, mean in grpo.miles_loss(role="policy", batch=batch, output=output).metrics.items():
                metrics[name] = metrics.get(name, 0.0) + float(mean.sum) / batch.counts[mean.per]
        return torch.stack(losses).sum(), gradient, metrics

    (whole, gradient, metrics), (parts, summed, added) = step([range(len(case.masks))]), step(rows)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(summed, gradient, rtol=1e-9, atol=1e-12)
    assert added == pytest.approx(metrics, rel=1e-9, abs=1e-12)


@variants
@pytest.mark.parametrize("masks", [[], [[False]], [[False, False, False], [False, False]]])
def test_nothing_to_train_on_is_a_zero_with_a_gradient_of_zero(variant, masks):
    grpo = plugin(variant=variant, **HARDEST)
    batch, output = Case(masks, seed=0, dtype=torch.float32).packed()
    loss = total(grpo, batch, output)
    loss.backward()
    assert loss.item() == 0.0
    assert output.logprobs.grad is not None and output.entropy.grad is not None  # every rank must run backward
    assert not output.logprobs.grad.any() and not output.entropy.grad.any()
    metrics = grpo.miles_loss(role="policy", batch=batch, output=output).metrics
    assert all(float(mean.sum) == 0.0 for mean in metrics.values())


@variants
@pytest.mark.parametrize("distance", [-1000.0, -100.0, 100.0, 1000.0])
def test_a_policy_gone_astray_gives_finite_gradients(variant, distance):
    grpo = plugin(variant=variant, **HARDEST)
    case = Case([[False, True, True]] * 4, seed=3, dtype=torch.float32)
    case.rows["old"] = [row + distance * mask for row, mask in zip(case.rows["old"], case.masks, strict=True)]
    case.rows["ref"] = [row - distance * mask for row, mask in zip(case.rows["ref"], case.masks, strict=True)]
    batch, output = case.packed()
    loss = total(grpo, batch, output)
    loss.backward()
    assert loss.isfinite() and output.logprobs.grad.isfinite().all()


@variants
@examples
@given(case=cases)
def test_single_precision_agrees_with_double(variant, case):
    grpo = plugin(variant=variant, **HARDEST)
    batch, output = case.packed()
    exact = total(grpo, batch, output)
    for name in ("score", "old_logprobs", "rollout_logprobs"):
        setattr(batch, name, getattr(batch, name).float())
    batch.columns = {name: column.float() for name, column in batch.columns.items()}
    output.logprobs, output.entropy = output.logprobs.detach().float(), output.entropy.detach().float()
    torch.testing.assert_close(total(grpo, batch, output).double(), exact.detach(), rtol=1e-4, atol=1e-5)
