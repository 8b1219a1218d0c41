"""Random samples as an algorithm gets them, dealt into micro-batches and ranks in several ways."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..contract import check_loss
from ..packing import Unit, count, distribute, pack
from ..plugins import BUILTIN, Plugin, Registry, installed
from ..samples import credit
from ..types import Column, Group, Role, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from ..types import Batch

RANGES = {"logprobs": (-2.0, -0.01), "entropy": (0.0, 2.0)}  # of what a model says; values may be anything


def registry(place: Any, name: str, plugin: type[Plugin], keys: dict[str, Any], run: RunConfig) -> Registry:
    """``plugin`` as the algorithm beside what core brings, as a process of that place sees it."""
    plugins: dict[str, Plugin] = {name: plugin(plugin.Config.model_validate(keys), run)}
    for builtin in BUILTIN:
        cls = _brought(builtin)
        plugins[builtin] = cls(cls.Config(), run)
    return Registry(place, plugins, run.model_copy(update={"algorithm": name}))


@cache
def _brought(name: str) -> type[Plugin]:
    """Loading one checks its hooks, which is most of the time that a registry takes."""
    return installed()[name].load()


def groups(seed: int, size: int, given: bool, most: int = 7) -> list[Group]:
    """Ragged samples with tokens of a tool in between; ``given``: no engine wrote them. Rewards differ in a group."""
    draw = random.Random(seed)
    made = []
    for g in range(draw.randint(2, 5)):
        prompt = draw.randint(1, 4)
        samples = []
        for i in range(size):
            written = [draw.random() < 0.8 for _ in range(draw.randint(1, most))]
            mask = [False] * prompt + written
            sample = Sample(id=f"{g}/{i}", tokens=[draw.randrange(9) for _ in mask], mask=mask)
            sample.logprobs = [-draw.random() if m else 0.0 for m in mask]
            sample.versions = [0 if m and not given else -1 for m in mask]
            sample.reward = draw.random() + i
            sample.rewards, sample.finish = {"reward": sample.reward}, "stop"
            samples.append(sample)
        made.append(Group(g, samples))
    return made


@dataclass
class Dealt:
    """The gradient that each sample's log-probabilities and values got, and each role's loss and metrics, summed over
    all ranks."""

    gradients: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)  # "policy: loss", "policy: ratio/mean"

    def add(self, role: str, step: Share) -> None:
        for name, number in {"loss": step.loss, **step.metrics}.items():
            key = f"{role}: {name}"
            self.numbers[key] = self.numbers.get(key, 0.0) + float(number.detach())


@dataclass
class Share:
    """What the loop makes of one micro-batch."""

    loss: Tensor  # scalar, what is descended
    metrics: dict[str, Tensor]  # scalars, shares of a global mean
    leaf: Tensor  # [T], the log-probabilities or the values that gradients lead to

    def backward(self) -> list[float]:
        """The gradient on each token. A constant loss is tied to the forward pass, as a model ties it."""
        loss = self.loss if self.loss.requires_grad else self.loss + 0.0 * self.leaf.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        found: list[float] = [0.0] * len(self.leaf) if self.leaf.grad is None else self.leaf.grad.tolist()
        return found


@dataclass
class Case:
    """One step of an algorithm on random samples, in float64."""

    build: Callable[[str], Registry]
    seed: int
    size: int
    given: bool = False

    def __post_init__(self) -> None:
        self.driver = driver = self.build("driver")
        self.roles: dict[str, Role] = {"policy": Role(trained=True)} | driver.roles()
        self.columns: dict[str, Column] = driver.columns()
        made = groups(self.seed, self.size, self.given)
        dropped = {group.id: driver.drop_group(group=group) for group in made}
        for group in made:
            self.tell("miles_group_end", group=group, dropped=dropped[group.id])
        kept = [group for group in made if dropped[group.id] is None]
        self.tell("miles_metrics", step=1, groups=made, evaluating=False)
        credit(kept, driver.score(groups=kept), driver.owner["miles_score"])
        units = [unit for group in kept for unit in driver.units(group=group)]
        self.units: list[Unit] = [[s for s in unit if s.score is not None] for unit in units]
        self.counts = count(self.units)

    def tell(self, hook: str, **args: Any) -> None:
        """Call a driver's hook of the algorithm alone: what core's own plugins do there needs a run."""
        name = self.driver.run.algorithm
        if name in self.driver.answerers(hook):
            self.driver._only(hook, name)(**args)

    def number(self, sample: str, what: str, place: int) -> float:
        """A value of its own for each token, whatever it is packed with."""
        low, high = RANGES.get(what.rpartition("/")[2], (-1.5, 0.5))
        return random.Random(f"{self.seed}/{sample}/{what}/{place}").uniform(low, high)

    def without_tokens(self) -> list[Unit]:
        """The same samples, had the policy written none of their tokens."""
        return [[replace(s, mask=[False] * len(s.mask)) for s in unit] for unit in self.units]

    def deal(self, ranks: int, budget: int, backwards: bool = False) -> Dealt:
        """Every rank's losses and gradients with micro-batches of ``budget`` tokens."""
        units = self.units[::-1] if backwards else self.units
        rows = distribute(units, ranks, budget)
        shared = _Total(ranks)
        found = Dealt()
        threads = [threading.Thread(target=self._rank, args=(rows[r], shared, found)) for r in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if shared.errors:
            raise shared.errors[0]
        return found

    def _rank(self, rows: list[list[Unit]], shared: _Total, found: Dealt) -> None:
        try:
            hooks = self.build("trainer")
            batches = [self.batch(row) for row in rows]
            for batch, _ in batches:
                batch.columns |= hooks.advantage(batch=batch)
            hooks.normalize(batches=[batch for batch, _ in batches], total=shared)
            for role in self.trained:
                for (batch, ids), row in zip(batches, rows, strict=True):
                    share = self.share(hooks, role, batch, ids)
                    with shared.lock:
                        found.add(role, share)
                        self._note(found, role, share.backward(), row)
        except BaseException as error:
            shared.errors.append(error)
            shared.barrier.abort()

    def batch(self, units: list[Unit]) -> tuple[Batch, list[str]]:
        """A micro-batch with every column that a role would have computed, and the sample of each token."""
        import torch

        samples = [sample for unit in units for sample in unit]
        for sample in samples:
            recorded = [name for name, of in self.columns.items() if of.role is None]
            sample.columns = {name: self._row(sample, name) for name in recorded}
        batch = pack(units, self.columns).to_batch(self.counts, 1.0, "cpu")
        for name in ("score", "reward", "rollout_logprobs"):
            value = getattr(batch, name)
            setattr(batch, name, None if value is None else value.double())
        batch.columns = {name: column.double() for name, column in batch.columns.items()}
        for name, of in self.columns.items():
            if of.role is not None:
                batch.columns[name] = self._tokens(samples, f"{of.role}/{of.field}") * batch.mask
        batch.old_logprobs = self._tokens(samples, "policy/logprobs") * batch.mask
        assert batch.mask.dtype == torch.bool
        return batch, [sample.id for sample in samples for _ in sample.tokens]

    def _row(self, sample: Sample, what: str) -> list[float]:
        return [self.number(sample.id, what, t) for t in range(len(sample.tokens))]

    def _tokens(self, samples: list[Sample], what: str) -> Tensor:
        import torch

        return torch.tensor([x for sample in samples for x in self._row(sample, what)], dtype=torch.float64)

    @property
    def trained(self) -> list[str]:
        return [name for name, of in self.roles.items() if of.trained]

    def alone(self, units: list[Unit]) -> dict[str, Share]:
        """What each trained role would make of these, were they all that a rank had."""
        hooks = self.build("trainer")
        batch, ids = self.batch(units)
        batch.columns |= hooks.advantage(batch=batch)
        hooks.normalize(batches=[batch], total=lambda tensor: tensor)
        return {role: self.share(hooks, role, batch, ids) for role in self.trained}

    def share(self, hooks: Registry, role: str, batch: Batch, ids: list[str]) -> Share:
        """What the loop descends for one micro-batch, and the leaf it descends to."""
        import torch

        from ..types import Output

        starts = batch.starts.tolist()
        place = [t for a, b in zip(starts, starts[1:], strict=False) for t in range(b - a)]

        def said(what: str) -> Tensor:
            values = [self.number(sample, f"now/{role}/{what}", t) for sample, t in zip(ids, place, strict=True)]
            return torch.tensor(values, dtype=torch.float64) * batch.mask

        values = self.roles[role].head == "value"
        leaf = said("values" if values else "logprobs").requires_grad_()
        output = Output(values=leaf) if values else Output(logprobs=leaf, entropy=said("entropy"))
        answer = check_loss(hooks.loss(role=role, batch=batch, output=output), hooks.owner["miles_loss"])
        terms = hooks.penalty(role=role, batch=batch, output=output)
        shares = [term.sum.double() / batch.counts[term.per] for term in (answer, *terms.values())]
        metrics = {name: mean.sum.double() / batch.counts[mean.per] for name, mean in (answer.metrics | terms).items()}
        return Share(torch.stack(shares).sum(), metrics, leaf)

    def _note(self, found: Dealt, role: str, gradient: list[float], row: list[Unit]) -> None:
        at = 0
        for sample in [sample for unit in row for sample in unit]:
            found.gradients.setdefault(role, {})[sample.id] = gradient[at : at + len(sample.tokens)]
            at += len(sample.tokens)


class _Total:
    """Adds a tensor up over ranks that are threads: what ``miles_normalize`` is given."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.lock = threading.Barrier(ranks), threading.Lock()
        self.parts: list[Tensor] = []
        self.errors: list[BaseException] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        with self.lock:
            self.parts.append(tensor.clone())
        self.barrier.wait()
        total = sum(self.parts[1:], self.parts[0])
        if self.barrier.wait() == 0:
            self.parts = []
        self.barrier.wait()
        return total
