"""``[megatron]``: Megatron-LM's own arguments under their own names, judged by Megatron-LM's own parser.

The parser prints, asserts and exits, and importing it takes seconds; ``miles plan`` therefore asks it in a short-lived
process (``python -m miles_core.edges.megatron.arguments``, JSON in, JSON out), and training ranks use it directly.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import traceback
import warnings
from copy import deepcopy
from functools import cache
from typing import Any, NoReturn

from ...config import RunConfig, suggest
from ...types import Role
from . import hf, limits

Value = bool | int | float | str | list[Any]
Complaint = tuple[str, str]  # (key, message)


class ArgumentError(ValueError):
    """Megatron-LM does not accept the arguments; ``key`` is the one it is about, or None."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def settings(
    table: dict[str, Value], run: RunConfig, model: hf.Architecture, role: Role | None = None
) -> dict[str, Value]:
    """Every argument of this run under Megatron-LM's names: the user's, the model's, [optim]'s and the layout's.

    ``role`` may have an [optim] of its own, and train in fewer steps.
    """
    gpu, own = run.placement.layout != "cpu", role or Role()
    optimizer = run.optim.model_copy(update=own.optim)
    updates = max(run.steps - own.start + 1, 1) * run.batch.updates * run.batch.epochs
    defaults: dict[str, Value] = {"use_distributed_optimizer": True, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    defaults |= {"bf16": gpu, "transformer_impl": "local"}
    optim: dict[str, Value] = {
        "lr": optimizer.lr,
        "min_lr": optimizer.min_lr,
        "lr_decay_style": optimizer.schedule,
        "lr_warmup_iters": optimizer.warmup,
        "lr_decay_iters": updates + 1,  # the last update still moves the weights
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_eps": optimizer.eps,
        "clip_grad": optimizer.max_norm,
    }
    loop: dict[str, Value] = {
        "train_iters": updates + 1,
        "seed": run.seed,
        "micro_batch_size": 1,  # one packed row
        "seq_length": model.arguments["max_position_embeddings"],
        "calculate_per_token_loss": True,  # sums, never means: the loop divides by its own global counts
        "no_initialization": True,  # every weight is read from the model folder
        "no_check_for_nan_in_loss_and_grad": True,  # the loop's skip_step decides, and names the step
        "distributed_backend": "nccl" if gpu else "gloo",
        "use_cpu_initialization": not gpu,
        # Fusions that need Transformer Engine, Apex or a GPU compiler. Attention and softmax are fused by PyTorch.
        "no_gradient_accumulation_fusion": not gpu,
        "no_persist_layer_norm": True,
        "no_rope_fusion": True,
        "no_masked_softmax_fusion": True,
        "no_bias_swiglu_fusion": True,
        "no_bias_dropout_fusion": True,
    }
    return defaults | table | model.arguments | optim | loop


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)


@cache
def _parser() -> _Parser:
    """Made once: Megatron-LM reads the sources of its own classes for it, which takes a third of a second."""
    from . import device

    device.install()
    megatron = device.import_megatron("megatron.training.arguments")
    parser: _Parser = megatron.add_megatron_arguments(_Parser(allow_abbrev=False, add_help=False))
    return parser


def _options(parser: _Parser) -> dict[str, argparse.Action]:
    """What a key may be called: an option without its dashes, or the name Megatron-LM stores it under."""
    named = {action.dest: action for action in reversed(parser._actions)}
    for action in parser._actions:
        named |= {option.lstrip("-").replace("-", "_"): action for option in action.option_strings}
    return named


def _words(key: str, value: Value, options: dict[str, argparse.Action]) -> list[str]:
    """``key = value`` as words of a command line. Raises ArgumentError when the value has the wrong type."""
    if key not in options:
        raise ArgumentError("no such Megatron-LM argument" + suggest(key, options), key)
    action = options[key]
    option = "--" + key.replace("_", "-")
    by_option = option in action.option_strings
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ArgumentError(f"a switch: write true or false, got {value!r}", key)
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[0 if value else 1]]
        on = value if by_option else value == action.const
        return [option if by_option else action.option_strings[0]] if on else []
    if isinstance(value, bool):
        raise ArgumentError(f"wants a value, got {str(value).lower()}", key)
    if isinstance(value, list) and action.nargs is None:
        raise ArgumentError(f"wants one value, got a list of {len(value)}", key)
    values = value if isinstance(value, list) else [value]
    return [option if by_option else action.option_strings[0], *map(str, values)]


def parse(values: dict[str, Value], world: int) -> argparse.Namespace:
    """Megatron-LM's validated namespace for ``world`` ranks. Raises ArgumentError with what it says is wrong."""
    parser = _parser()
    options = _options(parser)
    words = [word for key, value in values.items() for word in _words(key, value, options)]
    args = deepcopy(parser.parse_args(words))  # no list in it is the parser's own default, which Megatron-LM may change
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    args.rank, args.world_size = 1, world  # any rank but 0, which prints
    _validate(args, values)
    return args


def _validate(args: argparse.Namespace, values: dict[str, Value]) -> None:
    from megatron.training import arguments as megatron

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(action="ignore"):
            megatron.validate_args(args)
            megatron.core_transformer_config_from_args(args)
    except (Exception, SystemExit) as error:
        said = str(error) if isinstance(error, Exception) else printed.getvalue().strip()
        if not said:  # a bare assert: its own line says most
            said = traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        said = " ".join(said.split())
        key = next((key for key in values if key in said or key.replace("_", "-") in said), None)
        raise ArgumentError(f"Megatron-LM refuses: {said}", key) from error


def complaints(table: dict[str, Value], run: RunConfig, validate: bool) -> list[Complaint]:
    """What Megatron-LM's parser says of ``table``, one complaint per key; of the whole, when ``validate``."""
    parser, found = _parser(), []
    options = _options(parser)
    for key, value in table.items():
        try:
            parser.parse_args(_words(key, value, options))
        except ArgumentError as error:
            found.append((f"megatron.{key}", str(error)))
    if not found and validate:
        try:
            model = hf.architecture(hf.read(run.model.path))
            parse(settings(table, run, model), run.placement.trainers)
        except ArgumentError as error:
            found.append((f"megatron.{error.key}" if error.key in table else "megatron", str(error)))
    return found


def check(table: dict[str, Value], run: RunConfig) -> list[Complaint]:
    """Every complaint about ``[megatron]`` and the model's shape, without importing torch or Megatron here."""
    found = limits.refused(table, run.placement.layout != "cpu") + limits.schedule(run) + limits.turns(table, run)
    try:
        found += limits.sizes(table, hf.architecture(hf.read(run.model.path)), run.placement.trainers)
        readable = True
    except hf.UnsupportedModel as error:
        found.append(("model.path", str(error)))
        readable = False
    named = {key.removeprefix("megatron.") for key, _ in found}
    rest = {key: value for key, value in table.items() if key not in named}
    return found + _ask(rest, run, validate=readable and not found)


def _ask(table: dict[str, Value], run: RunConfig, validate: bool) -> list[Complaint]:
    """``complaints`` in a process of its own. An empty table needs none: all the rest was checked already."""
    if not table:
        return []
    if "megatron.training.arguments" in sys.modules:  # as where ranks are threads: it is loaded here already
        return complaints(table, run, validate)
    question = json.dumps({"table": table, "run": run.model_dump(mode="json"), "validate": validate})
    answer = subprocess.run(
        [sys.executable, "-m", __name__], input=question, capture_output=True, text=True, check=False
    )
    try:
        return [(key, message) for key, message in json.loads(answer.stdout.splitlines()[-1])]
    except (IndexError, ValueError):
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return [("megatron", f"Megatron-LM's argument parser does not run here: {last}")]


def main() -> None:
    """Answer one question of ``_ask``."""
    question = json.load(sys.stdin)
    run = RunConfig.model_validate(question["run"])
    answer = complaints(question["table"], run, question["validate"])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
