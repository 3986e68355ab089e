"""Methods beside the functions of verl and TRL on the same random responses; run by test_peers.py in .venv-peers.

Prints {case: [ours, theirs]} as JSON: loss and gradients of objectives, advantages of each response.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from evaluated import Response, evaluate
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, PolicyLossConfig

from owpo_megatron.methods import Method, StepView, make_method

LENGTHS = [3, 1, 5, 2, 4, 5, 2, 3]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
WIDTH = max(LENGTHS)
MODES = {"tokens": "token-mean", "samples": "seq-mean-token-mean", "sample_sums": "seq-mean-token-sum"}


class Batch:
    """Eight responses in two groups, padded to one width as the peers want them."""

    def __init__(self, drift: float):
        generator = torch.Generator().manual_seed(4)
        count = len(LENGTHS)
        self.mask = torch.tensor([[float(place < length) for place in range(WIDTH)] for length in LENGTHS]).double()
        # a prompt of one token in front: what verl finds the response's last token by
        self.attention = torch.cat([torch.ones(count, 1).double(), self.mask], dim=1)
        self.old = -torch.rand(count, WIDTH, generator=generator).double() * 2.5 - 0.05
        self.now = self.old + drift * torch.randn(count, WIDTH, generator=generator).double()
        self.now = self.now.clamp(max=-0.01)
        self.advantage = torch.tensor([1.3, -0.6, -0.6, 0.4, -1.1, 0.9, 0.9, -0.7]).double()
        self.reward = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.0]).double()
        self.part = torch.tensor([0.2, 0.9, 0.1, 0.4, 0.4, 0.3, 0.8, 0.6]).double()
        self.entropy = torch.rand(count, WIDTH, generator=generator).double() * 3

    def responses(self) -> list[Response]:
        return [
            Response(
                self.now[index, :length].tolist(), self.old[index, :length].tolist(), float(self.advantage[index]),
                float(self.reward[index]), GROUPS[index], self.entropy[index, :length].tolist(),
            )
            for index, length in enumerate(LENGTHS)
        ]  # fmt: skip

    def step(self) -> StepView:
        return StepView(
            reward_N=self.reward.tolist(),
            counts_N=[True] * len(LENGTHS),
            group_N=GROUPS,
            length_N=LENGTHS,
            part_N={"verdict": self.reward.tolist(), "style": self.part.tolist()},
            weights={"verdict": 1.0, "style": 0.5},
            max_length=WIDTH,
        )

    def ours(self, method: Method) -> list[float]:
        found = evaluate(method, self.responses())
        count = sum(LENGTHS) if method.divisor == "tokens" else len(LENGTHS)
        return [found.loss, *(one / count for gradient in found.gradients for one in gradient)]

    def flat(self, loss: torch.Tensor, now: torch.Tensor) -> list[float]:
        (gradient,) = torch.autograd.grad(loss, now)
        rows = [-float(one) for index, length in enumerate(LENGTHS) for one in gradient[index, :length]]
        return [-float(loss.detach()), *rows]

    def verl(self, name: str, method: Method, policy_loss: dict[str, Any] | None = None, **fields: Any) -> list[float]:
        settings = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
        config = ActorConfig(**settings, policy_loss=PolicyLossConfig(loss_mode=name, **(policy_loss or {})), **fields)
        now = self.now.clone().requires_grad_()
        spread = self.advantage[:, None] * self.mask
        loss, _ = core_algos.get_policy_loss_fn(name)(
            old_log_prob=self.old, log_prob=now, advantages=spread, response_mask=self.mask,
            loss_agg_mode=MODES[method.divisor], config=config,
        )  # fmt: skip
        return self.flat(loss, now)

    def verl_advantage(self, function: Any, **more: Any) -> list[float]:
        rewards = torch.zeros_like(self.mask)
        rewards[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = self.reward
        found, _ = function(token_level_rewards=rewards, response_mask=self.mask, **more)
        return [float(one) for one in found[:, 0]]


def objectives() -> dict[str, list[list[float]]]:
    wide, near, found = Batch(0.6), Batch(2e-3), {}

    def compare(batch: Batch, method: Method, peer: str, **settings: Any) -> None:
        found[f"{method.name}, verl {peer}"] = [batch.ours(method), batch.verl(peer, method, **settings)]

    ranges = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    compare(wide, make_method("dual_clip", clip_high=0.28), "vanilla", **ranges, clip_ratio_c=3.0)
    compare(near, make_method("gspo"), "gspo", clip_ratio=3e-4, clip_ratio_low=3e-4, clip_ratio_high=4e-4)
    compare(wide, make_method("cispo", floor=0.8, cap=1.28), "cispo", **ranges)
    compare(wide, make_method("sapo"), "sapo", tau_pos=1.0, tau_neg=1.05)
    compare(wide, make_method("gmpo"), "geo_mean", clip_ratio=0.4, clip_ratio_low=0.4, clip_ratio_high=0.4)
    compare(wide, make_method("dro", beta=0.3), "dro", policy_loss={"dro_beta": 0.3})
    tv = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 20.0}
    compare(wide, make_method("dppo_tv"), "dppo_tv", **tv)
    kl = {"clip_ratio": 0.05, "clip_ratio_low": 0.04, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0}
    compare(wide, make_method("dppo_kl", clip_low=0.04, clip_high=0.05), "dppo_kl", **kl)
    # every candidate is taken, so that the order of the draw plays no part
    cov = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.2, "clip_cov_ub": 1.0}
    method = make_method("clip_cov", clip_high=0.28, share=1.0, low=0.2, high=1.0)
    compare(wide, method, "clip_cov", policy_loss=cov, **ranges)
    method = make_method("kl_cov", share=0.2, beta=0.7)
    compare(wide, method, "kl_cov", policy_loss={"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}, **ranges)
    compare(wide, make_method("gpg"), "gpg")
    return found


def advantages() -> dict[str, list[list[float]]]:
    batch, index = Batch(0.6), np.array(GROUPS)
    view = batch.step()
    group = {"index": index}
    config = {"config": AlgoConfig(gamma=1.0)}
    parts = {"verdict": batch.reward.numpy(), "style": batch.part.numpy()}
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "rloo": (core_algos.compute_rloo_outcome_advantage, group),
        "loop": (core_algos.compute_rloo_outcome_advantage, group),
        "opo": (core_algos.compute_opo_outcome_advantage, group),
        "reinforce_pp": (core_algos.compute_reinforce_plus_plus_outcome_advantage, config),
        "reinforce_pp_baseline": (core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage, group),
        "grpo_passk": (core_algos.compute_grpo_passk_outcome_advantage, group | config),
        "gpg": (core_algos.compute_gpg_outcome_advantage, group),
        "gdpo": (
            core_algos.compute_gdpo_outcome_advantage,
            group
            | {
                "config": {"gdpo_reward_keys": ["verdict", "style"], "gdpo_reward_weights": [1.0, 0.5]},
                "non_tensor_batch": parts,
                "batch": {"prompts": torch.zeros(len(LENGTHS), 1), "attention_mask": batch.attention.long()},
            },
        ),
    }  # fmt: skip
    found = {}
    for name, (function, more) in cases.items():
        ours = [float(one) for one in make_method(name).advantages(view)]
        found[f"{name}, verl advantage"] = [ours, batch.verl_advantage(function, **more)]
    centred = core_algos.compute_grpo_outcome_advantage
    ours = [float(one) * WIDTH for one in make_method("dr_grpo").advantages(view)]
    found["dr_grpo, verl advantage"] = [ours, batch.verl_advantage(centred, **group, norm_adv_by_std_in_grpo=False)]
    return found


def of_trl() -> dict[str, list[list[float]]]:
    from accelerate import Accelerator
    from trl.trainer.grpo_trainer import GRPOTrainer

    batch, found = Batch(0.2), {}
    rows = [(index, place) for index, length in enumerate(LENGTHS) for place in range(length)]
    weight = GRPOTrainer.get_gamma_weights(
        batch.advantage[:, None], batch.now - batch.old, batch.mask, None, k_pos=2.0, lambda_pos=3.0, k_neg=3.0,
        lambda_neg=2.0,
    )  # fmt: skip
    gradients = [one for gradient in evaluate(make_method("vespo"), batch.responses()).gradients for one in gradient]
    found["vespo, TRL weights"] = [gradients, [float(weight[i, 0] * batch.advantage[i]) for i, _ in rows]]
    kept = GRPOTrainer.get_off_policy_mask(batch.advantage[:, None], batch.now, batch.old, batch.mask, 0.05)
    method = make_method("off_policy_mask", delta=0.05, clip_low=0.99, clip_high=99.0)
    gradients = [float(one != 0) for gradient in evaluate(method, batch.responses()).gradients for one in gradient]
    found["off_policy_mask, TRL mask"] = [gradients, [float(kept[i, 0]) for i, _ in rows]]
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True))
    mask = GRPOTrainer.get_high_entropy_mask(trainer, batch.entropy, batch.mask, 0.8)
    method = make_method("entropy_mask", clip_low=0.99, clip_high=99.0)
    gradients = [float(one != 0) for gradient in evaluate(method, batch.responses()).gradients for one in gradient]
    found["entropy_mask, TRL mask"] = [gradients, [float(mask[i, t]) for i, t in rows]]
    return found


if __name__ == "__main__":
    json.dump(objectives() | advantages() | of_trl(), sys.stdout)
