"""Compare the refined FP8 head with the exact one: log-probs, and gradients of every method's loss, on a CPU.

    python tools/head_error_table.py [METHOD ...]

Synthetic heads with a vocabulary of 32,768, heavy-tailed rows, outlier channels and planted candidates, at several
sharpnesses and temperatures (`CASES`). Old, reference and present log-probs are those of three weights that drifted
apart, each in its own mode, as in a run. FP8 products are simulated; see tools/fp8_error_study.py for what that leaves
out. Exits with 1 where a method is beyond the bounds at which a run would go back to the exact head.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from owpo_megatron.head import Head
from owpo_megatron.head.fp8_check import MAX_MEAN, MAX_NORM_GAP, MAX_P99, MIN_COSINE
from owpo_megatron.methods import Method, catalogue, make_method
from owpo_megatron.methods.prepare import prepared_in_microbatch
from owpo_megatron.types import LogpMode, TokenBatch

spec = importlib.util.spec_from_file_location("study", Path(__file__).with_name("fp8_error_study.py"))
assert spec and spec.loader
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

TOKENS, HIDDEN, VOCAB = 256, 1024, 32768
ROWS = 64  # of these tokens, for the gradients
MODES: tuple[LogpMode, ...] = ("exact", "fp8_refined")
CASES = {  # name: (factor of the hidden states, temperature)
    "peaked": (1.0, 1.0),
    "flat": (0.6, 1.0),
    "peaked, temperature 0.6": (1.0, 0.6),
}
DRIFT = {"old": 0.002, "ref": 0.02}  # of the weight, relative to its rows
WINDOW = (0.8, 1.2)
MAX_CHANGED = 1e-3  # fraction of tokens whose w changes its side of the window


@dataclass(frozen=True)
class Case:
    """Hidden states, a target each, and the head's weight now, at the old policy and at the reference."""

    h_TH: torch.Tensor
    target_T: torch.Tensor
    weights: dict[str, torch.Tensor]
    temperature: float

    @classmethod
    def make(cls, factor: float, temperature: float) -> Case:
        study.SYNTHETIC["table"] = (HIDDEN, VOCAB, TOKENS, 20.0)
        h_TH, weight_VH = study.synthetic("table")
        h_TH = (h_TH.float() * factor).bfloat16()
        generator = torch.Generator().manual_seed(2)
        p_TV = torch.softmax(h_TH.float() @ weight_VH.float().t() / temperature, 1)
        target_T = torch.multinomial(p_TV, 1, generator=generator)[:, 0]
        weights = {"now": weight_VH}
        for name, size in DRIFT.items():
            noise_VH = torch.randn(weight_VH.shape, generator=generator) * weight_VH.float().std(1, keepdim=True)
            weights[name] = (weight_VH.float() + size * noise_VH).bfloat16()
        return cls(h_TH, target_T, weights, temperature)

    def logp(self, mode: LogpMode) -> dict[str, torch.Tensor]:
        heads = {name: Head(weight_VH, self.temperature) for name, weight_VH in self.weights.items()}
        return {name: head.logprobs(self.h_TH, self.target_T, mode=mode).logp_T for name, head in heads.items()}

    def batch(self, mode: LogpMode, logp: dict[str, torch.Tensor]) -> TokenBatch:
        generator = torch.Generator().manual_seed(3)
        sample_T = torch.arange(ROWS) * 6 // ROWS
        return TokenBatch(
            old_logp_T=logp["old"][:ROWS], ref_logp_T=logp["ref"][:ROWS],
            advantage_T=torch.randn(ROWS, generator=generator),
            active_T=torch.rand(ROWS, generator=generator) < 0.8,
            mask_T=torch.rand(ROWS, generator=generator) < 0.95, sample_T=sample_T, num_samples=6,
            behaviour_logp_T=logp["old"][:ROWS], reward_S=torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]),
            group_S=torch.tensor([0, 0, 1, 1, 2, 2]), old_mode=mode, ref_mode=mode, now_mode=mode,
        )  # fmt: skip

    def gradients(self, mode: LogpMode, method: Method, logp: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """[dh, dW] of the method's loss."""
        leaves = (self.h_TH[:ROWS].clone().requires_grad_(), self.weights["now"].clone().requires_grad_())
        head, batch, target_T = Head(leaves[1], self.temperature), self.batch(mode, logp), self.target_T[:ROWS]
        if method.coupling != "token":
            now = head.logprobs(leaves[0].detach(), target_T, mode=mode)
            batch = prepared_in_microbatch(method, batch, now.logp_T, now.entropy_T)
        out = head.loss(leaves[0], target_T, batch, method, mode)
        return [one.double() for one in torch.autograd.grad(out.loss_sum, leaves)]


def main(names: list[str]) -> int:
    failed = False
    print(f"T={TOKENS} ({ROWS} for gradients), H={HIDDEN}, V={VOCAB}\n")
    print("| distribution | mean abs error of logp | p99 | tokens whose w changes its side |\n|-|-|-|-|")
    cases = {name: Case.make(*given) for name, given in CASES.items()}
    logps = {name: {mode: case.logp(mode) for mode in MODES} for name, case in cases.items()}
    for name, by_mode in logps.items():
        error_T = (by_mode["exact"]["now"] - by_mode["fp8_refined"]["now"]).abs()
        sides = [_side((logp["now"] - logp["ref"]).exp()) for logp in by_mode.values()]
        changed = (sides[0] != sides[1]).double().mean().item()
        mean, p99 = error_T.mean().item(), error_T.quantile(0.99).item()
        failed |= mean > MAX_MEAN or p99 > MAX_P99 or changed > MAX_CHANGED
        print(f"| {name} | {mean:.1e} | {p99:.1e} | {changed:.2%} |", flush=True)
    print("\n| method | 1 - cosine of dh | of dW | norm of dh off by | of dW |\n|-|-|-|-|-|")
    for name in names or sorted(catalogue()):
        method = make_method(name)
        worst = [0.0] * 4
        for which, case in cases.items():
            exact, found = (case.gradients(mode, method, logps[which][mode]) for mode in MODES)
            for place, (a, b) in enumerate(zip(exact, found, strict=True)):
                cosine = (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300)
                worst[place] = max(worst[place], 1 - cosine.item())
                worst[2 + place] = max(worst[2 + place], abs(b.norm() / a.norm() - 1).item())
        failed |= max(worst[:2]) > 1 - MIN_COSINE or max(worst[2:]) > MAX_NORM_GAP
        print(f"| {name} | " + " | ".join(f"{value:.1e}" for value in worst) + " |", flush=True)
    return int(failed)


def _side(w_T: torch.Tensor) -> torch.Tensor:
    return (w_T > WINDOW[0]).int() + (w_T > WINDOW[1]).int()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
