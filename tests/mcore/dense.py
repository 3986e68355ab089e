"""The oracle: three OWPO updates in one process with transformers and torch, sharing no code with the trainer.

Full softmax over the vocabulary, one sequence at a time, autograd, torch.optim.AdamW, global-norm clipping. The
objective is written out again from the paper (Eq. 5-7 and 2).
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from owpo_megatron.types import Sample


def sequence_logp(model: torch.nn.Module, sample: Sample, temperature: float = 1.0) -> torch.Tensor:
    """[L] log-probs of the response tokens."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    logits = model(ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(sample.prompt_ids) :, None])[:, 0]


def owpo_loss(model: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
    """Negated OWPO objective, mean over the unmasked response tokens."""
    total, tokens = torch.zeros(()), 0
    for sample in samples:
        if sample.masked:
            continue
        logp, advantage = sequence_logp(model, sample), sample.advantage
        ratio = (logp - sample.old_logp).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        if sample.active:
            delta = (1 if advantage > 0 else -1) * (logp.detach() - sample.ref_logp)
            surrogate = (-delta).exp().clamp(0.8, 1.2) * surrogate
        total, tokens = total - surrogate.sum(), tokens + len(logp)
    return total / tokens


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors as its checkpoint names them, which modules may not (experts in two tensors per layer)."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _with_rope(
    rope: torch.nn.Module, layer: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    return args, kwargs | {"position_embeddings": rope(args[0], kwargs["position_ids"])}


def train_dense(model_dir: Path, batches: list[list[Sample]], lr: float, warmup: int) -> dict:
    """{"losses", "grad_norms", "logp" of the first batch before training, "names" that a checkpoint holds,
    "start" and "weights" (HF name -> tensor, before and after)}."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    if model.config.model_type == "deepseek_v2":
        rope = model.config.rope_parameters
        for layer in model.model.layers:  # what transformers 5.12.1 leaves out (docs/families.md)
            layer.self_attn.scaling *= (1 + 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"])) ** 2
            layer.mlp.num_experts = model.config.n_routed_experts
    if model.config.model_type == "olmo3":
        plain = {"rope_type": "default", "rope_theta": model.config.rope_parameters["rope_theta"]}
        config = copy.deepcopy(model.config)
        config.rope_parameters = plain
        rope = type(model.model.rotary_emb)(config)
        for layer in model.model.layers:  # frequencies are scaled in the layers without a window alone
            if layer.self_attn.sliding_window:
                layer.register_forward_pre_hook(functools.partial(_with_rope, rope), with_kwargs=True)
    # a bias is a vector, also where a checkpoint has those of all experts together
    matrices = {name for name, param in model.named_parameters() if param.dim() > 1 and not name.endswith("bias")}
    decayed = [param for name, param in model.named_parameters() if name in matrices]
    plain = [param for name, param in model.named_parameters() if name not in matrices]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5)
    with torch.no_grad():
        logp = [sequence_logp(model, sample) for sample in batches[0]]
    start = checkpoint_tensors(model)
    losses, norms = [], []
    for update, samples in enumerate(batches):
        optimizer.zero_grad()
        loss = owpo_loss(model, samples)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (update + 1) / warmup)
        optimizer.step()
        losses.append(float(loss.detach()))
    weights = checkpoint_tensors(model)
    return {
        "losses": losses,
        "grad_norms": norms,
        "logp": logp,
        "names": list(start),
        "start": start,
        "weights": weights,
    }
