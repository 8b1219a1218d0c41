"""Megatron-LM as the trainer: ``[megatron]`` takes its own arguments under their own names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from ...hookspecs import hookimpl
from ...plugins import Plugin
from ...types import Batch, Complain, Output, Refused, Role
from ..protocols import Model

if TYPE_CHECKING:
    from torch import Tensor, nn

Value = bool | int | float | str | list[bool | int | float | str]


class Megatron(Plugin):
    """Builds and runs models by Megatron-core; without a GPU through the CPU layer of ``device``."""

    class Config(Plugin.Config):
        """Any argument of Megatron-LM, such as ``tensor_model_parallel_size = 2`` or ``bf16 = true``."""

        model_config = ConfigDict(extra="allow", frozen=True)
        __pydantic_extra__: dict[str, Value]

    @property
    def table(self) -> dict[str, Any]:
        """``[megatron]`` as written."""
        return dict(self.config.model_extra or {})

    @hookimpl
    def miles_check(self, complain: Complain, tables: dict[str, Any], roles: dict[str, Role]) -> None:
        from . import arguments, need
        from .roles import check_roles
        from .stored import check_weights

        found = arguments.check(self.table, self.run)
        for key, message in found:
            complain(key, message)
        if not any(key == "model.path" for key, _ in found):
            for message in check_weights(self.run.model.path):
                complain("model.path", message)
        check_roles(roles, self.table, self.run, complain, tables.get(self.run.algorithm))
        if not found and self.run.placement.layout != "cpu":
            need.check(self.table, self.run, roles, complain)

    @hookimpl
    def miles_explain(self, roles: dict[str, Role]) -> dict[str, str]:
        from . import hf, need

        model = hf.architecture(hf.read(self.run.model.path))
        shape, trainers = model.arguments, self.run.placement.trainers
        tensor, pipeline = (self.table.get(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
        gpu = self.run.placement.layout != "cpu"
        said = {"memory": need.explained(self.table, self.run, roles)} if gpu else {}
        if self.run.placement.engines:
            size = model.parameters * (2 if self.table.get("bf16", gpu) else 4)
            said["sync"] = f"{size:,} bytes of weights to each engine, every time they are updated"
        return said | {
            "model": f"{shape['num_layers']} layers of {shape['hidden_size']}, {model.parameters:,} parameters",
            "trainers": f"{trainers} ranks: tensor {tensor} x pipeline {pipeline} "
            f"x data {trainers // (tensor * pipeline)}",
        }

    @hookimpl
    def miles_model(self, name: str, role: Role) -> Model:
        from pathlib import Path

        from . import arguments, device, hf

        if self.table.get("tensor_model_parallel_size", 1) > 1:
            os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron's order of kernels and collectives relies on it
        shared = self.run.placement.layout == "colocate"
        if self.run.placement.layout != "cpu" and not device.has_gpu():
            raise Refused(f'{name}: placement.layout = "{self.run.placement.layout}", but this process has no GPU')
        device.install()
        build, model, memory = (device.import_megatron(f"{__name__}.{part}") for part in ("build", "model", "memory"))
        from .weights import load_weights

        folder = Path(role.path) if role.path else self.run.model.path
        architecture = hf.architecture(hf.read(folder))
        settings = arguments.settings(self.table, self.run, architecture, role)
        args = arguments.parse(settings, self.run.placement.trainers)
        with device.running():
            build.initialize(args)

        def made() -> Model:
            with device.running():
                module = build.module(args, architecture, role.head)
                load_weights(module, folder, role.head)
                if not role.trained:
                    module.requires_grad_(False)
                if device.has_gpu():
                    memory.check(name, memory.need(args, module, role.trained))
                trained = build.trained(args, module) if role.trained else None
                built = model.MegatronModel(name, args, folder, module, trained, shared, role.head)
                if role.trained and self.run.checkpoint.every:
                    built.saves_often()
                whole: Model = built
                return whole

        if not role.cache or role.trained:
            return made()
        cached = device.import_megatron(f"{__name__}.cached")
        kept: Model = cached.CachedModel(name, Path(role.cache), cached.digest(folder, args), made)
        return kept

    @hookimpl
    def miles_forward(self, role: str, module: nn.Module, batch: Batch) -> Output:
        from .forward import forward

        return forward(module, batch)

    @hookimpl
    def miles_export(self, role: str, model: Model) -> Iterator[tuple[str, Tensor]]:
        from .model import MegatronModel

        if not isinstance(model, MegatronModel):
            raise TypeError(f"{role}: {type(model).__name__} was not built by the megatron edge; it cannot be exported")
        return model.export()
