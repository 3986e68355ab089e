"""Pack samples of different lengths into thd microbatches, identically on every rank.

Every rank knows the lengths of all samples of a minibatch and computes the same plan: samples go to the data-parallel
rank with the least work so far, longest first, and fill microbatches first-fit. The plan depends only on the lengths,
so that a log-prob pass and an update over the same samples see identical microbatches and give identical bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from owpo_megatron.mcore.context import Context, ContextPart
from owpo_megatron.mcore.router import RoutedSeqParams
from owpo_megatron.types import LogpMode, Sample, TokenBatch, tensor_of

NEGLIGIBLE = 0.05
"""Where attention adds less than this to the work on a token, tokens alone are balanced."""


@dataclass(frozen=True)
class Microbatch:
    """One packed forward pass of one data-parallel rank; position t predicts `target_T[t]`.

    With context parallelism the tensors on the device are this rank's part of the pack, [1, T / cp].

    Example: prompt (7, 8), response (9, 1) packs to tokens (7, 8, 9), targets (8, 9, 1), mask (False, True, True).
    """

    sample_indices: tuple[int, ...]  # into the minibatch's samples
    token_T: torch.Tensor  # [1, T] int64
    position_T: torch.Tensor  # [1, T] int64
    target_T: torch.Tensor  # [1, T] int64
    mask_T: torch.Tensor  # [1, T] bool, True where the target is a response token that the policy generated
    mask_on_host_T: torch.Tensor  # [T] bool, of the whole pack, to be read without waiting for the device
    packed_seq_params: RoutedSeqParams
    part: ContextPart | None = None  # None: this rank has the whole pack

    @property
    def length(self) -> int:
        """Tokens of the whole pack."""
        return len(self.mask_on_host_T)

    def own(self, value_T: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor of the whole pack."""
        return value_T if self.part is None else self.part.own(value_T)

    def without_experts(self) -> Microbatch:
        """The same pack for other weights, whose routers choose for themselves."""
        return replace(self, packed_seq_params=replace(self.packed_seq_params, expert_TLK=None))

    def responses(self, starts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of this rank's response tokens, [R], and each one's place in a vector of all samples', where
        those of sample i are from `starts[i]` to `starts[i + 1]`."""
        place_T = torch.zeros(self.length, dtype=torch.int64)
        ranges = [torch.arange(starts[index], starts[index + 1]) for index in self.sample_indices]
        place_T[self.mask_on_host_T] = torch.cat([place_T[:0], *ranges])
        row_R = self.own(self.mask_on_host_T).nonzero()[:, 0]
        return row_R, self.own(place_T)[row_R]


def plan_microbatches(
    lengths: Sequence[int],
    dp_size: int,
    max_tokens: int,
    multiple_of: int = 1,
    at_least: int = 1,
    attention: float = 0.0,
) -> list[list[list[int]]]:
    """Return the sample indices of every microbatch of every data-parallel rank: plan[dp_rank][microbatch].

    All ranks get the same number of microbatches (with empty ones at the end if needed): at least `at_least`, and a
    multiple of `multiple_of`. A sample longer than `max_tokens` gets a microbatch of its own.

    Args:
        attention: FLOPs of attention for each token of context, in those of a token's matrix multiplications. A sample
            of L tokens costs L (1 + attention L).
    """
    if attention * max(lengths, default=0) < NEGLIGIBLE:
        attention = 0.0
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    load = [0.0] * dp_size
    plan: list[list[list[int]]] = [[] for _ in range(dp_size)]
    room: list[list[int]] = [[] for _ in range(dp_size)]
    for index in order:
        dp_rank = load.index(min(load))
        load[dp_rank] += lengths[index] * (1 + attention * lengths[index])
        slot = next((slot for slot, free in enumerate(room[dp_rank]) if lengths[index] <= free), None)
        if slot is None:
            slot = len(plan[dp_rank])
            plan[dp_rank].append([])
            room[dp_rank].append(max_tokens)
        plan[dp_rank][slot].append(index)
        room[dp_rank][slot] -= lengths[index]
    count = max(at_least, *(len(microbatches) for microbatches in plan))
    count = -(-count // multiple_of) * multiple_of
    for microbatches in plan:
        microbatches.extend([] for _ in range(count - len(microbatches)))
    return plan


def padded_to_longest(lengths: Sequence[int], plan: Sequence[Sequence[int]], pad_to: int) -> int:
    """Return the length, a multiple of `pad_to`, to which all packs of a rank must be padded to be equally long.

    Example:
        >>> padded_to_longest([3, 5, 2], [[0, 2], [1], []], pad_to=2)
        6
        >>> padded_to_longest([], [[], []], pad_to=2)  # a rank without samples takes part with padding alone
        2
    """
    longest = max(sum(lengths[index] for index in indices) for indices in plan)
    return max(-(-longest // pad_to), 1) * pad_to


def packed_length(sample: Sample, multiple_of: int = 1) -> int:
    """Return the tokens that a sample takes in a pack: all but its last, which is only a target, and padding."""
    assert sample.prompt_ids, "the first response token needs a position to be predicted from"
    return -(-(len(sample.prompt_ids) + len(sample.response_ids) - 1) // multiple_of) * multiple_of


def build_microbatch(
    samples: Sequence[Sample],
    indices: Sequence[int],
    pad_to: int,
    device: torch.device,
    context: Context | None = None,
    host_lengths: bool = False,
) -> Microbatch:
    """Pack the chosen samples; the tail up to a multiple of `pad_to` is a masked sequence of its own.

    With context parallelism each sequence has padding at its end, which no token of it attends to, and `pad_to` is a
    multiple of what sequences are padded to.

    Args:
        host_lengths: keep the sequences' edges on the host, for layers that read them there: each reading would wait
            for the device. Transformer Engine's kernels want them on the device.
    """
    context = context or Context()
    rows = [_ids(samples[index]) for index in indices]
    lengths = [packed_length(samples[index], context.multiple) for index in indices]
    padding = -sum(lengths) % pad_to or (0 if rows else pad_to)
    token_T = torch.zeros(sum(lengths) + padding, dtype=torch.int64)
    target_T = torch.zeros_like(token_T)
    mask_T = torch.zeros_like(token_T, dtype=torch.bool)
    expert_TLK = _experts(samples, indices, lengths, padding)
    start = 0
    for index, row, length in zip(indices, rows, lengths, strict=True):
        sample, end = samples[index], start + len(row) - 1
        first = start + len(sample.prompt_ids) - 1
        token_T[start:end], target_T[start:end] = row[:-1], row[1:]
        mask_T[first:end] = True if sample.loss_mask is None else torch.tensor(sample.loss_mask)
        start += length
    if padding:
        lengths.append(padding)
    part = ContextPart(context, lengths) if context.size > 1 else None

    def own(value_T: torch.Tensor) -> torch.Tensor:
        return value_T if part is None else part.own(value_T)

    edges_on = torch.device("cpu") if host_lengths else device
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device=edges_on, dtype=torch.int32)
    longest = max(lengths)
    return Microbatch(
        sample_indices=tuple(indices),
        token_T=own(token_T)[None].to(device),
        position_T=own(torch.cat([torch.arange(length) for length in lengths]))[None].to(device),
        target_T=own(target_T)[None].to(device),
        mask_T=own(mask_T)[None].to(device),
        mask_on_host_T=mask_T,
        packed_seq_params=RoutedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            # padding belongs to its sequence, where causal attention never sees it; Transformer Engine asks for both
            cu_seqlens_q_padded=None if part is None else cu_seqlens,
            cu_seqlens_kv_padded=None if part is None else cu_seqlens,
            expert_TLK=None if expert_TLK is None else own(expert_TLK).to(device),
        ),
        part=part,
    )


def _experts(
    samples: Sequence[Sample], indices: Sequence[int], lengths: Sequence[int], padding: int
) -> torch.Tensor | None:
    """[T, layers, topk] experts of the pack's tokens; None where its samples have none.

    Padding repeats those of other tokens, so that no expert gets all of it.
    """
    known = [samples[index].experts for index in indices]
    if not any(known):
        return None
    rows = [one.tensor() for one in known if one is not None]
    assert len(rows) == len(known), "a pass replays the experts of all samples, or of none"
    told_TLK = torch.cat(rows)
    out_TLK = told_TLK[torch.arange(sum(lengths) + padding) % len(told_TLK)]
    start = 0
    for row, length in zip(rows, lengths, strict=True):
        assert len(row) <= length
        out_TLK[start : start + len(row)] = row
        start += length
    return out_TLK


def _ids(sample: Sample) -> torch.Tensor:
    """Prompt and response, int64."""
    return torch.cat([tensor_of(ids, torch.int64) for ids in (sample.prompt_ids, sample.response_ids)])


def token_batch(samples: Sequence[Sample], microbatch: Microbatch, whole: bool = False) -> TokenBatch:
    """Build the inputs of the loss for a microbatch: on the host, then moved, so that nothing waits for the device.

    Args:
        whole: all rows of the pack, where this rank has a part of them.
    """
    mask_T = microbatch.mask_on_host_T
    chosen = [samples[index] for index in microbatch.sample_indices]
    counts = torch.tensor([sample.loss_length for sample in chosen], dtype=torch.int64)

    def scatter(values_L: torch.Tensor) -> torch.Tensor:
        out_T = torch.zeros_like(mask_T, dtype=values_L.dtype)
        out_T[mask_T] = values_L.to(out_T.device)
        return out_T

    def per_sample(values: list, dtype: torch.dtype) -> torch.Tensor:
        return scatter(torch.tensor(values, dtype=dtype).repeat_interleave(counts))

    def per_token(rows: Sequence[float | torch.Tensor | None]) -> torch.Tensor:
        """Fill the pack from each sample's value: None (zeros), one number, or one value per token [L]."""
        known = [
            sample.in_loss(row).float()
            if isinstance(row, torch.Tensor) and row.dim()
            else torch.full((int(count),), float(row or 0))
            for sample, row, count in zip(chosen, rows, counts, strict=True)
        ]
        return scatter(torch.cat(known) if known else torch.zeros(0))

    def one_mode(modes: list[LogpMode]) -> LogpMode | None:
        assert len(set(modes)) <= 1, f"one pass returns log-probs of one mode, not {sorted(set(modes))}"
        return modes[0] if modes else None

    spent_old = all(sample.old_logp is not None for sample in chosen)
    assert spent_old or all(sample.old_logp is None for sample in chosen), "an old pass covers all samples or none"
    prepared = all(sample.given is not None for sample in chosen)
    names = sorted({name for sample in chosen for name in sample.given or ()})
    off_policy = [sample.keeps_old for sample in chosen]
    external = [sample.origin == "expert" for sample in chosen]
    old_statistics = [sample.old_statistic for sample in chosen]
    behaviour = [
        tensor_of(sample.behaviour_logp, torch.float32) if sample.behaviour_logp else None for sample in chosen
    ]
    batch = TokenBatch(
        old_logp_T=per_token([sample.old_logp for sample in chosen]) if spent_old else None,
        old_statistic_T=per_token(old_statistics) if any(one is not None for one in old_statistics) else None,
        ref_logp_T=per_token([sample.ref_logp for sample in chosen]),
        ref_is_old_T=per_sample([sample.ref_is_old for sample in chosen], torch.bool),
        advantage_T=per_token([sample.advantage for sample in chosen]),
        active_T=per_sample([sample.active for sample in chosen], torch.bool),
        mask_T=mask_T & ~per_sample([sample.masked for sample in chosen], torch.bool),
        row_mask_T=mask_T,
        sample_T=per_sample(list(range(len(chosen))), torch.int64),
        num_samples=len(chosen),
        behaviour_logp_T=per_token(behaviour),
        reward_S=torch.tensor([sample.reward for sample in chosen]),
        group_S=torch.tensor([sample.group for sample in chosen], dtype=torch.int64),
        given={name: per_token([(sample.given or {}).get(name) for sample in chosen]) for name in names}
        if prepared
        else None,
        external_T=per_sample(external, torch.bool) if any(external) else None,
        off_policy_T=per_sample(off_policy, torch.bool) if any(off_policy) else None,
        old_mode=one_mode([sample.old_mode for sample in chosen if sample.old_logp is not None]),
        ref_mode=one_mode([sample.ref_mode for sample in chosen if sample.ref_logp is not None]),
        now_mode=one_mode([sample.now_mode for sample in chosen if sample.given is not None]),
    )
    if microbatch.part is not None and not whole:
        batch = microbatch.part.own_batch(batch)
    return replace(batch, counted_R=batch.mask_T.nonzero()[:, 0]).to(microbatch.mask_T.device)
