"""Every registered method, and deliberately coupled ones, through packing, `prepare` and the head: one chunk, chunks of
four rows, two splits into microbatches, with and without truncated importance sampling and an entropy bonus, against
dense float64 autograd of one minibatch in one piece.

The dense form is written here once more: sums sample by sample, coupled methods with the gradient flowing through all
log-probs. Not covered: ranks (tests/policy/test_method_updates.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from coupled_methods import (
    COUPLED,
    Deceived,
    RightAgainstWrong,
    SequenceRatio,
    UncertainTokens,
    distinct_objectives,
)
from head_oracle import dense_logp, dense_statistic

from owpo_megatron.errors import UserError
from owpo_megatron.head import Head
from owpo_megatron.mcore.packing import build_microbatch, token_batch
from owpo_megatron.methods import ChunkBatch, Method, Terms, check_coupling
from owpo_megatron.methods.loss import chunk_batch
from owpo_megatron.methods.prepare import prepared_in_minibatch
from owpo_megatron.types import LogpMode, Sample

CPU = torch.device("cpu")
HIDDEN, VOCAB, TEMPERATURE = 8, 37, 0.8
METHODS: list[Method] = [*distinct_objectives(), *COUPLED]
SPLITS = {
    "one microbatch": [range(7)],
    "split": [(0, 3), (1, 2, 4), (5, 6)],
    "with empty ones": [(), (6, 0, 5), (4, 3, 2, 1), ()],
}


CASES = [("one microbatch", None), ("one microbatch", 4), ("split", 4), ("split", 1), ("with empty ones", 1)]
# What the trainer adds to every method's value is tried on some of them: the head does it, not the method.
ADDED: tuple[dict[str, float], ...] = ({"tis_cap": 1.2}, {"entropy_coef": 0.1})
TRIED = {"dapo", "grpo", "opd", "owpo", "gspo", "real", "bapo", *(method.name for method in COUPLED)}
WITH_OPTIONS = [(method, {}) for method in METHODS]
WITH_OPTIONS += [(method, options) for method in METHODS if method.name in TRIED for options in ADDED]


class Minibatch:
    """Seven samples of three groups, one of them masked; a hidden state for every position of each."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight_VH = normal(VOCAB, HIDDEN) * 0.5
        self.samples: list[Sample] = []
        self.hidden: list[torch.Tensor] = []  # [prompt + L - 1, H] of each sample
        for index, length in enumerate((3, 1, 6, 2, 4, 5, 2)):
            response = tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())
            prompt = tuple(range(1 + index % 3))
            h = normal(len(prompt) + length - 1, HIDDEN)
            logp = dense_logp(h[len(prompt) - 1 :], self.weight_VH, torch.tensor(response))[0]
            self.hidden.append(h)
            self.samples.append(
                Sample(
                    prompt, response, advantage=(1.5, -0.7, 0.0, 0.9, -1.1, 0.4, -0.2)[index], active=index % 3 != 1,
                    behaviour_logp=tuple((logp + 0.3 * normal(length)).tolist()), old_logp=logp + 0.2 * normal(length),
                    ref_logp=logp + 0.3 * normal(length), masked=index == 3, reward=float(index in (0, 3, 5)),
                    group=(0, 0, 0, 1, 1, 2, 2)[index],
                )
            )  # fmt: skip

    def prepared(self, method: Method, samples: Sequence[Sample], mode: LogpMode = "exact") -> list[Sample]:
        """The samples as the trainer prepares them: of log-probs, entropies and statistics of all logits."""
        statistics = self.statistics(method, self.weight_VH)
        return prepared_in_minibatch(method, samples, *self.now(), mode, statistics)

    def now(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(log-probs, entropies) of each response."""
        found = [
            dense_logp(h[len(s.prompt_ids) - 1 :], self.weight_VH, torch.tensor(s.response_ids), TEMPERATURE)
            for h, s in zip(self.hidden, self.samples, strict=True)
        ]
        return [logp for logp, _ in found], [entropy for _, entropy in found]

    def statistics(self, method: Method, weight_VH: torch.Tensor) -> list[torch.Tensor] | None:
        """The method's own of each response; None if it has none."""
        if method.statistic is None:
            return None
        found = []
        for h, s in zip(self.hidden, self.samples, strict=True):
            rows = torch.log_softmax(h[len(s.prompt_ids) - 1 :] @ weight_VH.t() / TEMPERATURE, dim=1)
            logp = rows.gather(1, torch.tensor(s.response_ids)[:, None])[:, 0]
            found.append(dense_statistic(method.statistic, rows, logp))
        return found

    def with_old_statistics(self, method: Method) -> list[Sample]:
        """The samples with what another policy's pass would have found."""
        other_VH = self.weight_VH + 0.1 * torch.randn(
            self.weight_VH.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64
        )
        found = self.statistics(method, other_VH) or [None] * len(self.samples)
        return [replace(s, old_statistic=one) for s, one in zip(self.samples, found, strict=True)]

    def through_the_head(
        self, method: Method, split: Sequence[Sequence[int]], chunk_rows: int | None
    ) -> dict[str, torch.Tensor]:
        """Sums over the microbatches; dh of every position of every sample, in the samples' order."""
        samples = self.with_old_statistics(method)
        if method.coupling in ("group", "minibatch"):
            samples = self.prepared(method, samples)
        weight_VH = self.weight_VH.clone().requires_grad_()
        hidden = [h.clone().requires_grad_() for h in self.hidden]
        loss, count, kept = torch.zeros((), dtype=torch.float64), 0, 0
        for indices in split:
            microbatch = build_microbatch(samples, indices, 2, CPU)
            padding = microbatch.token_T.shape[1] - sum(len(hidden[index]) for index in indices)
            h_TH = torch.cat([*(hidden[index] for index in indices), torch.ones(padding, HIDDEN, dtype=torch.float64)])
            batch = in_float64(token_batch(samples, microbatch), samples, indices)
            out = Head(weight_VH, TEMPERATURE, chunk_rows=chunk_rows).loss(h_TH, microbatch.target_T[0], batch, method)
            if out.loss_sum.requires_grad:
                out.loss_sum.backward()
            loss, count = loss + out.loss_sum.detach(), count + int(out.count)
            kept += out.rows.gradient
        dh = torch.cat([torch.zeros_like(h) if h.grad is None else h.grad for h in hidden])
        return {"loss": loss, "count": torch.tensor(count), "dh": dh, "dweight": weight_VH.grad, "kept": kept}

    def densely(self, method: Method) -> dict[str, torch.Tensor]:
        weight_VH = self.weight_VH.clone().requires_grad_()
        hidden = [h.clone().requires_grad_() for h in self.hidden]
        found = [
            dense_logp(h[len(s.prompt_ids) - 1 :], weight_VH, torch.tensor(s.response_ids), TEMPERATURE)
            for h, s in zip(hidden, self.samples, strict=True)
        ]
        counted = [index for index, sample in enumerate(self.samples) if not sample.masked]
        factor = {index: tis_factor(self.samples[index], method.tis_cap) for index in counted}
        samples = self.with_old_statistics(method)
        values = dense_values(method, samples, counted, found, self.statistics(method, self.weight_VH))
        total, count = torch.zeros((), dtype=torch.float64), 0
        for index in counted:
            tokens = len(self.samples[index].response_ids)
            value = (values[index] * factor[index] + method.entropy_coef * found[index][1]).sum()
            total = total + (value / tokens if method.divisor == "samples" else value)
            count += tokens if method.divisor == "tokens" else 1
        gradients = torch.autograd.grad(-total, [weight_VH, *hidden], allow_unused=True)
        dh = torch.cat([torch.zeros_like(h) if g is None else g for g, h in zip(gradients[1:], hidden, strict=True)])
        return {"loss": -total.detach(), "count": torch.tensor(count), "dh": dh, "dweight": gradients[0]}


def in_float64(batch, samples: Sequence[Sample], indices: Sequence[int]):
    """Return the values that packing rounded to fp32, again from the samples."""

    def column(values: list[torch.Tensor]) -> torch.Tensor:
        out_T = torch.zeros(len(batch.row_mask_T), dtype=torch.float64)
        out_T[batch.row_mask_T] = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)
        return out_T

    chosen = [samples[index] for index in indices]
    given = None
    if batch.given is not None:
        names = {name for sample in chosen for name in sample.given or ()}
        given = {
            name: column([s.in_loss(torch.ones(len(s.response_ids)).double() * s.given[name]) for s in chosen])
            for name in names
        }
    old_statistics = [sample.in_loss(s) for sample in chosen if (s := sample.old_statistic) is not None]
    return replace(
        batch,
        old_statistic_T=column(old_statistics) if old_statistics else None,
        old_logp_T=column([sample.in_loss(sample.old_logp) for sample in chosen]),
        ref_logp_T=column([sample.in_loss(sample.ref_logp) for sample in chosen]),
        advantage_T=column([torch.full((s.loss_length,), s.advantage, dtype=torch.float64) for s in chosen]),
        behaviour_logp_T=column([s.in_loss(torch.tensor(s.behaviour_logp).double()) for s in chosen]),
        given=given,
    )


def tis_factor(sample: Sample, cap: float | None) -> torch.Tensor:
    if cap is None:
        return torch.ones(len(sample.response_ids), dtype=torch.float64)
    return (sample.old_logp - torch.tensor(sample.behaviour_logp).double()).exp().clamp(max=cap)


def dense_values(
    method: Method, samples: Sequence[Sample], counted: list[int], found: list[tuple[torch.Tensor, torch.Tensor]],
    statistics: list[torch.Tensor] | None = None,
) -> dict[int, torch.Tensor]:  # fmt: skip
    """The value of each token, through complete log-probs that carry the gradient."""
    if isinstance(method, SequenceRatio):
        out = {}
        for index in counted:
            ratio = (found[index][0] - samples[index].old_logp).mean().exp()
            advantage = samples[index].advantage
            bounded = ratio.clamp(1 - method.clip_low, 1 + method.clip_high)
            out[index] = torch.minimum(ratio * advantage, bounded * advantage) * torch.ones_like(found[index][0])
        return out
    if isinstance(method, RightAgainstWrong):
        out = {}
        for group in sorted({samples[index].group for index in counted}):
            own = [index for index in counted if samples[index].group == group]
            score = {index: found[index][0].sum() / len(found[index][0]) for index in own}
            right = [score[index] for index in own if samples[index].reward > 0]
            wrong = [score[index] for index in own if samples[index].reward == 0]
            total = torch.zeros((), dtype=torch.float64)
            if right and wrong:
                among_wrong = sum((one / method.tau).exp() for one in wrong) / len(wrong)
                total = sum(one - method.tau * among_wrong.log() for one in right) / len(right)
            tokens = sum(len(found[index][0]) for index in own)
            out |= {index: total / tokens * torch.ones_like(found[index][0]) for index in own}
        return out
    if isinstance(method, UncertainTokens):
        entropy = torch.cat([found[index][1].detach() for index in counted])
        least = sorted(entropy.tolist(), reverse=True)[round(method.share * len(entropy)) - 1]
        return {
            index: (found[index][0] - samples[index].old_logp).exp()
            * samples[index].advantage
            * (found[index][1].detach() >= least)
            for index in counted
        }
    if method.coupling != "token":
        return prepared_values(method, samples, counted, found, statistics)
    own = statistics or [None] * len(samples)
    return {index: alone(method, samples[index], *found[index], own[index]) for index in counted}


def prepared_values(
    method: Method, samples: Sequence[Sample], counted: list[int], found: list[tuple[torch.Tensor, torch.Tensor]],
    statistics: list[torch.Tensor] | None,
) -> dict[int, torch.Tensor]:  # fmt: skip
    """A coupled method of the catalogue: `prepare` on the whole minibatch at once, then `terms` token by token.

    What it prepares is compared with hand-worked numbers and autograd in tests/methods.
    """
    logps, entropies = ([pair[place].detach() for pair in found] for place in (0, 1))
    prepared = prepared_in_minibatch(method, samples, logps, entropies, statistics=statistics)
    return {index: alone(method, prepared[index], found[index][0], found[index][1]) for index in counted}


def alone(
    method: Method, sample: Sample, logp_L: torch.Tensor, entropy_L: torch.Tensor,
    statistic_L: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The value of each token, evaluated one token at a time."""
    every = torch.ones(len(logp_L), dtype=torch.bool)
    microbatch = build_microbatch([replace(sample, prompt_ids=(0,))], [0], 1, CPU)
    batch = in_float64(token_batch([replace(sample, prompt_ids=(0,))], microbatch), [sample], [0])
    given_L = entropy_L.detach() if method.needs_entropy else None
    own_L = statistic_L if method.coupling == "token" else None
    values = []
    for token in range(len(every)):
        here = slice(token, token + 1)
        rows = (None if one is None else one[here] for one in (given_L, own_L))
        row = chunk_batch(batch, here, logp_L[here], *rows)
        values.append(method.terms(logp_L[here], row).value_C)
    return torch.cat(values)


@pytest.mark.parametrize(("method", "options"), WITH_OPTIONS, ids=lambda one: getattr(one, "name", str(one)))
def test_every_method_and_coupled_ones_equal_dense(method: Method, options: dict[str, float]) -> None:
    method = replace(method, **options)
    if isinstance(method, (RightAgainstWrong, SequenceRatio)) and method.tis_cap:
        pytest.skip("its tokens share one value: a factor per token is another method than the dense form")
    minibatch = Minibatch()
    expected = minibatch.densely(method)
    assert expected["dh"].abs().max() > 1e-3 and expected["dweight"].abs().max() > 1e-3
    for name, chunk_rows in CASES:
        found = minibatch.through_the_head(method, SPLITS[name], chunk_rows)
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-9, atol=1e-10,
                msg=lambda text, where=(name, chunk_rows, key): f"{where}: {text}",
            )  # fmt: skip


@dataclass(frozen=True)
class Curious(Method):
    """A log pi, and an entropy bonus for the tokens of right answers alone."""

    name = "curious"
    summary = "A log pi + 0.3 max(A, 0) H"
    needs_old = False
    entropy_bonus = True

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return Terms(batch.advantage_C * logp_C, entropy_coef_C=0.3 * batch.advantage_C.clamp(min=0))


@pytest.mark.parametrize("everyones", [0.0, 0.1])
def test_an_entropy_coefficient_per_token_equals_dense(everyones: float) -> None:
    """The gradient goes through all logits; alone, and beside the scalar that every method has."""
    minibatch, method = Minibatch(), Curious(entropy_coef=everyones)
    weight_VH = minibatch.weight_VH.clone().requires_grad_()
    hidden = [h.clone().requires_grad_() for h in minibatch.hidden]
    total = torch.zeros((), dtype=torch.float64)
    for h, one in zip(hidden, minibatch.samples, strict=True):
        if not one.masked:
            logp, entropy = dense_logp(
                h[len(one.prompt_ids) - 1 :], weight_VH, torch.tensor(one.response_ids), TEMPERATURE
            )
            bonus = everyones + 0.3 * max(float(one.advantage), 0.0)
            total = total + (float(one.advantage) * logp + bonus * entropy).sum()
    gradients = torch.autograd.grad(-total, [weight_VH, *hidden], allow_unused=True)
    dh = torch.cat([torch.zeros_like(h) if g is None else g for g, h in zip(gradients[1:], hidden, strict=True)])
    for name, chunk_rows in CASES:
        found = minibatch.through_the_head(method, SPLITS[name], chunk_rows)
        torch.testing.assert_close(found["loss"], -total.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found["dh"], dh, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found["dweight"], gradients[0], rtol=1e-9, atol=1e-10)
    check_coupling(method)


def test_an_entropy_coefficient_that_is_not_declared_is_refused() -> None:
    @dataclass(frozen=True)
    class Silent(Curious):
        name = "silent"
        entropy_bonus = False

    with pytest.raises(UserError, match=r"method = silent: an entropy_coef_C of terms\(\) and `entropy_bonus = True`"):
        check_coupling(Silent())


def test_the_comparison_would_see_a_broken_seam() -> None:
    """A method that couples its chunk's rows: the same oracle finds it wrong as soon as chunks are smaller."""
    minibatch = Minibatch()
    whole = minibatch.through_the_head(Deceived(), SPLITS["one microbatch"], None)
    chunked = minibatch.through_the_head(Deceived(), SPLITS["one microbatch"], 4)
    error = (whole["dh"] - chunked["dh"]).abs().max() / whole["dh"].abs().max()
    assert error > 0.1


@pytest.mark.parametrize("method", [RightAgainstWrong(), UncertainTokens()], ids=lambda method: method.name)
def test_a_method_that_was_not_prepared_is_refused(method: Method) -> None:
    minibatch = Minibatch()
    microbatch = build_microbatch(minibatch.samples, range(7), 1, CPU)
    batch = token_batch(minibatch.samples, microbatch)
    with pytest.raises(TypeError, match=f"{method.name} couples the tokens of a {method.coupling}: the trainer calls"):
        Head(minibatch.weight_VH).loss(torch.cat(minibatch.hidden), microbatch.target_T[0], batch, method)


def test_log_probs_of_now_may_not_be_raw_fp8() -> None:
    minibatch, method = Minibatch(), UncertainTokens()
    samples = minibatch.prepared(method, minibatch.samples, "fp8_raw")
    microbatch = build_microbatch(samples, range(7), 1, CPU)
    with pytest.raises(TypeError, match="prepared log-probs are fp8_raw"):
        batch = token_batch(samples, microbatch)
        Head(minibatch.weight_VH).loss(torch.cat(minibatch.hidden), microbatch.target_T[0], batch, method)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_microbatch_without_samples_and_one_without_a_sample_that_counts(method: Method) -> None:
    minibatch = Minibatch()
    samples = [replace(sample, masked=True) for sample in minibatch.samples]
    if method.coupling in ("group", "minibatch"):
        samples = minibatch.prepared(method, samples)
    for indices in ((), (0, 2)):
        microbatch = build_microbatch(samples, indices, 2, CPU)
        h_TH = torch.randn(microbatch.token_T.shape[1], HIDDEN).double().requires_grad_()
        out = Head(minibatch.weight_VH).loss(h_TH, microbatch.target_T[0], token_batch(samples, microbatch), method)
        out.loss_sum.backward()
        assert out.loss_sum == 0 and out.count == 0 and not h_TH.grad.any() and out.metrics["tokens"] == 0
