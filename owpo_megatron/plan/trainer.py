"""Memory of a trainer rank by use, in bytes. docs/plan.md has the same formulae in a table.

Buffers (parameters, gradients, optimizer, slots) follow megatron's distributed optimizer exactly but for its padding;
activations and the head's chunks are an upper estimate for the longest microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.config import Config
from owpo_megatron.families import Attention, HFModel, LatentAttention, layers_of_stages, padded_vocab_size
from owpo_megatron.head.backend import cuda_rows, torch_rows
from owpo_megatron.plan.parameters import Share, share_of_stage

GRADIENT = 4  # bytes: gradients are accumulated in float32
MOMENTS = {"float32": 8, "bfloat16": 4}  # Adam's two; steps are made in float32
MASTER = 4  # of weights below float32


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes on one rank of a pipeline stage.

    Example: 7.6 B parameters in bfloat16 at tp 4, dp 2 are 3.8 GB of weights, 7.6 of gradients, 11.4 of optimizer.
    """

    stage: int
    parameters: int  # how many
    weights: int
    gradients: int
    optimizer: int  # this rank's 1 / (dp cp), during steps
    optimizer_at_rest: int  # on the device between steps: less with optimizer.moments, none with optimizer.offload
    reference: int  # slots beside the policy's: the reference, teachers
    activations: int  # kept for the backward, microbatches in flight included
    head: int  # chunks of logits, only on the last stage
    sync: int  # buckets on their way to the engines
    host: int  # of the host, not of the device: offloaded slots and optimizer, and the best of a stage so far

    @property
    def lasting(self) -> int:
        """Bytes on the device all the time."""
        return self.weights + self.gradients + self.reference + self.optimizer_at_rest

    @property
    def total(self) -> int:
        """Peak on the device, at the worst moment; weights travel to the engines when no activations are alive, and
        steps are made then."""
        return self.lasting + max(self.activations + self.head, self.sync, self.optimizer - self.optimizer_at_rest)


def trainer_memory(config: Config, model: HFModel, cuda: bool, needs_reference: str) -> list[TrainerMemory]:
    """Memory of every pipeline stage.

    Args:
        cuda: Transformer Engine's layers and the CUDA head; False: megatron's local layers and the torch head.
        needs_reference: the method's ("none", "active", "all", "teacher").
    """
    return [_stage(config, model, cuda, needs_reference, stage) for stage in range(config.parallel.pp)]


def _stage(config: Config, model: HFModel, cuda: bool, needs_reference: str, stage: int) -> TrainerMemory:
    par = config.parallel
    share = share_of_stage(model, par, stage)
    weight = 4 if config.model.dtype == "float32" else 2
    slots, offloaded = _slots(config, needs_reference)
    offloads = config.optimizer.offload
    at_rest = _optimizer(config, share, weight, config.optimizer.moments)
    candidate = config.reference.refresh == "best_of_stage" and needs_reference != "none"
    return TrainerMemory(
        stage=stage,
        parameters=share.total,
        weights=share.total * weight,
        gradients=share.total * GRADIENT,
        optimizer=_optimizer(config, share, weight, "float32"),
        optimizer_at_rest=0 if offloads else at_rest,
        reference=slots * share.total * weight,
        activations=activation_bytes(config, model, cuda, stage),
        head=head_bytes(config, model, cuda, weight) if stage == par.pp - 1 else 0,
        sync=3 * (config.sync.bucket_mb << 20),  # one gathered, one packed, one on its way
        host=(offloaded + candidate) * share.total * weight + (at_rest if offloads else 0),
    )


def _optimizer(config: Config, share: Share, weight: int, moments: str) -> int:
    par = config.parallel
    each = MOMENTS[moments] + (MASTER if weight < 4 else 0)
    return each * share.dense // par.copies + each * share.expert // par.expert_copies


def _slots(config: Config, needs_reference: str) -> tuple[int, int]:
    """(slots on the device beside the policy's, slots in host memory, which visit the device one at a time)."""
    if needs_reference == "none":
        return 0, 0
    placements = [teacher.placement for teacher in config.teachers if teacher.path is not None]
    if not config.teachers:
        placements = [config.reference.placement]
    offloaded = placements.count("offloaded")
    return placements.count("resident") + (1 if offloaded else 0), offloaded


def activation_bytes(config: Config, model: HFModel, cuda: bool, stage: int = 0) -> int:
    """Kept for the backward by the layers of a stage, for the longest microbatch, times the microbatches in flight.

    A longer sample than tokens_per_microbatch is a microbatch of its own. One-forward-one-backward keeps up to
    pp - stage microbatches; interleaved stages a little more.
    """
    par = config.parallel
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = -(-max(config.optimizer.tokens_per_microbatch, longest) // par.cp)
    weight = 4 if config.model.dtype == "float32" else 2
    layers = layers_of_stages(model.num_layers, par.pp)[stage]
    hidden = model.hidden_size // (par.tp if par.sp else 1)
    one = layer_elements(model, par.tp, par.sp, cuda, par.expert_tp) * weight + _statistics(model, par.tp)
    number = int(config.recomputation.get("recompute_num_layers") or 1)
    if config.recomputation.get("recompute_granularity") != "full":
        kept, again = layers * one, 0
    elif config.recomputation.get("recompute_method") == "block":
        # so many layers of each chunk are computed again, one by one; the others keep everything
        again_layers = min(number * (par.vpp or 1), layers)
        kept, again = again_layers * hidden * weight + (layers - again_layers) * one, one
    else:
        # inputs of the recomputed pieces, and all of one piece while it is computed again
        kept, again = layers * hidden * weight // number, number * one
    in_flight = par.pp - stage if par.vpp is None else par.pp + (par.pp - 1) / par.vpp
    ends = 4 * model.hidden_size * weight  # embedding, last norm, gathered hidden states and their gradient
    return int(tokens * (kept * in_flight + again + ends))


def layer_elements(model: HFModel, tp: int, sp: bool, cuda: bool, etp: int | None = None) -> int:
    """Elements per token that one layer saves for its backward, of the weights' type.

    Transformer Engine: inputs and outputs of both norms (4 h), the fused q, k, v, what their norms and rope make of
    q and k, attention's output, gate and up (2 f) and their product (f). megatron's local layers, on a CPU, save more:
    what a norm divides, padded copies around attention, and two more of the MLP's (f each).
    """
    hidden = model.hidden_size // (tp if sp else 1)
    norms = (4 if cuda else 6) * hidden
    return norms + attention_elements(model.attention, tp, cuda) + mlp_elements(model, tp, cuda, etp or tp)


def attention_elements(attention: Attention | LatentAttention, tp: int, cuda: bool) -> int:
    """The same, of attention alone."""
    if isinstance(attention, LatentAttention):
        # compressed vectors before and after their norms; queries and keys before and after the rotary embedding
        compressed = 2 * (attention.sizes["q_rank"] + attention.sizes["kv_down"])
        q, kv, v = (attention.sizes[name] // tp for name in ("q", "kv_up", "v"))
        return compressed + 2 * q + kv + q + v + (0 if cuda else 2 * q + 2 * v)
    q, kv = attention.sizes["q"] // tp, attention.sizes["kv"] // tp
    qk_norm = (1 if cuda else 2) * (q + kv) if attention.qk_norm else 0
    return (q + 2 * kv) + qk_norm + (q + kv) + q + (0 if cuda else q + 2 * kv + q)


def mlp_elements(model: HFModel, tp: int, cuda: bool, etp: int) -> int:
    """The same, of the MLP alone; where some layers have experts, those with them."""
    ffn, experts = 3 if cuda else 5, model.experts
    if experts is None:
        return ffn * model.mlp.split_sizes[0] // tp
    # every chosen expert keeps a copy of the token, which the ranks that share the expert all have; not its answer:
    # the router's probability is multiplied with what goes into the last projection
    chosen = experts.router.chosen * (ffn * experts.ffn_size // tp + model.hidden_size * etp // tp)
    shared = ffn * experts.shared.ffn_size // tp + model.hidden_size if experts.shared else 0
    return chosen + shared


def _statistics(model: HFModel, tp: int) -> int:
    """Bytes per token and layer in float32, whatever the weights' type: attention's log-sum-exp, a norm's divisor."""
    return 4 * (model.attention.num_heads // tp + 2)


def head_bytes(config: Config, model: HFModel, cuda: bool, weight: int) -> int:
    """Logits of the head at a time: a float32 chunk and its gradient on a GPU, logits and their exponents on a CPU;
    never more rows than a microbatch has tokens. On a GPU also the rows' hidden states, their gradient and a chunk's
    part of it, and with an FP8 head the weight in FP8."""
    vocab = padded_vocab_size(model.vocab_size, config.parallel.tp) // config.parallel.tp
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = -(-max(config.optimizer.tokens_per_microbatch, longest) // config.parallel.cp)
    if not cuda:
        return min(torch_rows(vocab), tokens) * vocab * 8
    rows = min(cuda_rows(vocab), tokens)
    quantised = vocab * model.hidden_size if config.model.head == "fp8_refined" else 0
    hidden = (2 * tokens + rows) * model.hidden_size * weight
    return rows * vocab * (4 + weight) + hidden + quantised
