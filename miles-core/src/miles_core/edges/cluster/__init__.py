"""Processes, on Ray: a cluster that is already there, or one started on this machine for the length of the run."""

from __future__ import annotations

import os
import re
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...hookspecs import hookimpl
from ...plugins import Plugin

if TYPE_CHECKING:
    from pathlib import Path

    from ...types import Complain
    from ..protocols import Cluster

DASHBOARD = ("aiohttp", "aiohttp_cors", "opencensus", "opentelemetry", "prometheus_client")
SPARE_CPUS = 4  # of a local Ray, for processes that stand in no placement table


class Ray(Plugin):
    class Config(Plugin.Config):
        address: str | None = None  # "host:port" or "auto"; a local Ray is started when left out
        cpus: int | None = Field(None, gt=0)  # that a local Ray may give out, however many cores there are
        object_store_mib: int = Field(256, ge=80)  # shared memory of a local Ray
        dashboard: bool = False  # of a local Ray; needs the packages of ray[default]
        start_timeout_s: float = Field(120, gt=0)  # a process that found no room by then ends the run
        silence_s: float = Field(600, gt=0)  # a process that answers nothing for so long hangs, and is killed
        runtime_env: dict[str, Any] = {}  # handed to Ray as it is

    config: Config

    @hookimpl
    def miles_check(self, complain: Complain) -> None:
        address = self.config.address
        if self.config.dashboard and (lacking := [name for name in DASHBOARD if find_spec(name) is None]):
            complain("ray.dashboard", f"needs {', '.join(lacking)}; pip install 'ray[default]', or leave it out")
        if address is None:
            return
        if self.config.cpus is not None:
            complain("ray.cpus", f"is for a local Ray, but ray.address = {address!r} joins another; remove one")
        if address != "auto" and (problem := _unreachable(address)):
            complain("ray.address", problem)

    @hookimpl
    def miles_explain(self) -> dict[str, str]:
        place = self.run.placement
        counts = {"training rank": place.trainers, "engine": place.engines, "rollout worker": place.rollout_workers}
        each = ", ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in counts.items())
        total, cores = sum(counts.values()), os.cpu_count() or 1
        if self.config.address:
            return {"processes": f"{each}, on the Ray at {self.config.address}"}
        lines = [f"{each}, on a Ray started on this machine, which gives out {self.cpus} CPUs"]
        if total > cores:
            lines.append(f"warning: {total} processes take turns on {cores} cores")
        return {"processes": "\n".join(lines)}

    @hookimpl
    def miles_cluster(self, run_dir: Path) -> Cluster:
        from .cluster import RayCluster
        from .session import Session

        c = self.config
        options: dict[str, Any] = {"address": c.address}
        if not c.address:
            options = {
                "address": "local",
                "num_cpus": self.cpus,
                "object_store_memory": c.object_store_mib << 20,
                "include_dashboard": c.dashboard,
            }
        if c.runtime_env:
            options["runtime_env"] = c.runtime_env
        return RayCluster(Session(options), run_dir, c.start_timeout_s, c.silence_s)

    @property
    def cpus(self) -> int:
        """What a local Ray gives out: CPUs there are bookkeeping, so a laptop may run more processes than cores."""
        place = self.run.placement
        need = place.trainers + place.engines + place.rollout_workers + SPARE_CPUS
        return self.config.cpus or max(need, os.cpu_count() or 1)


def _unreachable(address: str) -> str | None:
    """What is wrong with ``host:port``, if anything: its spelling, or that nobody listens there."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})", address)
    if not match or not 0 < int(match[3]) < 65536:
        return f'{address!r} is no address; write "host:port" of the head node, or "auto" for the Ray on this machine'
    try:
        socket.create_connection((match[1] or match[2], int(match[3])), timeout=3).close()
    except OSError as error:
        return (
            f"nobody answers at {address} ({error}); on its head node run `ray start --head --port={match[3]}`, "
            "or leave ray.address out to start a Ray on this machine"
        )
    return None
