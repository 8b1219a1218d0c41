"""How to ask TRL for a number: its trainers' own methods, on an object that holds what they look at, no more."""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import MAX_TOKENS, Case
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"
WHY = "TRL is not installed; `nox -s oracles` makes an environment that has it"
grpo = pytest.importorskip("trl.trainer.grpo_trainer", reason=WHY)
rloo = pytest.importorskip("trl.trainer.rloo_trainer", reason=WHY)
dpo = pytest.importorskip("trl.trainer.dpo_trainer", reason=WHY)
cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason=WHY)

LOSSES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}  # by what they are means over


def one_process() -> SimpleNamespace:
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, reduction: x}
    return SimpleNamespace(device="cpu", num_processes=1, process_index=0, sync_gradients=True, **same)


def trainer(case: Case, **keys: Any) -> SimpleNamespace:
    """One that is about to take its first step with all of the case at once."""
    args = {"gradient_checkpointing_kwargs": None, "per_device_train_batch_size": len(case.masks)}
    args |= {"steps_per_generation": 1, "gradient_accumulation_steps": 1, "delta": None}
    args |= {name: keys.pop(name) for name in ("delta", "use_bias_correction_kl") if name in keys}
    given = {
        "accelerator": one_process(),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "ref_model": "ref",
        "args": SimpleNamespace(**args),
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "loss_type": "dapo",
        "mask_truncated_completions": False,
        "max_completion_length": MAX_TOKENS,
        "num_iterations": 1,
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_vllm": False,
        "use_adaptive_entropy": False,
        "vllm_importance_sampling_correction": True,
        "_entropy_bonus_enabled": "entropy_coef" in keys,
        "_metrics": {"train": defaultdict(list)},
    }
    return SimpleNamespace(**given | drawing(case) | keys)


def drawing(case: Case) -> dict[str, Any]:
    """What stands in for data, engine, models and rewards."""
    whole = [mask[n:].tolist() for mask, n in zip(case.masks, case.prompts, strict=True)]
    prompts, answers = [[0] * n for n in case.prompts], [[1] * len(mask) for mask in whole]
    drawn = [row[n:].tolist() for row, n in zip(case.rows["rollout"], case.prompts, strict=True)]
    said = {"ref": "ref"}

    def forward(model: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None, None]:
        return case.padded(said.get(model, "old") if isinstance(model, str) else "old"), None, None

    return {
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "eos_token_ids": [1],
        "log_multimodal": False,
        "multi_objective_aggregation": "sum_then_normalize",
        "num_generations": case.index.count(0),
        "normalize_advantages": False,
        "pad_to_multiple_of": None,
        "reward_clip_range": None,
        "reward_func_names": ["reward"],
        "reward_weights": torch.ones(1, dtype=torch.float64),
        "scale_rewards": "group",
        "_calculate_rewards": lambda *of: torch.tensor(case.rewards, dtype=torch.float64)[:, None],
        "_generate": lambda of: (prompts, answers, [[int(m) for m in mask] for mask in whole], of, drawn, {}, None, []),
        "_get_per_token_logps_and_entropies": forward,
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_tokenizer": SimpleNamespace(pad_token_id=1),
    }


def scored(case: Case, **keys: Any) -> dict[str, Tensor]:
    """What its GRPO trainer makes of answers and rewards before any loss: ``advantages`` [B] among it."""
    inputs = [{"prompt": ""} for _ in case.masks]
    return grpo.GRPOTrainer._generate_and_score_completions(trainer(case, **keys), inputs)


def left_out(case: Case) -> Tensor:
    """[B] advantages of its RLOO trainer."""
    of = trainer(case)
    prompts, answers, _, completions, *_ = of._generate([""])
    of._generate = lambda prompts: (prompts_of(case), answers, completions)
    inputs = [{"prompt": ""} for _ in case.masks]
    return rloo.RLOOTrainer._generate_and_score_completions(of, inputs)["advantages"]


def prompts_of(case: Case) -> list[list[int]]:
    return [[0] * n for n in case.prompts]


def policy_loss(
    case: Case,
    logprobs: Tensor,
    advantage: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    **keys: Any,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of its GRPO trainer on the whole case, and the metrics that it reports."""
    of = trainer(case, use_vllm=weights is not None, **keys)
    entropy = case.padded("entropy") if entropy is None else entropy
    of._get_per_token_logps_and_entropies = lambda *args, **options: (logprobs, entropy, None)
    none = torch.zeros(len(case.masks), 1, dtype=torch.long)
    inputs = {"prompt_ids": none, "prompt_mask": none}
    inputs |= {"completion_ids": case.mask.long(), "completion_mask": case.mask}
    inputs |= {"advantages": case.advantage if advantage is None else advantage}
    inputs |= {"old_per_token_logps": case.padded("old"), "ref_per_token_logps": case.padded("ref")}
    inputs |= {"num_items_in_batch": case.mask.sum(), "importance_sampling_ratio": weights}
    loss = grpo.GRPOTrainer._compute_loss(of, None, inputs)
    return loss, {name: values[-1] for name, values in of._metrics["train"].items()}


# -- pairs: the first sequence of each group of two is the chosen one --------------------------------------------------


def sides(case: Case, rows: list[Tensor]) -> Tensor:
    """[2P, L], prompts and all: every chosen sequence, then every rejected one."""
    return torch.nn.utils.rnn.pad_sequence(rows[::2] + rows[1::2], batch_first=True)


def preference_loss(case: Case, logprobs: Tensor, loss: str, **keys: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss of its DPO trainer on all pairs, and the metrics that it reports; ``logprobs`` as ``sides`` makes it."""

    def says(said: Tensor) -> Any:
        zero = torch.zeros_like(said[:, 1:])
        unused = {"entropy": zero, "mean_logits": zero, "is_top1": zero.bool(), "log_sum_sq_probs": zero}
        return lambda **inputs: SimpleNamespace(log_probs=said[:, 1:], **unused)

    given = {
        "loss_types": [loss],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "precompute_ref_logps": False,
        "use_weighting": False,
        "ref_model": says(sides(case, case.rows["ref"])),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    of, mask = trainer(case, **given | keys), sides(case, case.masks).long()
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    found = dpo.DPOTrainer._compute_loss(of, says(logprobs), inputs, False)
    return found, {name: values[-1] for name, values in of._metrics["train"].items()}


def contrast(chosen: Tensor, rejected: Tensor, loss: str, **keys: Any) -> Tensor:
    """[P], of its CPO trainer, which has no reference: of log-ratios to one, they are losses with a reference."""
    given = {"accelerator": one_process(), "alpha": 0.0, "beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5}
    return cpo.CPOTrainer.cpo_loss(SimpleNamespace(loss_type=loss, **given | keys), chosen, rejected)[0]
