"""Check that a model's sizes fit each other, and parallel sizes and lengths the model."""

from __future__ import annotations

import math

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families.attention import Attention
from owpo_megatron.families.model import HFModel

_VOCAB_MULTIPLE = 8  # rows of a rank's vocabulary part: GEMM sizes that tensor cores like


def check_sizes(model: HFModel, where: str) -> None:
    """Refuse sizes of a config.json that describe no model.

    Args:
        where: the file, for the error.

    Raises:
        UserError: naming the config's field.
    """
    attention, experts, delta = model.attention, model.experts, model.delta
    if attention.num_heads % attention.num_kv_heads:
        remedy = f"must divide num_attention_heads ({attention.num_heads})"
        raise UserError(f"{where} num_key_value_heads", attention.num_kv_heads, remedy)
    if isinstance(attention, Attention) and attention.head_dim % 2:
        raise UserError(f"{where} head_dim", attention.head_dim, "must be even: pairs of dimensions are rotated")
    if delta and delta.value_heads % delta.key_heads:
        remedy = f"must be a multiple of linear_num_key_heads ({delta.key_heads})"
        raise UserError(f"{where} linear_num_value_heads", delta.value_heads, remedy)
    if experts:
        router = experts.router
        if experts.number % router.groups:
            raise UserError(f"{where} n_group", router.groups, f"must divide the number of experts ({experts.number})")
        if router.chosen_groups > router.groups:
            raise UserError(f"{where} topk_group", router.chosen_groups, f"must be at most n_group ({router.groups})")
        most = experts.number // router.groups * router.chosen_groups
        if not 1 <= router.chosen <= most:
            remedy = f"must be between 1 and the {most} experts that there are to choose from"
            raise UserError(f"{where} num_experts_per_tok", router.chosen, remedy)


def layers_of_stages(num_layers: int, pp: int) -> list[int]:
    """[pp] layers of each pipeline stage; the first and the last have fewer where pp does not divide them.

    Those two also hold the embedding and the head. Megatron-core gives all stages between them the same number.

    Example:
        >>> layers_of_stages(94, 4), layers_of_stages(48, 4), layers_of_stages(5, 2)
        ([23, 24, 24, 23], [12, 12, 12, 12], [3, 2])
    """
    most = -(-num_layers // pp)
    missing = most * pp - num_layers
    stages = [most] * pp
    stages[0] -= missing // 2
    stages[-1] -= missing - missing // 2
    return stages


def check_parallel(model: HFModel, parallel: ParallelConfig) -> None:
    """Refuse parallel sizes that do not fit the model.

    Raises:
        UserError: naming parallel.tp, cp, pp, vpp, ep, etp or sp, with the values that fit.
    """
    heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    whole = model.experts is not None and parallel.expert_tp < parallel.tp
    ffn_sizes = dict.fromkeys(model.mlp.split_sizes[whole:])  # an expert's comes first
    common = math.gcd(heads, kv_heads, *ffn_sizes)
    if common % parallel.tp:
        raise UserError(
            "parallel.tp",
            parallel.tp,
            f"must divide the model's {heads} attention heads, {kv_heads} key-value heads"
            f"{' and ffn size ' * bool(ffn_sizes)}{', '.join(map(str, ffn_sizes))}; use one of {_divisors(common)}",
        )
    if model.delta and parallel.tp > 1:
        remedy = f"{model.family_name}'s delta nets are not split over tensor-parallel ranks; use 1"
        raise UserError("parallel.tp", parallel.tp, remedy)
    if model.delta and parallel.cp > 1:
        remedy = f"{model.family_name}'s delta nets read a sequence from its first token to its last; use 1"
        raise UserError("parallel.cp", parallel.cp, remedy)
    stages = layers_of_stages(model.num_layers, parallel.pp)
    if min(stages) < 1:
        fitting = [pp for pp in range(1, model.num_layers + 1) if min(layers_of_stages(model.num_layers, pp)) > 0]
        remedy = f"some stages would have none of the model's {model.num_layers} layers; use one of "
        raise UserError("parallel.pp", parallel.pp, remedy + ", ".join(map(str, fitting)))
    if parallel.vpp is not None and len(set(stages)) > 1:
        remedy = f"interleaved stages need equal ones; leave vpp out, or use a pp of {_divisors(model.num_layers)}"
        raise UserError("parallel.vpp", parallel.vpp, remedy)
    layers_per_rank = stages[0]
    if parallel.vpp is not None and layers_per_rank % parallel.vpp:
        raise UserError(
            "parallel.vpp",
            parallel.vpp,
            f"must divide the {layers_per_rank} layers of a pipeline rank; use one of {_divisors(layers_per_rank)}",
        )
    _check_experts(model, parallel)


def check_context(model: HFModel, tokens: int) -> None:
    """Refuse sequences longer than an attention window that the engine does not compute.

    Up to the window a windowed model is a plain causal one. Beyond it the trainer computes the window, but SGLang
    serves Mistral, Mixtral, Phi-3 and Qwen2 without, so that the two would be different models.

    Raises:
        UserError: the longest possible sequence (prompt and response) exceeds the model's window.
    """
    window = model.attention.window
    if window is not None and tokens > window and not model.family.engine.windows:
        raise UserError(
            "data.max_prompt_tokens + rollout.max_response_tokens",
            tokens,
            f"the model attends to {window} tokens only (sliding_window), but SGLang serves {model.family_name} "
            "without a window; sequences up to that length are supported: lower one of the two",
        )


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary's size in megatron: the next multiple of 8 tp. Padding rows are zero and never exported.

    A checkpoint keeps only the true rows, so the padding may differ from run to run.

    Example:
        >>> padded_vocab_size(151_665, 4)
        151680
    """
    multiple = _VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def _check_experts(model: HFModel, parallel: ParallelConfig) -> None:
    if model.experts is None:
        for name, value in (("ep", parallel.ep if parallel.ep > 1 else None), ("etp", parallel.etp)):
            if value is not None:
                raise UserError(f"parallel.{name}", value, f"{model.family_name} has no experts; leave it out")
        return
    if model.num_experts % parallel.ep:
        raise UserError(
            "parallel.ep",
            parallel.ep,
            f"must divide the model's {model.num_experts} experts; use one of {_divisors(model.num_experts)}",
        )
    if model.experts.ffn_size % parallel.expert_tp:
        fitting = _divisors(math.gcd(model.experts.ffn_size, parallel.tp))
        remedy = f"must divide the experts' ffn size {model.experts.ffn_size}; use one of {fitting}"
        raise UserError("parallel.etp", parallel.expert_tp, remedy)
    if parallel.tp > 1 and not parallel.sp:
        raise UserError("parallel.sp", False, "megatron-core trains experts at tp > 1 with sp only; set it true")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
