"""One training rank: the models it holds a part of, and what a step does with them. It knows no algorithm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..contract import check_loss
from ..edges.protocols import Behind, Model, Transport, Worker, meeting, writing
from ..formulas.meter import Meter
from ..packing import Packed
from ..plugins import Manifest
from ..types import Batch, Column, Layout, Mean, Output, Per, Refused, Role, Weight

Update = tuple[list[Packed], dict[Per, int]]  # this rank's micro-batches, and the global denominators
Given = list[list[dict[str, Any]]]  # by data-parallel rank and micro-batch


class TrainingRank:
    """Every method is a collective: the driver calls it on all ranks of a team together.

    The policy's ranks hold every role but those that ``placement.apart`` names, which have a team of ranks each.
    """

    def __init__(self, manifest: Manifest, rank: int, world: int, roles: dict[str, Role], columns: dict[str, Column]):
        self._hooks = manifest.registry("trainer")
        self._run = self._hooks.run
        self._rank, self._world, self._roles, self._columns = rank, world, roles, columns
        self._trained = sorted((name for name in roles if roles[name].trained), key="policy".__eq__)  # it goes last
        self._models: dict[str, Model] = {}
        self._transport: Transport | None = None
        self._behind = Behind()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def address(self) -> str:
        """Where the ranks can meet; asked of rank 0 only."""
        return meeting()

    def build(self, address: str) -> Layout:
        """Meet the other ranks, then build every role's model with its weights loaded."""
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=address, rank=self._rank, world_size=self._world)
        self._models |= {name: self._hooks.model(name=name, role=role) for name, role in self._roles.items()}
        self._layout = next(iter(self._models.values())).layout
        return self._layout

    def connect(self, engines: list[Worker]) -> str:
        if self._transport:  # to engines of which one was replaced
            self._transport.close()
        self._transport = self._hooks.transport() if engines else None
        if self._transport:
            self._transport.connect(engines, self._layout)
        return self._models["policy"].memory()

    def train(self, step: int, updates: list[list[Update]], given: Given | None) -> dict[str, float]:
        """Consumes this step's updates, one entry per data-parallel rank each; produces the metrics of this rank.

        Metrics are shares of a global mean, which the driver adds up. ``given`` are columns that other teams computed.
        """
        began, batches = time.perf_counter(), self._batches(updates, given)
        names = [name for name in self._trained if step >= self._roles[name].start]
        self._prepare(batches, names)
        meter = Meter(len(batches) * self._run.batch.epochs)
        normalized = self._normalize(batches)
        for rows in batches * self._run.batch.epochs:
            for name in names:
                self._update(step, name, rows, meter)
                normalized = normalized or self._normalize(batches)
        return (meter.read() if self._layout.reports else {}) | {"time/train": time.perf_counter() - began}

    def evaluate(self, updates: list[list[Update]], given: Given | None) -> dict[str, float]:
        """The policy's loss and its metrics on one update that nothing learns from; shares, like those of ``train``."""
        batches, meter = self._batches(updates, given), Meter(1)
        self._prepare(batches, [], ["policy"])
        if self._layout.last_stage:
            remembered = self._hooks.state()  # of what is trained on
            self._hooks.normalize(batches=batches[0], total=self._models["policy"].total)
            self._hooks.restore(state=remembered)
            for batch in batches[0]:
                self._loss("policy", batch, Output(logprobs=batch.old_logprobs), meter)
        return meter.read() if self._layout.reports else {}

    def columns(self, updates: list[list[Update]]) -> list[dict[str, Any]]:
        """What this team's roles say of every micro-batch, in numpy, for the other teams."""
        flat = sum(self._batches(updates, None), [])
        for name in self._models:
            self._fill(name, flat)
        return [{name: column.numpy(force=True) for name, column in batch.columns.items()} for batch in flat]

    def _batches(self, updates: list[list[Update]], given: Given | None) -> list[list[Batch]]:
        mine, temperature = self._layout.dp_rank, self._run.rollout.temperature
        batches = [
            [packed.to_batch(counts, temperature, self._device) for packed in rows]
            for rows, counts in (update[mine] for update in updates)
        ]
        if given:  # on every stage, or one would wait for the others' forward passes
            for batch, columns in zip(sum(batches, []), given[mine], strict=True):
                batch.columns |= {name: torch.tensor(column, device=self._device) for name, column in columns.items()}
        return batches

    def _prepare(self, batches: list[list[Batch]], training: list[str], need: Sequence[str] = ()) -> None:
        """What the losses need from forward passes, before the first update changes anything.

        A model says what it says of the first update's rows when it trains on them: the policy its old
        log-probabilities, and whoever trains before it its columns. That saves a forward pass.
        """
        flat = sum(batches, [])
        for name in self._models:
            self._fill(name, flat if name in ("policy", *need) or name not in training[:1] else flat[len(batches[0]) :])
        if self._run.batch.old_logprobs == "engine":
            for batch in flat:
                batch.old_logprobs = batch.rollout_logprobs
        elif same := [column for column, of in self._columns.items() if (of.role, of.field) == ("policy", "logprobs")]:
            for batch in flat:
                batch.old_logprobs = batch.columns.get(same[0])
        elif "policy" in (*training, *need):
            rows = flat if need else flat[len(batches[0]) :]
            outputs = self._models["policy"].run(rows, self._through("policy"), None) if rows else []
            for batch, output in zip(rows, outputs, strict=False):
                batch.old_logprobs = output.logprobs
        if self._layout.last_stage:
            for batch in flat:
                self._complete(batch)

    def _fill(self, name: str, batches: list[Batch]) -> None:
        """The columns of one role, on the last stage, where batches lack them."""
        mine = {column: of for column, of in self._columns.items() if of.role == name}
        rows = [batch for batch in batches if mine.keys() - batch.columns.keys()]
        outputs = self._models[name].run(rows, self._through(name), None) if rows else []
        for batch, output in zip(rows, outputs, strict=False):  # no outputs off the last stage
            batch.columns |= {column: getattr(output, of.field) for column, of in mine.items()}

    def _complete(self, batch: Batch) -> None:
        """Columns computed from columns, as soon as all of those are there."""
        if not self._columns.keys() - batch.columns.keys() and "advantage" not in batch.columns:
            batch.columns |= self._hooks.advantage(batch=batch)

    def _normalize(self, batches: list[list[Batch]]) -> bool:
        """As soon as all have advantages: on every team that trains, for plugins remember what they see of a step."""
        flat = sum(batches, [])
        if not self._trained or not all("advantage" in batch.columns for batch in flat):  # never off the last stage
            return False
        self._hooks.normalize(batches=flat, total=self._models[self._trained[-1]].total)
        return True

    def _through(self, name: str) -> Callable[[Any, Batch], Output]:
        return lambda module, batch: self._hooks.forward(role=name, module=module, batch=batch)

    def _update(self, step: int, name: str, batches: list[Batch], meter: Meter) -> None:
        """Forward, loss, backward over all micro-batches of one update, then the optimizer."""
        model, prefix = self._models[name], "" if name == "policy" else f"{name}/"
        model.run(batches, self._through(name), lambda batch, output: self._loss(name, batch, output, meter))
        metrics, skipped = model.step(lambda norm: self._veto(name, step, norm))
        meter.last |= {prefix + key: value for key, value in metrics.items()}
        meter.add(prefix + "skipped_updates", float(skipped is not None) * meter.updates / self._layout.dp_size)

    def _loss(self, name: str, batch: Batch, output: Output, meter: Meter) -> torch.Tensor:
        """One micro-batch's share of the update's loss, its penalties and its metrics."""
        prefix = "" if name == "policy" else f"{name}/"
        for column, of in self._columns.items():
            if of.role == name and column not in batch.columns:
                batch.columns[column] = getattr(output, of.field).detach()
        weights: dict[str, Weight] = {}
        if name == "policy":
            assert output.logprobs is not None
            if batch.old_logprobs is None:
                batch.old_logprobs = output.logprobs.detach()
            weights = self._hooks.token_weight(batch=batch)
            batch.weight = torch.stack([w.factor for w in weights.values()]).prod(0) if weights else None
        self._complete(batch)
        answer = check_loss(self._hooks.loss(role=name, batch=batch, output=output), self._hooks.owner["miles_loss"])
        if name == "policy" and batch.weight is not batch.weighed_by:
            raise Refused("the algorithm's loss ignores batch.weighed; remove what gives its tokens weights")
        terms: dict[str, Mean] = self._hooks.penalty(role=name, batch=batch, output=output)
        total = answer.sum / batch.counts[answer.per] + sum(t.sum / batch.counts[t.per] for t in terms.values())
        meter.add(prefix + "loss", total)
        means = answer.metrics | terms
        for weight in weights.values():
            means |= weight.metrics
        for key, mean in means.items():
            meter.add(prefix + key, mean.sum / batch.counts[mean.per])
        if name == "policy" and batch.rollout_logprobs is not None:
            assert batch.old_logprobs is not None
            gap = ((batch.old_logprobs - batch.rollout_logprobs).abs() * batch.mask).sum()
            meter.add("kl/train_rollout", gap / batch.counts["token"])
        return total

    def _veto(self, role: str, step: int, grad_norm: float) -> str | None:
        """One rank's reason not to step is every rank's."""
        reason: str | None = self._hooks.skip_step(role=role, step=step, grad_norm=grad_norm)
        if self._world == 1:
            return reason
        flag = torch.tensor([float(reason is not None)], device=self._device)
        dist.all_reduce(flag)
        return (reason or "another rank's reason") if flag.item() else None

    def push(self, verify: bool, servers: list[str]) -> dict[str, float]:
        """Send the policy's weights to every engine."""
        with torch.no_grad():
            tensors = self._hooks.export(role="policy", model=self._models["policy"])
            return self._transport.send(tensors, verify, servers) if self._transport else {}

    def save(self, folder: str) -> None:
        """Copy what ``saved`` says is written. A save under way is waited for."""
        self._behind.done.result()
        tasks = [self._models[name].save(Path(folder) / name) for name in self._trained]
        self._behind.start([*tasks, writing(self._state(folder), json.dumps(self._hooks.state()))])

    def saved(self) -> Future[None]:
        """Whether the last ``save`` is on the disk; the host waits for it. Where it failed, whether another try is."""
        return self._behind.go_on()

    def load(self, folder: str) -> None:
        for name in self._trained:
            self._models[name].load(Path(folder) / name)
        self._hooks.restore(state=json.loads(self._state(folder).read_text()))

    def _state(self, folder: str) -> Path:
        return Path(folder) / next(iter(self._models)) / f"state-{self._rank}.json"  # of the plugins on this rank

    def save_hf(self, folder: str) -> None:
        for name in self._trained:
            self._models[name].save_hf(Path(folder).with_name("model" if name == "policy" else name))
