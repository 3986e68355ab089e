"""Observed tokens of an episode, in every registered method: context of the model, and nothing else.

Every response of the seam's minibatch is taken apart and tokens that the policy did not generate are put in between,
with hidden states of their own and values that would poison whatever reads them. Loss, divisor and gradients must be
those of dense float64 autograd over the generated tokens alone: the same episode as one turn. That the model itself
reads the observations, on any number of ranks: tests/policy/test_episode_updates.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_seam import CASES, CPU, HIDDEN, METHODS, SPLITS, Minibatch

from owpo_megatron.mcore.packing import build_microbatch, token_batch
from owpo_megatron.methods import Method
from owpo_megatron.types import Sample

# Observed tokens before generated token 1, 2, ... of each response; the last number: behind its end.
OBSERVED = ((0, 2, 0, 1), (0, 1), (0, 0, 3, 0, 1, 0, 0), (0, 1, 2), (0, 0, 0, 0, 0), (0, 4, 0, 0, 0, 1), (0, 1, 0))
POISON = float("nan")


class Episodes(Minibatch):
    """The seam's minibatch, with observations in its responses."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = Minibatch()
        self.generated: list[list[int]] = []  # of each sample: rows of its hidden states that a loss may be of
        for index, (sample, h) in enumerate(zip(self.alone.samples, self.alone.hidden, strict=True)):
            mask = [flag for gap in OBSERVED[index] for flag in (*[False] * gap, True)][:-1]
            first = len(sample.prompt_ids) - 1
            rows = [*range(first), *(first + place for place, flag in enumerate(mask) if flag)]
            spread = torch.full((first + len(mask), HIDDEN), 7.0, dtype=torch.float64)
            spread[rows] = h
            self.hidden[index] = spread
            self.generated.append(rows)
            self.samples[index] = self.with_observations(sample, tuple(mask))

    def with_observations(self, sample: Sample, mask: tuple[bool, ...]) -> Sample:
        def poisoned(value_L: torch.Tensor) -> torch.Tensor:
            out = torch.full((len(mask),), POISON, dtype=value_L.dtype)
            out[torch.tensor(mask)] = value_L
            return out

        ids = iter(sample.response_ids)
        return replace(
            sample,
            response_ids=tuple(next(ids) if flag else 36 for flag in mask),
            behaviour_logp=tuple(poisoned(torch.tensor(sample.behaviour_logp, dtype=torch.float64)).tolist()),
            old_logp=poisoned(sample.old_logp),
            ref_logp=poisoned(sample.ref_logp),
            loss_mask=mask,
        )

    def now(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return them as the policy does: [L], zero where it generated nothing."""
        logps, entropies = self.alone.now()
        pairs = list(zip(self.samples, logps, entropies, strict=True))
        return [one.spread(logp) for one, logp, _ in pairs], [one.spread(entropy) for one, _, entropy in pairs]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_sees_the_generated_tokens_alone(method: Method) -> None:
    episodes = Episodes()
    expected = episodes.alone.densely(method)
    bounds = torch.tensor([0, *(len(h) for h in episodes.hidden)]).cumsum(0).tolist()
    rows = [start + row for start, own in zip(bounds, episodes.generated, strict=False) for row in own]
    for name, chunk_rows in CASES[1:3]:
        found = episodes.through_the_head(method, SPLITS[name], chunk_rows)
        observed = torch.ones(len(found["dh"]), dtype=torch.bool)
        observed[rows] = False
        assert observed.sum() == sum(map(sum, OBSERVED)) and not found["dh"][observed].any()
        found["dh"] = found["dh"][rows]
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-9, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_the_head_computes_the_rows_of_generated_tokens_alone() -> None:
    samples = Episodes().samples
    microbatch = build_microbatch(samples, range(7), 2, CPU)
    batch = token_batch(samples, microbatch)
    assert batch.row_mask_T is not None
    assert int(batch.row_mask_T.sum()) == sum(len(one.response_ids) for one in Minibatch().samples)
    assert microbatch.token_T.shape[1] == 2 * -(-sum(len(h) for h in Episodes().hidden) // 2)


def test_a_mask_that_leaves_nothing_out_changes_no_bit() -> None:
    plain = Minibatch().samples
    whole = [replace(one, loss_mask=(True,) * len(one.response_ids)) for one in plain]
    batches = [token_batch(samples, build_microbatch(samples, range(7), 2, CPU)) for samples in (plain, whole)]
    for name, ours in vars(batches[0]).items():
        theirs = vars(batches[1])[name]
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, name


def test_a_mask_of_another_length_is_no_sample() -> None:
    with pytest.raises(AssertionError, match="loss_mask has one per token"):
        replace(Minibatch().samples[0], loss_mask=(True,))
