"""Every hook Miles calls, in the order a training step calls them.

A hook has a *kind*, which says what happens when several plugins answer, and a *place*, the process that calls it.

    slot    exactly one plugin answers; a tie is an error, settled by ``[use]``
    first   plugins are asked in the run's order; the first answer that is not None wins
    merge   every plugin may answer a dict; the same key twice is an error naming both
    event   everyone is told; nothing is returned

    driver  the one process that runs the loop (no GPU)
    rollout each process that talks to the engines
    trainer every training rank, in the same order: collectives are allowed

A hook of two places is asked in both, by each of the processes for itself.
A plugin knows its own table as ``self.config`` and the run as ``self.run``, in every process; hooks get the rest.
Plugins are asked in the order of ``plugins = [...]``, then the algorithm, then what core brings. Slots marked
``algorithm`` are answered by the plugin named by ``algorithm = ...``, all of them, or else by core's default.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from .edges.lasting import Queue, Store
    from .edges.protocols import Cluster, Engine, Engines, Model, Transport
    from .types import Batch, Column, Complain, Group, Loss, Mean, Output, Role, Sample, Weight

Kind = Literal["slot", "first", "merge", "event"]
Place = Literal["driver", "rollout", "trainer"]
hookimpl = pluggy.HookimplMarker("miles")


def hook[F: Callable[..., Any]](kind: Kind, *places: Place, algorithm: bool = False) -> Callable[[F], F]:
    def mark(spec: F) -> F:
        spec.kind, spec.places, spec.algorithm = kind, places, algorithm  # type: ignore[attr-defined]
        return pluggy.HookspecMarker("miles")(spec, firstresult=kind in ("slot", "first"))

    return mark


class Hooks:
    # -- before anything is allocated ---------------------------------------------------------------------------
    @hook("event", "driver")
    def miles_check(self, complain: Complain, tables: dict[str, Any], roles: dict[str, Role]) -> None:
        """``complain(key, message)`` of what cannot work; start and write nothing. ``tables`` are all plugins' own."""

    @hook("merge", "driver")
    def miles_explain(self, roles: dict[str, Role]) -> dict[str, str]:
        """Lines for ``miles plan``: what this run would take and do, such as processes, memory, parameters."""

    @hook("merge", "driver")
    def miles_roles(self) -> dict[str, Role]:
        """Models beside the policy, such as a reference or a critic; and "policy", to say how it is trained."""

    @hook("merge", "driver")
    def miles_columns(self) -> dict[str, Column]:
        """Per-token columns every batch must carry, and the role that computes each."""

    @hook("slot", "driver")
    def miles_cluster(self, run_dir: Path) -> Cluster:
        """Where processes run; called once, and what it returns is closed when the run ends."""

    @hook("slot", "driver")
    def miles_store(self, run_dir: Path) -> Store:
        """What keeps this run's checkpoints."""

    @hook("slot", "driver")
    def miles_queue(self, run_dir: Path, cluster: Cluster, say: Callable[[str], None]) -> Queue:
        """Where scored groups wait for the trainer."""

    @hook("slot", "driver")
    def miles_engines(self) -> Engines:
        """The processes that sample, and the client that reaches them."""

    # -- one group ----------------------------------------------------------------------------------------------
    @hook("slot", "driver")
    def miles_prompts(self, split: str, start: int) -> Iterator[Sample]:
        """Prompts: without end for "train", once for "eval". ``start`` of them were taken by an earlier process."""

    @hook("event", "rollout")
    def miles_rollout_start(self) -> None:
        """This process is about to sample: load what takes long, such as a tokenizer."""

    @hook("slot", "rollout")
    async def miles_rollout(self, group: Group, engine: Engine, evaluating: bool) -> Group:
        """Fill in each sample: tokens, mask, logprobs, versions, response, finish."""

    @hook("merge", "rollout")
    async def miles_reward(self, group: Group, evaluating: bool) -> dict[str, list[float]]:
        """Named rewards, one number a sample, already weighted; a sample's reward is their sum."""

    @hook("first", "driver")
    def miles_drop_group(self, group: Group) -> str | None:
        """Why this group is not worth training on, or None. A dropped group is replaced by another prompt's."""

    @hook("event", "driver")
    def miles_group_end(self, group: Group, dropped: str | None) -> None:
        """Every group that came back, kept or not."""

    @hook("merge", "driver")
    def miles_metrics(self, step: int, groups: list[Group], evaluating: bool) -> dict[str, float]:
        """Numbers to report of every group sampled for ``step``, dropped ones too, or to evaluate it."""

    @hook("slot", "driver", algorithm=True)
    def miles_score(self, groups: list[Group]) -> list[list[float | None]]:
        """Credit for every sample of the groups of one step; None keeps a sample out. Core's default: its reward."""

    @hook("slot", "driver", algorithm=True)
    def miles_units(self, group: Group) -> list[list[Sample]]:
        """Samples that must share a micro-batch, such as the two halves of a pair. Core's default: each alone."""

    # -- one step -----------------------------------------------------------------------------------------------
    @hook("slot", "trainer")
    def miles_model(self, name: str, role: Role) -> Model:
        """One role's model on this rank, weights loaded. ``torch.distributed`` is up, and nothing else is."""

    @hook("slot", "trainer", algorithm=True)
    def miles_advantage(self, batch: Batch) -> dict[str, Tensor]:
        """Columns computed from columns, at least ``advantage`` [T]. Core's default: the score on every token."""

    @hook("event", "trainer")
    def miles_normalize(self, batches: list[Batch], total: Callable[[Tensor], Tensor]) -> None:
        """Every micro-batch of this rank's step has its advantage, to be changed in place by what all of them say.

        ``total`` adds a tensor up over the data-parallel ranks, a collective. Called before the policy's losses."""

    @hook("merge", "trainer")
    def miles_token_weight(self, batch: Batch) -> dict[str, Weight]:
        """Factors of the policy-gradient terms, such as importance weights; ``batch.weight`` is their product."""

    @hook("slot", "trainer")
    def miles_forward(self, role: str, module: nn.Module, batch: Batch) -> Output:
        """Run one micro-batch through this stage. Wrap this hook to work around the forward pass."""

    @hook("slot", "trainer", algorithm=True)
    def miles_loss(self, role: str, batch: Batch, output: Output) -> Loss:
        """A sum, and what it is a sum over; the loop divides by the global count of that."""

    @hook("merge", "trainer")
    def miles_penalty(self, role: str, batch: Batch, output: Output) -> dict[str, Mean]:
        """Extra terms, each already weighted, added to the loss and reported under their names."""

    @hook("first", "trainer")
    def miles_skip_step(self, role: str, step: int, grad_norm: float) -> str | None:
        """Why the optimizer must not step, or None. One rank's reason stops every rank."""

    # -- trainer to engines -------------------------------------------------------------------------------------
    @hook("slot", "trainer")
    def miles_export(self, role: str, model: Model) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under the names the engine knows, one at a time; every rank iterates, only senders get any."""

    @hook("slot", "trainer")
    def miles_transport(self) -> Transport:
        """How weights travel from this rank to the engines."""

    # -- loop ---------------------------------------------------------------------------------------------------
    @hook("event", "driver")
    def miles_progress(self, text: str) -> None:
        """A line for the person: what is being set up, or was done."""

    @hook("event", "driver")
    def miles_run_start(self, run_dir: Path, step: int) -> None:
        """Every process is up; ``step`` steps were done by an earlier process."""

    @hook("event", "driver")
    def miles_step_end(self, step: int, metrics: dict[str, float]) -> None:
        """A step is done, its weights are in the engines. ``metrics`` is what metrics.jsonl gets."""

    @hook("event", "driver")
    def miles_evaluated(self, step: int, groups: list[Group], metrics: dict[str, float]) -> None:
        """The held-out split was sampled with the weights of ``step``."""

    @hook("event", "driver")
    def miles_saved(self, step: int, folder: Path) -> None:
        """A checkpoint is whole on disk."""

    @hook("merge", "driver", "trainer")
    def miles_state(self) -> dict[str, Any]:
        """What this plugin needs back in this process after a restart, as JSON values; keys are its own."""

    @hook("event", "driver", "trainer")
    def miles_restore(self, state: dict[str, Any]) -> None:
        """What ``miles_state`` answered when the checkpoint was written."""

    @hook("event", "driver")
    def miles_failure(self, process: str, error: str, action: str) -> None:
        """A process died or misbehaved, and what the loop does about it."""

    @hook("event", "driver")
    def miles_span(self, process: str, doing: str, began: float, ended: float) -> None:
        """What a process did, such as sample, reward, train, sync or wait, in seconds since the epoch."""

    @hook("event", "driver")
    def miles_run_end(self, error: BaseException | None) -> None:
        """The run is over; None when every step was done."""
