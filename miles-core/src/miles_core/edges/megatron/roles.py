"""What is wrong with the models that an algorithm asks for beside the policy, before any is built."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...config import OptimTable, RunConfig
from ...types import Complain, Role
from . import hf, limits
from .stored import check_weights


def check_roles(
    roles: dict[str, Role],
    table: dict[str, Any],
    run: RunConfig,
    complain: Complain,
    keys: Iterable[tuple[str, Any]] | None = None,
) -> None:
    """Complain of a folder that cannot be that role's model, of a wrong optimizer, and of ranks for nobody.

    ``keys`` are those of the algorithm, with their values: what a role got from one of them is complained of there.
    """

    def key(name: str, value: str | dict[str, Any]) -> str:
        found = (k for k, given in keys or () if value in (given, str(given)))
        return f"{run.algorithm}.{next(found, name)}"

    for name in run.placement.apart:
        if name not in roles or name == "policy":
            known = ", ".join(sorted(roles.keys() - {"policy"})) or "none"
            complain("placement.apart", f"{name!r} is no role of {run.algorithm} beside the policy; it has {known}")
    for name, role in roles.items():
        for folder in [role.path] if role.path else []:
            for message in _faults(Path(folder), role, table, run):
                complain(key(name, folder), message)
        try:
            OptimTable.model_validate(run.optim.model_dump() | role.optim)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                optim = key(f"{name}.optim", role.optim) if role.optim else "optim"
                complain(f"{optim}.{'.'.join(map(str, fault['loc']))}", fault["msg"][:1].lower() + fault["msg"][1:])


def _faults(folder: Path, role: Role, table: dict[str, Any], run: RunConfig) -> list[str]:
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        return [f"{folder} {what}; point this key at a model in Hugging Face format"]
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
