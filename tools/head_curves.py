"""Learning with the exact and with the refined FP8 head, simulated on a CPU: a bandit with 4,096 answers.

    python tools/head_curves.py [SEEDS]

16 contexts, each with four right answers of 4,096; a hidden state per context and the head's weight are all that is
trained, by OWPO with Adam, 40 steps of 16 x 16 answers, a swap of the reference every 10. The refined head computes 33
of 4,096 columns exactly, 0.8 %. Not covered: a language model, whose hidden states depend on each other.
"""

from __future__ import annotations

import statistics
import sys

import torch

from owpo_megatron.head import Head
from owpo_megatron.methods import make_method
from owpo_megatron.types import LogpMode, TokenBatch

VOCAB, HIDDEN, CONTEXTS, SIBLINGS, STEPS, EVERY = 4096, 512, 16, 16, 40, 10
LR = 2e-3
LAST = 10  # steps whose mean probability of a right answer is compared
SHARE = 5.0  # of right answers' rows in the hidden states: they are likely enough to be found by every context
MODES: tuple[LogpMode, ...] = ("exact", "fp8_refined")
T_OF_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.776}  # Student's, by number of seeds


def curve(seed: int, mode: LogpMode) -> list[float]:
    """Probability of a right answer before each step, mean over the contexts."""
    generator = torch.Generator().manual_seed(seed)
    weight_VH = torch.nn.Parameter((torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5).bfloat16().float())
    hidden_CH = torch.nn.Parameter(torch.randn(CONTEXTS, HIDDEN, generator=generator) * 2.5)
    right_C4 = torch.randint(0, VOCAB, (CONTEXTS, 4), generator=generator)
    with torch.no_grad():
        for context in range(CONTEXTS):  # right answers are likely enough to be found
            hidden_CH[context] += weight_VH[right_C4[context]].sum(0) * SHARE
    method, optimizer = make_method("owpo"), torch.optim.Adam([hidden_CH, weight_VH], lr=LR)
    reference_VH, reference_CH = weight_VH.detach().clone(), hidden_CH.detach().clone()
    context_T, expected = torch.arange(CONTEXTS).repeat_interleave(SIBLINGS), []
    for step in range(STEPS):
        h_TH, now_VH = hidden_CH[context_T].bfloat16(), weight_VH.bfloat16()
        with torch.no_grad():
            p_TV = torch.softmax(h_TH.float() @ now_VH.float().t(), 1)
            target_T = torch.multinomial(p_TV, 1, generator=generator)[:, 0]
        reward_T = (target_T[:, None] == right_C4[context_T]).any(1).float()
        expected.append(p_TV[::SIBLINGS].gather(1, right_C4).sum(1).mean().item())
        reward_CG = reward_T.view(CONTEXTS, SIBLINGS)
        mean_C1 = reward_CG.mean(1, keepdim=True)
        advantage_CG = (reward_CG - mean_C1) / (reward_CG.std(1, keepdim=True) + 1e-6)
        old_T = Head(now_VH.detach()).logprobs(h_TH.detach(), target_T, mode=mode).logp_T
        ref_T = Head(reference_VH.bfloat16()).logprobs(reference_CH[context_T].bfloat16(), target_T, mode=mode).logp_T
        count = len(context_T)
        batch = TokenBatch(
            old_logp_T=old_T, ref_logp_T=ref_T, advantage_T=advantage_CG.reshape(-1),
            active_T=((mean_C1 > 0) & (mean_C1 < 1))[:, 0].repeat_interleave(SIBLINGS),
            mask_T=torch.ones(count, dtype=torch.bool), sample_T=torch.arange(count), num_samples=count,
            behaviour_logp_T=old_T, reward_S=reward_T, group_S=context_T, old_mode=mode, ref_mode=mode, now_mode=mode,
        )  # fmt: skip
        out = Head(now_VH).loss(h_TH, target_T, batch, method, mode)
        optimizer.zero_grad()
        (out.loss_sum / out.count.clamp(min=1)).backward()
        optimizer.step()
        if step % EVERY == EVERY - 1:
            reference_VH, reference_CH = weight_VH.detach().clone(), hidden_CH.detach().clone()
    return expected


def main(seeds: int) -> None:
    columns = [f"{what}: {mode}" for what in ("all steps", f"last {LAST}") for mode in MODES]
    print("| seed | first step | " + " | ".join(columns) + " |\n|-|-|-|-|-|-|")
    pairs: dict[str, list[float]] = {"all steps": [], f"last {LAST}": []}
    for seed in range(seeds):
        exact, refined = (curve(seed, mode) for mode in MODES)
        row = [f"{seed}", f"{exact[0]:.3f}"]
        for name, start in zip(pairs, (0, -LAST), strict=True):
            means = [statistics.fmean(one[start:]) for one in (exact, refined)]
            pairs[name].append(means[1] - means[0])
            row += [f"{mean:.4f}" for mean in means]
        print("| " + " | ".join(row) + " |", flush=True)
    for name, differences in pairs.items() if seeds in T_OF_95 else ():
        half = T_OF_95[seeds] * statistics.stdev(differences) / seeds**0.5
        print(f"\npaired difference, {name}: {statistics.fmean(differences):+.4f}, 95 % interval +- {half:.4f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
