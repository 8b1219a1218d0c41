"""``[sglang]``: SGLang's own server arguments under their own names, judged by SGLang's own parser.

The parser exits, prints, and takes seconds to import; ``miles plan`` therefore asks it in a short-lived process
(``python -m miles_core.edges.sglang.arguments``, JSON in, JSON out). What it accepts comes back as the words of a
command line, which are the only thing that the engine is given: its process does not import SGLang.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any, NoReturn

from ...config import suggest

Complaint = tuple[str, str]  # (key, message)

# What Miles sets, or what would break what it relies on, by SGLang's own field: what to do instead.
OURS = {
    "model_path": "it is model.path",
    "context_length": "say model.context",
    "random_seed": "it comes from seed",
    "host": "an engine listens on the address of its machine",
    "port": "an engine listens on a port that it finds free",
    "weight_version": "it counts training steps, and proves which server answered",
    "skip_tokenizer_init": "it is always on: tokens go in and out",
    "enable_memory_saver": "it is always on where there is a GPU",
    "custom_weight_loader": "weights that are broadcast are received by Miles' own, and no other is asked for",
    "nnodes": "an engine runs on one machine; say placement.engines for more of them",
    "node_rank": "an engine runs on one machine; say placement.engines for more of them",
    "dist_init_addr": "an engine runs on one machine; say placement.engines for more of them",
    "base_gpu_id": "which GPUs are an engine's is decided by the cluster",
    "gpu_id_step": "which GPUs are an engine's is decided by the cluster",
    "tokenizer_worker_num": "an update of the weights can stop one tokenizer process, not several",
    "detokenizer_worker_num": "nothing is detokenized in the server",
    "preferred_sampling_params": "[rollout] says how to sample",
    "api_key": "only this run knows where its servers are; it sends no key",
    "admin_api_key": "only this run knows where its servers are; it sends no key",
    "ssl_certfile": "engines are asked over plain HTTP",
    "ssl_keyfile": "engines are asked over plain HTTP",
    "use_ray": "Miles starts its servers by Ray itself",
    "grpc_mode": "engines are asked over HTTP",
    "smg_grpc_mode": "engines are asked over HTTP",
    "is_embedding": "engines generate",
    "encoder_only": "engines generate",
    "disaggregation_mode": "every engine both reads prompts and generates",
    "checkpoint_engine_wait_weights_before_ready": "an engine starts with the model on disk",
    "delete_ckpt_after_loading": "it would delete model.path",
    "allow_auto_truncate": "a prompt that is too long is refused, never cut",
    "config": "write the arguments themselves into [sglang]",
}
ALIASES = {"model": "model_path", "seed": "random_seed"}
REPLICAS = ("dp_size", "data_parallel_size")
STAGES = ("pp_size", "pipeline_parallel_size")


def refused(table: dict[str, Any]) -> list[Complaint]:
    """What no version of SGLang's parser need be asked about."""
    found = [(f"sglang.{key}", f"is not yours to set: {OURS[field]}") for key in table if (field := _ours(key))]
    if not table.get("enable_dp_attention"):  # without it SGLang refuses every update of the weights
        more = "needs enable_dp_attention = true; for more replicas say placement.engines"
        found += [(f"sglang.{key}", more) for key in REPLICAS if table.get(key, 1) != 1]
    # A server enters the group of an update by its tensor-parallel ranks, which each of its stages has.
    stages = "weights cannot be brought to the stages of an engine; say sglang.tp_size, or placement.engines"
    found += [(f"sglang.{key}", stages) for key in STAGES if table.get(key, 1) != 1]
    if table.get("load_format") == "dummy":
        found.append(("sglang.load_format", "an engine starts as version 0, so with the weights in model.path"))
    return found


def _ours(key: str) -> str | None:
    field = ALIASES.get(key, key)
    return field if field in OURS else None


def gpus(table: dict[str, Any]) -> int:
    """GPUs that one engine takes: none when it is told to run on the CPU."""
    if table.get("device") == "cpu":
        return 0
    return int(next((table[key] for key in ("tp_size", "tensor_parallel_size") if key in table), 1))


def check(table: dict[str, Any]) -> list[Complaint]:
    """Every complaint about ``[sglang]``, without importing SGLang here."""
    found = refused(table)
    if find_spec("sglang") is None:
        return [*found, ("use.engines", "SGLang is not installed; pip install 'miles-core[sglang]'")]
    named = {key for key, _ in found}
    return found + _ask(json.dumps({k: v for k, v in table.items() if f"sglang.{k}" not in named}))[1]


def words(table: dict[str, Any]) -> tuple[str, ...]:
    """``[sglang]``, which ``check`` found nothing wrong with, as words of a command line."""
    return _ask(json.dumps(table))[0]


@cache
def _ask(table: str) -> tuple[tuple[str, ...], list[Complaint]]:
    """Words and complaints, from a process of its own. An empty table needs none."""
    if not json.loads(table):
        return (), []
    answer = subprocess.run([sys.executable, "-m", __name__], input=table, capture_output=True, text=True, check=False)
    try:
        said, complaints = json.loads(answer.stdout.splitlines()[-1])
        return tuple(said), [(key, message) for key, message in complaints]
    except (IndexError, ValueError):
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return (), [("sglang", f"SGLang's argument parser does not run here: {last}")]


# -- in the process that imports SGLang -------------------------------------------------------------------------------


class ArgumentError(ValueError):
    """SGLang's parser does not accept an argument."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)


def parser() -> _Parser:
    from sglang.srt.server_args import ServerArgs

    made = _Parser(allow_abbrev=False, add_help=False)
    ServerArgs.add_cli_args(made)
    return made


def spell(key: str, value: Any, parser: _Parser) -> list[str]:
    """``key = value`` as words of a command line. Raises ArgumentError when SGLang would not take it."""
    options = {action.dest: action for action in reversed(parser._actions)}
    for action in parser._actions:
        options |= {option.lstrip("-").replace("-", "_"): action for option in action.option_strings}
    if key not in options:
        raise ArgumentError("no such SGLang argument" + suggest(key, options.keys() - OURS.keys()))
    action = options[key]
    if ours := _ours(action.dest):
        raise ArgumentError(f"is not yours to set: {OURS[ours]}")
    option = action.option_strings[0]
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ArgumentError(f"a switch: write true or false, got {value!r}")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[0 if value else -1]]
        return [option] if value else []
    if isinstance(value, bool):
        raise ArgumentError(f"wants a value, got {str(value).lower()}")
    if isinstance(value, dict) or (isinstance(value, list) and action.nargs is None):
        said = [option, json.dumps(value)]  # such arguments are written as JSON in a shell, too
    else:
        said = [option, *map(str, value if isinstance(value, list) else [value])]
    parser.parse_args(["--model-path", "some", *said])
    return said


def judge(table: dict[str, Any]) -> tuple[list[str], list[Complaint]]:
    """Words for what SGLang's parser takes of ``table``, and one complaint for each key that it does not."""
    said: list[str] = []
    found: list[Complaint] = []
    made = parser()
    for key, value in table.items():
        try:
            said += spell(key, value, made)
        except (ArgumentError, SystemExit) as error:
            found.append((f"sglang.{key}", str(error)))
    return said, found


if __name__ == "__main__":
    print(json.dumps(judge(json.load(sys.stdin))))
