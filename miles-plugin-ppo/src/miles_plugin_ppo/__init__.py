"""Proximal policy optimization: a critic predicts the return, and each token is judged against the prediction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from miles_core import Plugin, hookimpl
from miles_core.types import Column, Loss, Mean, Refused, Role

from .config import Config as Keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_core.config import RunConfig
    from miles_core.types import Batch, Complain, Output
    from torch import Tensor


class PPO(Plugin):
    class Config(Keys):
        """The keys of ``[ppo]``; ``config.Config`` says what each does."""

    config: Config

    def __init__(self, config: Config, run: RunConfig) -> None:
        super().__init__(config, run)
        self.beta = config.kl  # on the training ranks, which change it alike

    # -- driver --------------------------------------------------------------------------------------------------

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        for key, message in self.config.contradictions().items():
            complain(f"ppo.{key}", message)
        if self.config.entropy and self.run.eval.every and not self.run.placement.engines:
            message = (
                "without engines held-out data is told by its log-probabilities alone; set this or eval.every to 0"
            )
            complain("ppo.entropy", message)
        if self.config.critic_warmup >= self.run.steps:
            message = f"{self.config.critic_warmup} steps of {self.run.steps} leave none to the policy; set it lower"
            complain("ppo.critic_warmup", message)

    @hookimpl
    def miles_explain(self) -> dict[str, str]:
        keys = "\n".join(f"{key} = {json.dumps(value, default=str)}" for key, value in self.config if value is not None)
        where = "ranks of its own" if "critic" in self.run.placement.apart else "the policy's ranks"
        start = self.config.critic or "the policy's weights and a head of zeros"
        return {"ppo": keys, "ppo's critic": f"on {where}, started from {start}"}

    @hookimpl
    def miles_roles(self) -> dict[str, Role]:
        path = str(self.config.critic) if self.config.critic else None
        roles = {
            "policy": Role(trained=True, start=1 + self.config.critic_warmup),
            "critic": Role(trained=True, head="value", path=path, optim=self.config.critic_optim),
        }
        return roles | ({"ref": Role()} if self.config.kl else {})

    @hookimpl
    def miles_columns(self) -> dict[str, Column]:
        columns = {"values": Column(role="critic", field="values")}
        if self.config.kl:
            columns["ref_logprobs"] = Column(role="ref")
            early = self.config.kl_in == "reward" or self.config.kl_target is not None
            if early and self.run.batch.old_logprobs != "engine":  # needed before the policy's own update
                columns["start_logprobs"] = Column(role="policy")
        return columns

    # -- trainer -------------------------------------------------------------------------------------------------

    @hookimpl
    def miles_advantage(self, batch: Batch) -> dict[str, Tensor]:
        from .gae import gae
        from .losses import token_rewards

        values, config = batch.columns["values"], self.config
        rewards = token_rewards(batch, config, self.beta)
        skip = config.gaps == "skip"
        advantage = gae(values, rewards, batch.mask, batch.seq, config.gamma, config.lam, skip)
        return {"advantage": advantage, "returns": (advantage + values) * batch.mask}

    @hookimpl
    def miles_normalize(self, batches: list[Batch], total: Callable[[Tensor], Tensor]) -> None:
        from .losses import whiten

        if self.config.kl_target is not None:
            self._steer(batches, total)
        if self.config.whiten:
            whiten(batches, total, self.config)

    def _steer(self, batches: list[Batch], total: Callable[[Tensor], Tensor]) -> None:
        import torch

        from .controller import adapted
        from .losses import reference_divergence

        assert self.config.kl_target is not None
        counts = []
        for batch in batches:
            by_seq = batch.by_seq(reference_divergence(batch, self.config))
            mean = (by_seq / batch.lengths.clamp(min=1)).sum()
            counts.append(torch.stack([by_seq.sum(), mean, batch.mask.sum(), mean.new_tensor(len(batch.score))]))
        summed, means, tokens, samples = total(torch.stack(counts).double().sum(0)).tolist()
        found = means / max(samples, 1) if self.config.kl_mean == "sequence" else summed / max(tokens, 1)
        self.beta = adapted(self.beta, found, self.config.kl_target, int(samples), self.config.kl_horizon)

    @hookimpl
    def miles_loss(self, role: str, batch: Batch, output: Output) -> Loss:
        from .losses import policy_loss, value_loss

        if role == "critic":
            return value_loss(batch, output, self.config)
        if role != "policy":
            raise Refused(f"ppo trains a policy and a critic, and was asked for the loss of {role!r}")
        loss = policy_loss(batch, output, self.config, self.run.rollout.max_tokens)
        if self.config.kl_target is not None:
            loss.metrics["kl/weight"] = Mean(self.beta * batch.mask.sum().double())
        return loss

    @hookimpl
    def miles_penalty(self, role: str, batch: Batch, output: Output) -> dict[str, Mean]:
        from miles_core.formulas.terms import reduce

        from .losses import reference_divergence

        terms: dict[str, Mean] = {}
        if role != "policy":
            return terms
        config, most = self.config, self.run.rollout.max_tokens
        if config.kl and config.kl_in == "loss":
            assert output.logprobs is not None
            kl = reference_divergence(batch, config, output.logprobs)
            terms["penalty/kl"] = reduce(self.beta * kl, batch, config.aggregate, most)
        if config.entropy:
            if output.entropy is None:
                raise Refused("ppo.entropy is set, but what answers miles_forward gives no entropy; set it to 0")
            terms["penalty/entropy"] = reduce(-config.entropy * output.entropy, batch, config.aggregate, most)
        return terms

    # -- both ----------------------------------------------------------------------------------------------------

    @hookimpl
    def miles_state(self) -> dict[str, Any]:
        return {"ppo_beta": self.beta} if self.config.kl_target is not None else {}

    @hookimpl
    def miles_restore(self, state: dict[str, Any]) -> None:
        self.beta = state.get("ppo_beta", self.beta)
