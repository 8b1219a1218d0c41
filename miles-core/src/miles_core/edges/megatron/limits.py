"""Which of Megatron-LM's arguments a run may set, and which sizes fit together."""

from __future__ import annotations

from typing import Any

from ...config import RunConfig
from .hf import Architecture

_CONFIG = "read from config.json in model.path; leave it out"
_UNUSED = "Miles does this part of training itself, so Megatron-LM's own setting would have no effect; leave it out"
_NOT_YET = "not supported by this version of Miles; leave it out"

# Arguments that Miles sets, and where the user sets them instead.
SET_ELSEWHERE = {
    "lr": "set optim.lr",
    "min_lr": "set optim.min_lr",
    "lr_decay_style": "set optim.schedule",
    "lr_warmup_iters": "set optim.warmup",
    "lr_warmup_samples": "set optim.warmup",
    "lr_warmup_fraction": "set optim.warmup",
    "lr_warmup_init": "set optim.warmup",
    "lr_decay_iters": "set steps",
    "lr_decay_samples": "set steps",
    "train_iters": "set steps",
    "train_samples": "set steps",
    "weight_decay": "set optim.weight_decay",
    "start_weight_decay": "set optim.weight_decay",
    "end_weight_decay": "set optim.weight_decay",
    "adam_beta1": "set optim.beta1",
    "adam_beta2": "set optim.beta2",
    "adam_eps": "set optim.eps",
    "clip_grad": "set optim.max_norm",
    "optimizer": "[optim] always means Adam with decoupled weight decay; leave it out",
    "seed": "set seed, at the top of the file",
    "micro_batch_size": "set batch.micro_tokens",
    "global_batch_size": "set batch.groups and batch.group_size",
    "rampup_batch_size": "set batch.groups and batch.group_size",
    "seq_length": "set model.context",
    "load": "start from a checkpoint with miles run --resume",
    "save": "checkpoints go to the run folder; set checkpoint.every",
    "save_interval": "set checkpoint.every",
    "ckpt_format": "checkpoints are always torch_dist; leave it out",
    "distributed_backend": "chosen by the machine: nccl with a GPU, gloo without; leave it out",
    "distributed_timeout_minutes": _UNUSED,
    "use_cpu_initialization": "chosen by the machine; leave it out",
    "no_initialization": "every weight is read from model.path; leave it out",
    "perform_initialization": "every weight is read from model.path; leave it out",
    "calculate_per_token_loss": "the loss says what it is a mean over; leave it out",
    "ddp_average_in_collective": "gradients are summed, never averaged; leave it out",
    "attention_dropout": "a policy must give a token one log-probability, so there is no dropout; leave it out",
    "hidden_dropout": "a policy must give a token one log-probability, so there is no dropout; leave it out",
    "check_for_nan_in_loss_and_grad": "answer the skip_step hook; leave it out",
    "no_check_for_nan_in_loss_and_grad": "answer the skip_step hook; leave it out",
}
SET_ELSEWHERE |= dict.fromkeys(
    (
        "num_layers encoder_num_layers decoder_num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels "
        "group_query_attention num_query_groups max_position_embeddings normalization norm_epsilon swiglu squared_relu "
        "quick_geglu disable_bias_linear add_bias_linear add_qkv_bias qk_layernorm untie_embeddings_and_output_weights "
        "position_embedding_type rotary_base rotary_percent use_rope_scaling rope_scaling_factor padded_vocab_size "
        "use_rotary_position_embeddings make_vocab_size_divisible_by vocab_size num_experts multi_latent_attention"
    ).split(),
    _CONFIG,
)
# Families of arguments of Megatron-LM's own training script, which is not what runs here.
UNUSED_PREFIXES = (
    "tokenizer_ data_ train_data valid_data test_data rl_ inference_ wandb_ tensorboard_ log_ eval_ retro_ "
    "bert_ vision_ dino_ one_logger_ exit_ non_persistent_ profile_ iter_per_epoch num_workers mock_data split"
).split()
# Arguments that Miles cannot honour, when set to anything that turns them on.
UNSUPPORTED = {
    "num_layers_per_virtual_pipeline_stage": f"interleaved pipeline schedules are {_NOT_YET}",
    "num_virtual_stages_per_pipeline_rank": f"interleaved pipeline schedules are {_NOT_YET}",
    "pipeline_model_parallel_layout": f"custom pipeline layouts are {_NOT_YET}",
    "use_megatron_fsdp": f"sharded data parallelism other than the distributed optimizer is {_NOT_YET}",
    "use_torch_fsdp2": f"sharded data parallelism other than the distributed optimizer is {_NOT_YET}",
    "moe_grouped_gemm": "grouped matrix products need a GPU; leave it out",
    "fp8": "FP8 needs Transformer Engine and a GPU; leave it out",
    "fp8_format": "FP8 needs Transformer Engine and a GPU; leave it out",
    "fp4": "FP4 needs Transformer Engine and a GPU; leave it out",
    "fp4_format": "FP4 needs Transformer Engine and a GPU; leave it out",
    "fp16": "loss scaling is not supported; set bf16 = true instead",
    "cuda_graph_impl": f"CUDA graphs are {_NOT_YET}",
    "enable_cuda_graph": f"CUDA graphs are {_NOT_YET}",
    "external_cuda_graph": f"CUDA graphs are {_NOT_YET}",
    "mtp_num_layers": f"multi-token prediction is {_NOT_YET}",
    "tp_comm_overlap": "overlapped tensor parallelism needs Transformer Engine; leave it out",
    "optimizer_cpu_offload": f"offloading the optimizer is {_NOT_YET}",
    "use_precision_aware_optimizer": "a precision-aware optimizer needs Transformer Engine; leave it out",
    "gradient_accumulation_fusion": "it is on wherever there is a GPU; leave it out",
    "masked_softmax_fusion": "attention is fused by PyTorch already; leave it out",
    "apply_rope_fusion": "this fusion needs Transformer Engine; leave it out",
    "bias_swiglu_fusion": "this fusion needs a GPU compiler; leave it out",
    "bias_dropout_fusion": "there is neither bias nor dropout to fuse; leave it out",
    "defer_embedding_wgrad_compute": f"deferring the embedding's gradient is {_NOT_YET}",
}
_OFF = (None, False, 0, "none", "null")
Complaint = tuple[str, str]


def refused(table: dict[str, Any], gpu: bool) -> list[Complaint]:
    """A complaint for each key that is not the user's to set here."""
    found = []
    for key, value in table.items():
        if key in SET_ELSEWHERE:
            found.append((f"megatron.{key}", SET_ELSEWHERE[key]))
        elif key in UNSUPPORTED and value not in _OFF:
            found.append((f"megatron.{key}", UNSUPPORTED[key]))
        elif key.startswith(tuple(UNUSED_PREFIXES)):
            found.append((f"megatron.{key}", _UNUSED))
        elif key == "context_parallel_size" and value != 1:
            found.append((f"megatron.{key}", "context parallelism needs Transformer Engine; leave it at 1"))
        elif key == "transformer_impl" and value not in ("local", "transformer_engine"):
            found.append((f"megatron.{key}", 'there are layers for "local" and "transformer_engine"'))
        elif key == "transformer_impl" and value != "local" and not gpu:
            found.append((f"megatron.{key}", 'TransformerEngine needs a GPU; leave it out in layout "cpu"'))
    return found


def schedule(run: RunConfig) -> list[Complaint]:
    """A complaint for each part of [optim] that makes no schedule."""
    found, updates = [], run.steps * run.batch.updates * run.batch.epochs
    if run.optim.min_lr > run.optim.lr:
        message = f"{run.optim.min_lr} is above optim.lr = {run.optim.lr}, where the schedule starts; set it lower"
        found.append(("optim.min_lr", message))
    if run.optim.warmup > updates:
        makes = f"{updates} (steps x batch.updates x batch.epochs)"
        message = f"{run.optim.warmup} updates, but the run makes {makes}; set it lower"
        found.append(("optim.warmup", message))
    return found


def turns(table: dict[str, Any], run: RunConfig) -> list[Complaint]:
    """A complaint where engines that share the trainers' GPUs would be handed less than the whole model."""
    if run.placement.layout == "colocate" and table.get("pipeline_model_parallel_size", 1) != 1:
        message = 'every GPU feeds the engine on it, which no stage can alone; leave it out, or use layout "split"'
        return [("megatron.pipeline_model_parallel_size", message)]
    return []


def sizes(table: dict[str, Any], model: Architecture, trainers: int) -> list[Complaint]:
    """A complaint for each parallel size that does not fit the model or the number of training ranks."""
    tensor, pipeline = (table.get(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
    wrong = [
        (f"megatron.{kind}_model_parallel_size", f"must be a whole number of at least 1, got {size!r}")
        for kind, size in (("tensor", tensor), ("pipeline", pipeline))
        if not isinstance(size, int) or isinstance(size, bool) or size < 1
    ]
    if wrong:
        return wrong
    found = []
    if trainers % (tensor * pipeline):
        key = "megatron." + ("tensor" if tensor > 1 else "pipeline") + "_model_parallel_size"
        found.append(
            (
                key,
                f"tensor {tensor} x pipeline {pipeline} = {tensor * pipeline} ranks hold one copy of the model, which "
                f"does not divide placement.trainers = {trainers}; set it to a multiple of {tensor * pipeline}",
            )
        )
    arguments = model.arguments
    for size, key, what, count in (
        (tensor, "tensor", "attention heads", arguments["num_attention_heads"]),
        (tensor, "tensor", "key-value heads", arguments["num_query_groups"]),
        (tensor, "tensor", "feed-forward columns", arguments["ffn_hidden_size"]),
        (tensor, "tensor", "vocabulary entries", model.vocab_size),
        (pipeline, "pipeline", "layers", arguments["num_layers"]),
    ):
        if count % size:
            fits = ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
            message = f"{size} does not divide the model's {count} {what}; sizes that do: {fits}"
            found.append((f"megatron.{key}_model_parallel_size", message))
    if table.get("sequence_parallel") is True and tensor == 1:
        found.append(
            ("megatron.sequence_parallel", "needs tensor_model_parallel_size of 2 or more; raise that, or set false")
        )
    return found
