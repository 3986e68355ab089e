"""Nouns of an update: samples, packed tokens, and whose log-probs they carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from owpo_megatron.types.experts import RoutedExperts
from owpo_megatron.types.rollouts import Origin
from owpo_megatron.types.tokens import Ids, Values

if TYPE_CHECKING:
    import torch

ReferenceReason = Literal["init", "interval", "best_of_stage", "loaded"]
LogpMode = Literal["exact", "fp8_refined", "engine", "fp8_raw"]
"""How log-probs were computed, best first: by the trainer's head, or by a teacher's engine. See head/logprobs.py."""
ReferenceNeed = Literal["none", "active", "all", "teacher"]
"""Samples that need ref_logp: none; active ones; all; all, and a teacher's will do, which may come from an engine."""


@dataclass(frozen=True)
class ReferenceVersion:
    """Identity of the reference: saved in every checkpoint, recorded in every batch and metrics line.

    Example:
        ReferenceVersion(ref_id=2, source_step=160, reason="interval", hash="9f2c...")
    """

    ref_id: int
    source_step: int
    reason: ReferenceReason
    hash: str  # of the reference's weights; "" until it is first asked for


@dataclass(frozen=True)
class Candidate:
    """Weights that did best so far: the policy as it was after `step` steps, and its score."""

    step: int
    score: float


@dataclass(frozen=True)
class Sample:
    """One response with everything that a method needs; lists of L floats, or None where a pass was not spent.

    On ranks that do not pass it through the model, token ids and `behaviour_logp` are `Elsewhere`; log-probs have no
    elements where `home` is another rank.

    Tokens that `loss_mask` leaves out are context alone: the model reads them, but no row of the head, no value of a
    method and no divisor is of them. Values per token have L places all the same, and are never read there.
    """

    prompt_ids: Ids
    response_ids: Ids  # [L]; a rollout's, which are kept in one block (types/tokens.py)
    advantage: float | torch.Tensor  # shared by all tokens, or one per token [L]
    active: bool  # takes part in the reweighting (top n_act of its group)
    behaviour_logp: Values  # [L]; () of an expert, whose log-probs nobody knows
    old_logp: torch.Tensor | None = None  # [L] fp32; None: the policy's own, detached (one update per step)
    old_statistic: torch.Tensor | None = None  # [L]; None: none asked for, or the policy's own
    ref_logp: torch.Tensor | None = None  # [L] fp32; None: not needed, or equal to old (see `ref_is_old`)
    ref_is_old: bool = False  # the reference has the weights of the old policy: the ratio is exactly 1
    masked: bool = False  # out of the loss (its verification failed): its tokens count nowhere
    old_mode: LogpMode = "exact"  # how the trainer computed old_logp and ref_logp
    ref_mode: LogpMode = "exact"
    domain: str = "default"  # of its prompt: whose teacher it has
    reward: float = 0.0  # after shaping
    group: int = 0  # equal for siblings, within a step
    given: Mapping[str, float | torch.Tensor] | None = None  # what the method prepared: numbers, or [L]; None: nothing
    now_mode: LogpMode = "exact"  # of the current policy's log-probs that `given` was worked out of
    origin: Origin = "policy"
    keeps_old: bool = False  # behaviour_logp are its old log-probs: a pass of the policy does not replace them
    loss_mask: tuple[bool, ...] | None = None  # [L], True: the policy generated the token; None: all of them
    experts: RoutedExperts | None = None  # that its tokens go to, in passes of the policy; None: its routers choose
    row: int = 0  # its place in the step, by which its tokens are found where they are (trainer/exchange.py)
    home: int | None = None  # data-parallel rank that trains on it and needs its values per token; None: all do

    def __post_init__(self) -> None:
        assert self.loss_mask is None or len(self.loss_mask) == len(self.response_ids), "loss_mask has one per token"

    @property
    def loss_length(self) -> int:
        """Number of tokens that the policy generated."""
        return len(self.response_ids) if self.loss_mask is None else sum(self.loss_mask)

    def in_loss(self, value_L: torch.Tensor) -> torch.Tensor:
        """The values of the generated tokens alone."""
        return value_L if self.loss_mask is None else value_L[self._mask_L()]

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """[L] from the values of the generated tokens: zeros elsewhere."""
        if self.loss_mask is None:
            return value
        value_L = value.new_zeros(len(self.response_ids))
        value_L[self._mask_L()] = value
        return value_L

    def _mask_L(self) -> torch.Tensor:
        import torch

        return torch.tensor(self.loss_mask, dtype=torch.bool)


@dataclass(frozen=True)
class TokenBatch:
    """Per-token inputs of the loss for one packed microbatch: all [T], fp32 unless noted.

    Only response tokens have `mask_T` True; the values elsewhere are zeros and carry no meaning.
    """

    old_logp_T: torch.Tensor | None  # sampling policy, through the trainer; None: the policy's own (one update)
    ref_logp_T: torch.Tensor  # reference policy, through the trainer; zeros where the method needs none
    advantage_T: torch.Tensor
    active_T: torch.Tensor  # bool
    mask_T: torch.Tensor  # bool
    sample_T: torch.Tensor  # int64, index of the token's sample inside this microbatch, 0..S-1
    num_samples: int  # S, samples in this microbatch
    ref_is_old_T: torch.Tensor | None = None  # bool: the reference has the old policy's weights; None: nowhere
    old_statistic_T: torch.Tensor | None = None  # sampling policy's, where the method asked for one; None: the policy's
    behaviour_logp_T: torch.Tensor | None = None  # sampling policy, as the engine reported it
    row_mask_T: torch.Tensor | None = None  # bool, rows that the head computes (mask_T and more); None: all
    reward_S: torch.Tensor | None = None  # of each sample, for methods that prepare; None: zeros
    group_S: torch.Tensor | None = None  # int64, equal for siblings; None: each alone
    given: Mapping[str, torch.Tensor] | None = None  # what the method prepared for its tokens; None: nothing yet
    external_T: torch.Tensor | None = None  # bool, tokens that an expert wrote; None: none
    off_policy_T: torch.Tensor | None = None  # bool, tokens that keep the engine's log-probs as old ones; None: none
    count_S: torch.Tensor | None = None  # int64, tokens of each sample that count, on all ranks; None: those of mask_T
    counts_samples: bool = True  # False: another context-parallel rank counts the samples of this pack
    counted_R: torch.Tensor | None = None  # int64, places where mask_T is True; None: not listed
    old_mode: LogpMode | None = "exact"  # None: no sample here has such log-probs
    ref_mode: LogpMode | None = "exact"
    now_mode: LogpMode | None = "exact"  # of the log-probs that `given` was worked out of

    def to(self, device: torch.device) -> TokenBatch:
        """The batch with its values per token on the device; those per sample stay on the host, which reads them."""
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if (name.endswith("_T") or name == "counted_R") and value is not None
        }
        given = None if self.given is None else {name: value.to(device) for name, value in self.given.items()}
        return replace(self, **moved, given=given)
