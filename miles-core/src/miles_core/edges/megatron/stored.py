"""The weights of a model folder as the headers of its files tell them: found and checked without reading a tensor.

A safetensors file is a length, a JSON header of that length, then the tensors: standard library only, so that
``miles plan`` answers on a login node.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hf
from .names import Head, Names, Shape, is_buffer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16", "F64")
_SHOWN = 5  # complaints of one kind; the others are counted


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: Shape
    dtype: str  # as safetensors spells it


class BrokenFile(Exception):
    """A file is not whole safetensors; the message says why and what to do."""


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name, from its first bytes. Raises BrokenFile."""
    again = "download it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise BrokenFile(f"{path}: is a Git LFS pointer, not the weights; run git lfs pull in its folder")
            if len(start) < 8 or 8 + length > size:
                raise BrokenFile(f"{path}: ends inside its header, after {size} bytes; {again}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {name: Stored(path, tuple(row["shape"]), row["dtype"]) for name, row in header.items()}
        end = 8 + length + max((row["data_offsets"][1] for row in header.values()), default=0)
    except OSError as error:
        raise BrokenFile(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BrokenFile(f"{path}: is not in safetensors format; {again}") from error
    if size != end:
        raise BrokenFile(f"{path}: has {size:,} bytes where its header says {end:,}; {again}")
    return found


def find_tensors(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor of a model folder, and what is wrong with its files."""
    if (folder / SINGLE).is_file():
        files, weight_map = [SINGLE], {}
    elif (folder / INDEX).is_file():
        try:
            weight_map = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            files = sorted(set(weight_map.values()))
        except (OSError, ValueError, LookupError, TypeError) as error:
            return {}, [f"{folder / INDEX}: is not an index of safetensors files ({error!r}); download it again"]
    else:
        return {}, [_no_weights(folder)]
    found: dict[str, Stored] = {}
    complaints = []
    for name in files:
        try:
            if not (folder / name).is_file():
                count = sum(file == name for file in weight_map.values())
                raise BrokenFile(f"{folder / name}: is missing; {INDEX} says it holds {count} tensors; download it")
            found |= read_header(folder / name)
        except BrokenFile as error:
            complaints.append(str(error))
    return found, complaints


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: is not a folder; point model.path at a model in Hugging Face format"
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    what = f"; {', '.join(others[:3])} there cannot be used" if others else ""
    return f"{folder}: has no weights: neither {SINGLE} nor {INDEX}{what}; save the model with safetensors"


def check_weights(folder: Path, config: dict[str, Any] | None = None, head: Head = "token") -> list[str]:
    """What is wrong with the weights of a model folder, a line each; reads nothing but the headers of its files.

    ``config`` is the folder's parsed ``config.json``, read here when left out. With ``head`` "value" the folder may be
    that of a policy: its output layer is not used, and a head that it lacks starts at zero.
    """
    try:
        names = Names(hf.read(folder) if config is None else config, head)
    except hf.UnsupportedModel as error:
        return [str(error)]
    found, broken = find_tensors(folder)
    required, optional = names.tensors(), names.optional()
    missing = [name for name in required if name not in found]
    wrong, unknown, unfit = [], [], []
    for name, stored in found.items():
        expected = required.get(name) or optional.get(name)
        if is_buffer(name):
            continue
        if expected is None:
            unknown.append(f"{stored.file}: tensor {name} {list(stored.shape)} has no place in this architecture")
        elif stored.shape != expected:
            wrong.append(f"{stored.file}: tensor {name} has shape {list(stored.shape)}, not {list(expected)}")
        elif stored.dtype not in _DTYPES:
            unfit.append(f"{stored.file}: tensor {name} has dtype {stored.dtype}, not one of {', '.join(_DTYPES)}")
    lacking = [f"{folder}: tensor {name} {list(required[name])} is missing" for name in missing]
    differ = "the weights and config.json are of different models"
    return [
        *broken,
        # a broken file hides its tensors: to list them too would bury the cause
        *some([] if broken else lacking, f"{differ}, or the download is not complete"),
        *some(wrong, differ),
        *some(unknown, differ),
        *some(unfit, "use the model's unquantized weights"),
    ]


def some(complaints: list[str], advice: str | None = None) -> list[str]:
    """The first few, with what to do about them unless they say it, and how many there are beyond."""
    shown = [f"{complaint}; {advice}" if advice else complaint for complaint in complaints[:_SHOWN]]
    more = len(complaints) - _SHOWN
    return shown if more <= 0 else [*shown[:-1], f"{shown[-1]} (and {more} more like this)"]
