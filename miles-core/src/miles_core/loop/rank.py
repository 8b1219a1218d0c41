"""One training rank: the models it holds a part of, and what a step does with them. It knows no algorithm."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..edges.protocols import Model, Transport, Worker
from ..plugins import Manifest
from ..types import Batch, Column, Layout, Mean, Output, Per, Role
from .batch import Packed

Update = tuple[list[Packed], dict[Per, int]]  # this rank's micro-batches, and the global denominators


class TrainingRank:
    """Every method is a collective: the driver calls it on all ranks together."""

    def __init__(self, manifest: Manifest, rank: int, world: int, roles: dict[str, Role], columns: dict[str, Column]):
        self._hooks = manifest.registry("trainer")
        self._run = self._hooks.run
        self._rank, self._world, self._columns = rank, world, columns
        self._roles = {"policy": Role(trained=True), **roles}
        self._trained = [name for name, role in self._roles.items() if role.trained]
        self._models: dict[str, Model] = {}
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def address(self) -> str:
        """Where the ranks can meet; asked of rank 0 only."""
        with socket.socket() as free:
            free.bind(("", 0))
            host = socket.gethostbyname(socket.gethostname())
            return f"tcp://{host}:{free.getsockname()[1]}"

    def build(self, address: str) -> Layout:
        """Meet the other ranks, then build every role's model with its weights loaded."""
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=address, rank=self._rank, world_size=self._world)
        for name, role in self._roles.items():
            self._models[name] = self._hooks.model(name=name, role=role)
        return self._models["policy"].layout

    def connect(self, engines: list[Worker]) -> str:
        self._transport: Transport = self._hooks.transport()
        self._transport.connect(engines, self._models["policy"].layout)
        return self._models["policy"].memory()

    # -- one step ------------------------------------------------------------------------------------------------
    def train(self, step: int, updates: list[list[Update]]) -> dict[str, float]:
        """Consumes this step's updates, one entry per data-parallel rank each; produces the metrics of this rank.

        Metrics are shares of a global mean: the driver adds them up over the ranks that report.
        """
        began, mine = time.perf_counter(), self._models["policy"].layout.dp_rank
        batches = [
            [packed.to_batch(counts, self._run.rollout.temperature, self._device) for packed in rows]
            for rows, counts in (update[mine] for update in updates)
        ]
        self._fill_columns(batches)
        meter = Meter(len(batches))
        for rows in batches:
            for name in self._trained:
                self._update(step, name, rows, meter)
        took = {"time/train": time.perf_counter() - began}
        return (meter.read() if self._models["policy"].layout.reports else {}) | took

    def _fill_columns(self, batches: list[list[Batch]]) -> None:
        """What the losses need from forward passes, before the first update changes anything."""
        flat = [batch for rows in batches for batch in rows]
        for name in dict.fromkeys(c.role for c in self._columns.values() if c.role):
            outputs = self._models[name].run(flat, self._through(name), None)
            for batch, output in zip(flat, outputs, strict=False):  # no outputs off the last stage
                for column, of in self._columns.items():
                    if of.role == name:
                        batch.columns[column] = getattr(output, of.field)
        # The first update takes its old log-probabilities from its own forward pass: the policy has not moved yet.
        later = [batch for rows in batches[1:] for batch in rows]
        outputs = self._models["policy"].run(later, self._through("policy"), None) if later else []
        for batch, output in zip(later, outputs, strict=False):
            batch.old_logprobs = output.logprobs
        if self._models["policy"].layout.last_stage:
            for batch in flat:
                batch.columns |= self._hooks.advantage(batch=batch)

    def _through(self, name: str) -> Callable[[Any, Batch], Output]:
        return lambda module, batch: self._hooks.forward(role=name, module=module, batch=batch)

    def _update(self, step: int, name: str, batches: list[Batch], meter: Meter) -> None:
        """Forward, loss, backward over all micro-batches of one update, then the optimizer."""
        prefix = "" if name == "policy" else f"{name}/"

        def loss(batch: Batch, output: Output) -> torch.Tensor:
            if name == "policy" and batch.old_logprobs is None:
                assert output.logprobs is not None
                batch.old_logprobs = output.logprobs.detach()
            answer = self._hooks.loss(role=name, batch=batch, output=output)
            terms: dict[str, Mean] = self._hooks.penalty(role=name, batch=batch, output=output)
            total: torch.Tensor = answer.sum / batch.counts[answer.per]
            total = total + sum(term.sum / batch.counts[term.per] for term in terms.values())
            meter.add(prefix + "loss", total)
            for key, mean in (answer.metrics | terms).items():
                meter.add(prefix + key, mean.sum / batch.counts[mean.per])
            if name == "policy":
                assert batch.old_logprobs is not None
                gap = ((batch.old_logprobs - batch.rollout_logprobs).abs() * batch.mask).sum()
                meter.add("kl/train_rollout", gap / batch.counts["token"])
            return total

        model = self._models[name]
        model.run(batches, self._through(name), loss)
        metrics, skipped = model.step(lambda norm: self._veto(name, step, norm))
        meter.last |= {prefix + key: value for key, value in metrics.items()}
        meter.add(prefix + "skipped_updates", float(skipped is not None) * meter.updates)

    def _veto(self, role: str, step: int, grad_norm: float) -> str | None:
        """One rank's reason not to step is every rank's."""
        reason: str | None = self._hooks.skip_step(role=role, step=step, grad_norm=grad_norm)
        if self._world == 1:
            return reason
        flag = torch.tensor([float(reason is not None)], device=self._device)
        dist.all_reduce(flag)
        return (reason or "another rank's reason") if flag.item() else None

    # -- weights and checkpoints ---------------------------------------------------------------------------------
    def push(self, verify: bool) -> dict[str, float]:
        """Send the policy's weights to every engine."""
        with torch.no_grad():
            return self._transport.send(self._hooks.export(role="policy", model=self._models["policy"]), verify)

    def save(self, folder: str) -> None:
        for name in self._trained:
            self._models[name].save(Path(folder) / name)

    def load(self, folder: str) -> None:
        for name in self._trained:
            self._models[name].load(Path(folder) / name)

    def save_hf(self, folder: str) -> None:
        self._models["policy"].save_hf(Path(folder))


class Meter:
    """Sums over the micro-batches of a step, as a mean over its updates."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self._sums: dict[str, torch.Tensor | float] = {}
        self.last: dict[str, float] = {}  # what every rank knows whole; the step's last one counts

    def add(self, name: str, value: torch.Tensor | float) -> None:
        value = value.detach() if isinstance(value, torch.Tensor) else value
        self._sums[name] = self._sums.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        return {name: float(value) / self.updates for name, value in self._sums.items()} | self.last
