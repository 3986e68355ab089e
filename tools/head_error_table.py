"""Compare the refined FP8 head with the exact one: log-probs, and gradients of every method's loss, on a CPU.

    python tools/head_error_table.py [METHOD ...] [--model FOLDER | --random-model] [--out FILE]

Synthetic heads with a vocabulary of 32,768, heavy-tailed rows, outlier channels and planted candidates, at several
sharpnesses and temperatures (`CASES`); or the head of a model on hidden states of its own samples. Old, reference and
present log-probs are those of three weights that drifted apart, each in its own mode, as in a run. FP8 products are
simulated; see tools/fp8_error_study.py for what that leaves out. Exits with 1 where a method is beyond the bounds at
which a run would go back to the exact head.

A method decides one number per row, d loss / d logp. The gradients of every row's log-prob are formed once per mode,
by the head, and weighted with these numbers, before any rounding to bfloat16: so the whole catalogue costs little more
than one method. A method whose entropy has a gradient, or that has a statistic of its own, goes through `Head.loss`.
FILE gets each row as it is known.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from owpo_megatron.head import Head
from owpo_megatron.head.fp8_check import MAX_MEAN, MAX_NORM_GAP, MAX_P99, MIN_COSINE
from owpo_megatron.methods import Method, catalogue, make_method
from owpo_megatron.methods.loss import MethodLoss
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
TEMPERATURES = {"temperature 1": (1.0, 1.0), "temperature 0.6": (1.0, 0.6)}  # of a model's own head
DRIFT = {"old": 0.002, "ref": 0.02}  # of the weight, relative to its rows
WINDOW = (0.8, 1.2)
MAX_CHANGED = 1e-3  # fraction of tokens whose w changes its side of the window


@dataclass(frozen=True)
class Rows:
    """Results of one mode for each row: log-prob, entropy, and the gradients of the log-prob."""

    logp_R: torch.Tensor
    entropy_R: torch.Tensor
    dlogits_RV: torch.Tensor
    dh_RH: torch.Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """Hidden states, a target each, and the head's weight now, at the old policy and at the reference."""

    h_TH: torch.Tensor
    target_T: torch.Tensor
    weights: dict[str, torch.Tensor]
    temperature: float

    @classmethod
    def make(cls, h_TH: torch.Tensor, weight_VH: torch.Tensor, factor: float, temperature: float) -> Case:
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

    @cache  # noqa: B019
    def rows(self, mode: LogpMode) -> Rows:
        h_RH, target_R = self.h_TH[:ROWS], self.target_T[:ROWS]
        head = Head(self.weights["now"], self.temperature)
        found = head.logprobs(h_RH, target_R, mode=mode)
        _, dlogits_RV, dh_RH = head.slopes(h_RH, target_R, torch.ones(ROWS), mode)
        return Rows(found.logp_T, found.entropy_T, dlogits_RV.double(), dh_RH.double())

    def slope(self, mode: LogpMode, method: Method, logp: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """d loss / d logp, [R]; None where the loss depends on the entropy or on a statistic of the vocabulary, too."""
        if method.statistic is not None:
            return None
        rows, batch = self.rows(mode), self.batch(mode, logp)
        if method.coupling != "token":
            batch = prepared_in_microbatch(method, batch, rows.logp_R, rows.entropy_R)
        found = MethodLoss(method, batch).add(slice(0, ROWS), rows.logp_R, rows.entropy_R)
        return None if found is None or found.dentropy_C is not None else found.dlogp_C.double()

    def compared(self, method: Method, logps: dict[LogpMode, dict[str, torch.Tensor]]) -> list[float]:
        """1 - cosine of dh and of dW, and what their norms are off by, between the two modes."""
        slopes = [self.slope(mode, method, logps[mode]) for mode in MODES]
        if any(slope is None for slope in slopes):
            exact, found = (self.gradients(mode, method, logps[mode]) for mode in MODES)
            products = [[(a * b).sum() for a, b in ((e, e), (f, f), (e, f))] for e, f in zip(exact, found, strict=True)]
        else:
            a_R, b_R = slopes
            pairs = (
                ("exact", a_R, "exact", a_R),
                ("fp8_refined", b_R, "fp8_refined", b_R),
                ("exact", a_R, "fp8_refined", b_R),
            )
            dh = [((x[:, None] * self.rows(m).dh_RH) * (y[:, None] * self.rows(n).dh_RH)).sum() for m, x, n, y in pairs]
            dw = [(x[:, None] * y[None] * self.gram(m, n)).sum() for m, x, n, y in pairs]
            products = [dh, dw]
        cosines = [1 - (ab / (aa * bb).sqrt().clamp(min=1e-300)).item() for aa, bb, ab in products]
        return cosines + [abs((bb / aa).sqrt().item() - 1) for aa, bb, _ in products]

    @cache  # noqa: B019
    def gram(self, one: LogpMode, other: LogpMode) -> torch.Tensor:
        """Inner products of the rows' gradients of W, each an outer product of its logits' gradient and its h."""
        h_RH = self.h_TH[:ROWS].double()
        return (self.rows(one).dlogits_RV @ self.rows(other).dlogits_RV.t()) * (h_RH @ h_RH.t())

    def gradients(self, mode: LogpMode, method: Method, logp: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """[dh, dW] of the method's loss, by the head in one piece."""
        leaves = (self.h_TH[:ROWS].clone().requires_grad_(), self.weights["now"].clone().requires_grad_())
        head, batch, target_T = Head(leaves[1], self.temperature), self.batch(mode, logp), self.target_T[:ROWS]
        if method.coupling != "token":
            now = head.logprobs(leaves[0].detach(), target_T, mode=mode, statistic=method.statistic)
            batch = prepared_in_microbatch(method, batch, now.logp_T, now.entropy_T, now.statistic_T)
        out = head.loss(leaves[0], target_T, batch, method, mode)
        return [one.double() for one in torch.autograd.grad(out.loss_sum, leaves)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="all of the catalogue where none is named")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="HF folder, in place of synthetic heads")
    parser.add_argument("--random-model", action="store_true", help="random weights of the shape of Qwen2.5-0.5B")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the tables to FILE, row by row")
    given = parser.parse_args()
    if given.out:
        given.out.write_text("")

    def say(line: str) -> None:
        print(line, flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(f"{line}\n")

    if given.model or given.random_model:
        count = -(-TOKENS // 17)  # sequences, of 17 tokens each
        head = study.real(given.model, count) if given.model else study.random_model(count)
    else:
        study.SYNTHETIC["table"] = (HIDDEN, VOCAB, TOKENS, 20.0)
        head = study.synthetic("table")
    which = TEMPERATURES if given.model or given.random_model else CASES
    cases = {name: Case.make(head[0][:TOKENS], head[1], *changes) for name, changes in which.items()}
    return int(_tables(cases, given.methods or sorted(catalogue()), say))


def _tables(cases: dict[str, Case], names: list[str], say: Callable[[str], None]) -> bool:
    """Whether anything is beyond the bounds."""
    failed = False
    vocab, hidden = next(iter(cases.values())).weights["now"].shape
    say(f"T={TOKENS} ({ROWS} for gradients), H={hidden}, V={vocab}\n")
    say("| distribution | mean abs error of logp | p99 | tokens whose w changes its side |\n|-|-|-|-|")
    logps = {name: {mode: case.logp(mode) for mode in MODES} for name, case in cases.items()}
    for name, by_mode in logps.items():
        error_T = (by_mode["exact"]["now"] - by_mode["fp8_refined"]["now"]).abs()
        sides = [_side((logp["now"] - logp["ref"]).exp()) for logp in by_mode.values()]
        changed = (sides[0] != sides[1]).double().mean().item()
        mean, p99 = error_T.mean().item(), error_T.quantile(0.99).item()
        failed |= mean > MAX_MEAN or p99 > MAX_P99 or changed > MAX_CHANGED
        say(f"| {name} | {mean:.1e} | {p99:.1e} | {changed:.2%} |")
    say("\n| method | 1 - cosine of dh | of dW | norm of dh off by | of dW |\n|-|-|-|-|-|")
    for name in names:
        method = make_method(name)
        worst = [
            max(values)
            for values in zip(*(case.compared(method, logps[which]) for which, case in cases.items()), strict=True)
        ]
        beyond = [value > bound for value, bound in zip(worst, 2 * [1 - MIN_COSINE] + 2 * [MAX_NORM_GAP], strict=True)]
        failed |= any(beyond) and not method.needs_exact_head
        cells = (f"**{value:.1e}**" if bad else f"{value:.1e}" for value, bad in zip(worst, beyond, strict=True))
        say(f"| {name} | " + " | ".join(cells) + " |")
    return failed


def _side(w_T: torch.Tensor) -> torch.Tensor:
    return (w_T > WINDOW[0]).int() + (w_T > WINDOW[1]).int()


if __name__ == "__main__":
    sys.exit(main())
