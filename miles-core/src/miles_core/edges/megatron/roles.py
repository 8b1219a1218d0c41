"""What is wrong with the models that an algorithm asks for beside the policy, before any is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...config import OptimTable, RunConfig
from ...types import Complain, Role
from . import hf, limits
from .stored import check_weights


def check_roles(roles: dict[str, Role], table: dict[str, Any], run: RunConfig, complain: Complain) -> None:
    """Complain of a folder that cannot be that role's model, of a wrong optimizer, and of ranks for nobody."""
    for name in run.placement.apart:
        if name not in roles or name == "policy":
            known = ", ".join(sorted(roles.keys() - {"policy"})) or "none"
            complain("placement.apart", f"{name!r} is no role of {run.algorithm} beside the policy; it has {known}")
    for name, role in roles.items():
        key = f"{run.algorithm}.{name}"
        for folder in [Path(role.path)] if role.path else []:
            for message in _faults(folder, role, table, run):
                complain(key, message)
        try:
            OptimTable.model_validate(run.optim.model_dump() | role.optim)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                complain(key, f"optim.{'.'.join(map(str, fault['loc']))}: {fault['msg']}")


def _faults(folder: Path, role: Role, table: dict[str, Any], run: RunConfig) -> list[str]:
    try:
        theirs, ours = hf.architecture(hf.read(folder)), hf.architecture(hf.read(run.model.path))
    except hf.UnsupportedModel as error:
        return [str(error)]
    if theirs.vocab_size != ours.vocab_size:
        return [
            f"{folder} has a vocabulary of {theirs.vocab_size}, the policy of {ours.vocab_size}: their tokens do not "
            "mean the same; take a model with the policy's tokenizer"
        ]
    sizes = limits.sizes(table, theirs, run.placement.trainers)
    return check_weights(folder, head=role.head) + [f"{key}: {message}" for key, message in sizes]
