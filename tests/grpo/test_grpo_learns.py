"""Each variant, through its own hooks and the loop's own packing, teaches a policy of one table to say what pays."""

import pytest
import torch
from grpo_cases import plugin
from miles_core.packing import count, distribute, pack
from miles_core.types import Group, Output, Sample
from miles_plugin_grpo.config import VARIANTS

LENGTH, VOCABULARY, GROUPS, SIZE, UPDATES = 4, 5, 4, 8, 2
PAYS = 3  # the token that is worth something


def rollout(table, draw, id):
    logprobs = table.detach().log_softmax(1)
    samples = []
    for _ in range(SIZE):
        tokens = torch.multinomial(logprobs.exp(), 1, generator=draw).squeeze(1)
        drawn = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
        reward = (tokens == PAYS).float().mean().item()
        mask = [False, *[True] * LENGTH]
        samples.append(Sample(tokens=[0, *tokens.tolist()], mask=mask, logprobs=[0.0, *drawn], reward=reward))
    return Group(id, samples)


def forward(table, batch):
    rows = table.log_softmax(1)[(batch.positions - 1).clamp(min=0)]
    logprobs = rows.gather(1, batch.tokens[:, None]).squeeze(1) * batch.mask
    return Output(logprobs=logprobs, entropy=-(rows.exp() * rows).sum(1) * batch.mask)


@pytest.mark.parametrize("keys", [*({"variant": v} for v in VARIANTS), {"kl": 0.02, "entropy": 0.01}], ids=str)
def test_every_variant_climbs(keys):
    grpo, draw = plugin(**keys), torch.Generator().manual_seed(5)
    table = torch.zeros(LENGTH, VOCABULARY, requires_grad=True)
    reference = table.detach().clone()
    adam = torch.optim.Adam([table], lr=0.1)
    rewards = []
    for _ in range(25):
        groups = [rollout(table, draw, i) for i in range(GROUPS)]
        rewards.append(sum(r for g in groups for r in g.rewards) / (GROUPS * SIZE))
        for group, scores in zip(groups, grpo.miles_score(groups), strict=True):
            for sample, score in zip(group.samples, scores, strict=True):
                sample.score = score
        updates = []
        for i in range(UPDATES):
            units = [[sample] for group in groups[i::UPDATES] for sample in group.samples]
            batches = [pack(row, {}).to_batch(count(units), 1.0, "cpu") for row in distribute(units, 1, 60)[0]]
            for batch in batches:
                batch.columns["advantage"] = batch.per_token(batch.score)
                batch.columns["ref_logprobs"] = forward(reference, batch).logprobs
                batch.old_logprobs = forward(table, batch).logprobs.detach()
            updates.append(batches)
        for batches in updates:
            adam.zero_grad()
            for batch in batches:
                output = forward(table, batch)
                loss = grpo.miles_loss(role="policy", batch=batch, output=output)
                terms = [loss, *grpo.miles_penalty(role="policy", batch=batch, output=output).values()]
                sum(term.sum / batch.counts[term.per] for term in terms).backward()
            adam.step()
    assert rewards[0] < 0.35
    assert sum(rewards[-3:]) / 3 > 0.8
