"""Build one role's model by Megatron's own pipeline: groups, configuration, layers, data parallelism, optimizer."""

from __future__ import annotations

import dataclasses
import logging
import random
import warnings
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import mpu, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel import layers as linear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.training.argument_utils import core_transformer_config_from_args
from torch import Tensor

from . import device
from .attention import PackedAttention
from .hf import Architecture
from .layers import RMSNorm, SwiGLU, ValueHead
from .names import Head
from .rotary import Rotary


@dataclass
class Trained:
    """What a trained role has beside its module."""

    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def initialize(args: Namespace) -> None:
    """Megatron's process groups and random-number streams, once per process. ``torch.distributed`` is already up."""
    if mpu.is_initialized():
        return
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,  # on a CPU every group is gloo's; on a GPU nothing here needs them
    )
    seed = args.seed + 100 * mpu.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


class _WeightGradients:
    """What Megatron's linear layers ask of an extension of Apex, by PyTorch: grad += output^T input, in float32."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, outputs: Tensor, grad: Tensor) -> None:
        torch.ops.aten.addmm.dtype_out(grad, outputs.t(), inputs, torch.float32, out=grad)

    @staticmethod
    def wgrad_gemm_accum_fp16(inputs: Tensor, outputs: Tensor, grad: Tensor) -> None:
        grad.addmm_(outputs.t(), inputs)


def module(args: Namespace, model: Architecture, head: Head = "token") -> torch.nn.Module:
    """This rank's part of the model, its weights not set yet. With ``head`` "value" it ends in a ``ValueHead``."""
    # One place decides which of Megatron's models is built. GPTModel announces that it will give way to HybridModel,
    # which has no hook yet between the last layer and the logits.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    linear.fused_weight_gradient_mlp_cuda = _WeightGradients
    linear._grad_accum_fusion_available = True
    config = core_transformer_config_from_args(args)
    config.variable_seq_lengths = True  # rows differ in length; pipeline stages tell each other
    config.use_te_activation_func = True  # the layer's own activation, below, is a module that takes both halves
    config.finalize_model_grads_func = _leave_gradients
    with warnings.catch_warnings(action="ignore"):  # advice for GPUs
        gpt = _gpt(args, model, config, head)
    where = torch.device("cuda", torch.cuda.current_device()) if device.has_gpu() else torch.device("cpu")
    gpt.rotary = Rotary(config.kv_channels, model, where)
    for parameter in gpt.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    gpt.to(where)
    whole: torch.nn.Module = Float16Module(config, gpt) if args.bf16 else gpt
    return whole


def _gpt(args: Namespace, model: Architecture, config: TransformerConfig, head: Head) -> GPTModel:
    """This pipeline stage of the model."""
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_layers(config, args.transformer_impl),
        vocab_size=model.vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=head == "token" and not args.untie_embeddings_and_output_weights,
        position_embedding_type="none",  # attention rotates by itself, at packed positions
    )
    if head == "value" and gpt.post_process:
        gpt.output_layer = ValueHead(config.hidden_size)
    return gpt


def _layers(config: TransformerConfig, kind: str) -> TransformerBlockSubmodules:
    """Megatron's layer out of its local linear layers, or TransformerEngine's, with attention over packed rows.

    Those of TransformerEngine hold the norm before them. Names in checkpoints are theirs in either case.
    """
    norm: Any = RMSNorm
    into: Any = ColumnParallelLinear
    out_of: Any = RowParallelLinear
    if kind == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

        norm, into, out_of = IdentityOp, TELayerNormColumnParallelLinear, TERowParallelLinear
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=into,
        core_attention=PackedAttention,
        linear_proj=out_of,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    mlp = MLPSubmodules(linear_fc1=into, linear_fc2=out_of, activation_func=SwiGLU)
    layer = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
    specs = [ModuleSpec(TransformerLayer, submodules=layer)] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _leave_gradients(*_args: Any, **_options: Any) -> None:
    """Gradients of several calls add up, so they are reduced when the optimizer steps, not after each call."""


def trained(args: Namespace, module: torch.nn.Module) -> Trained:
    """Data parallelism, optimizer and schedule around a module whose weights are set."""
    config: TransformerConfig = module.config
    ddp_config = DistributedDataParallelConfig(
        **_fields_of(DistributedDataParallelConfig, args),
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        bucket_size=args.ddp_bucket_size,
        pad_buckets_for_high_nccl_busbw=args.ddp_pad_buckets_for_high_nccl_busbw,
    )
    layout = None
    if ddp_config.use_distributed_optimizer:
        parameters = [p for p in module.parameters() if p.requires_grad]
        world = mpu.get_data_parallel_world_size()
        layout = DistributedOptimizer.compute_full_param_layout(
            parameters, ddp_config.bucket_size, world, ddp_config, expert_data_parallel_world_size=world
        )
    ddp = DistributedDataParallel(config, ddp_config, module, full_param_layout=layout)
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = ddp.no_sync
    optimizer_config = OptimizerConfig(**_fields_of(OptimizerConfig, args))
    optimizer = get_megatron_optimizer(
        optimizer_config,
        [ddp],
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
    )
    if not device.has_gpu():  # the whole update in one pass over each parameter; no other optimizer runs there
        for group in optimizer.param_groups:
            group["fused"] = True
    return Trained(ddp, optimizer, _scheduler(args, optimizer))


def _fields_of(kind: Any, args: Namespace) -> dict[str, Any]:
    """The arguments that a configuration class of Megatron has under the same name."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(kind) if hasattr(args, field.name)}


def _scheduler(args: Namespace, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters,
        lr_decay_steps=args.lr_decay_iters,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.lr_decay_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run may have been given more steps
    )
