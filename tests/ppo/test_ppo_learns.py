"""PPO, through its own hooks and the loop's own packing, teaches two tables to say what pays and to foresee it."""

import pytest
import torch
from miles_core.packing import count, distribute, pack
from miles_core.types import Output, Sample
from ppo_cases import plugin

LENGTH, VOCABULARY, SAMPLES, UPDATES = 4, 5, 32, 2
PAYS = 3  # the token that is worth something


def rollout(table, draw):
    logprobs = table.detach().log_softmax(1)
    samples = []
    for i in range(SAMPLES):
        tokens = torch.multinomial(logprobs.exp(), 1, generator=draw).squeeze(1)
        drawn = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
        reward = (tokens == PAYS).float().mean().item()
        samples.append(Sample(
            id=str(i), tokens=[0, *tokens.tolist()], mask=[False, *[True] * LENGTH], logprobs=[0.0, *drawn],
            versions=[-1, *[0] * LENGTH], reward=reward, score=reward,
        ))  # fmt: skip
    return samples


def forward(table, batch):
    rows = table.log_softmax(1)[(batch.positions - 1).clamp(min=0)]
    logprobs = rows.gather(1, batch.tokens[:, None]).squeeze(1) * batch.mask
    return Output(logprobs=logprobs, entropy=-(rows.exp() * rows).sum(1) * batch.mask)


def foresee(critic, batch):
    """A value for each place and the number of paying tokens before it."""
    paid = torch.zeros_like(batch.seq)
    for start, end in zip(batch.starts.tolist(), batch.starts.tolist()[1:], strict=False):
        hits = (batch.tokens[start:end] == PAYS).long()
        paid[start:end] = hits.cumsum(0) - hits
    return Output(values=critic[(batch.positions - 1).clamp(min=0), paid] * batch.mask)


@pytest.mark.parametrize(
    "keys",
    [{}, {"gaps": "discount", "lam": 1.0}, {"kl": 0.02, "kl_target": 0.1, "kl_horizon": 500}, {"whiten": False},
     {"kl": 0.02, "kl_in": "loss", "kl_estimator": "k3", "entropy": 0.01, "aggregate": "sequence", "dual_clip": 3.0}],
    ids=str,
)  # fmt: skip
def test_the_policy_climbs_and_the_critic_foresees_it(keys):
    ppo, draw = plugin(**keys), torch.Generator().manual_seed(5)
    table = torch.zeros(LENGTH, VOCABULARY, requires_grad=True)
    critic = torch.zeros(LENGTH, LENGTH + 1, requires_grad=True)
    reference = table.detach().clone()
    adam = torch.optim.Adam([{"params": [table], "lr": 0.1}, {"params": [critic], "lr": 0.05}])
    rewards, errors = [], []
    for _ in range(40):
        samples = rollout(table, draw)
        rewards.append(sum(s.reward for s in samples) / SAMPLES)
        updates = []
        for i in range(UPDATES):
            units = [[sample] for sample in samples[i::UPDATES]]
            updates.append([pack(row, {}).to_batch(count(units), 1.0, "cpu") for row in distribute(units, 1, 30)[0]])
        flat = sum(updates, [])
        for batch in flat:
            batch.old_logprobs = forward(table, batch).logprobs.detach()
            batch.columns["values"] = foresee(critic, batch).values.detach()
            batch.columns["ref_logprobs"] = forward(reference, batch).logprobs
            batch.columns |= ppo.miles_advantage(batch)
        ppo.miles_normalize(flat, lambda x: x)
        for batches in updates:
            adam.zero_grad()
            for batch in batches:
                for role, output in (("critic", foresee(critic, batch)), ("policy", forward(table, batch))):
                    loss = ppo.miles_loss(role=role, batch=batch, output=output)
                    terms = [loss, *ppo.miles_penalty(role=role, batch=batch, output=output).values()]
                    sum(term.sum / batch.counts[term.per] for term in terms).backward()
                    if role == "critic":
                        errors.append(float(loss.metrics["error"].sum) / batch.counts["token"])
            adam.step()
    assert rewards[0] < 0.35
    assert sum(rewards[-3:]) / 3 > 0.8
    tenth = len(errors) // 10
    assert sum(errors[-tenth:]) < 0.2 * sum(errors[:tenth])
