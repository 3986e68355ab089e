"""Base of all methods: a frozen dataclass in a file of its own, which declares its needs and returns a value per token.

The trainer owns everything around the value: masks, the correction for the engine, the divisor, the sums. No module of
this room imports torch at its top, so that the configuration can read the declarations.

Shape suffixes: C rows (response tokens) of one chunk, L tokens of one response, N samples of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from owpo_megatron.methods.normalise import group_advantages
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups, first_groups
from owpo_megatron.methods.statistic import Statistic
from owpo_megatron.types import Group, Ids, Origin, PromptRecord, ReferenceNeed, Rollout

if TYPE_CHECKING:
    import torch

Coupling = Literal["token", "sample", "group", "minibatch"]
"""Whose log-probs a token's value may depend on beside its own; for all but `token` they come through `prepare`."""
Divisor = Literal["tokens", "samples", "sample_sums"]
"""`tokens`: sum over tokens / number of tokens. `samples`: mean over a sample's tokens, then over samples.
`sample_sums`: sum over a sample's tokens, then mean over samples. All numbers are those of the whole minibatch."""
Groups = Literal["mixed", "all"]
"""Groups that are trained on: those with both right and wrong answers (dynamic sampling), or all."""
Kind = Literal["objective", "advantage", "sampling"]
"""What is the method's own: its value per token, how rewards become advantages, or which responses are drawn."""
Refresh = Literal["interval", "best_of_stage", "fixed"]


@dataclass(frozen=True)
class ChunkBatch:
    """Inputs of `terms` for one chunk: all [C], fp32 unless noted. Samples are not marked: `prepare` is for those."""

    old_logp_C: torch.Tensor  # sampling policy, through the trainer
    ref_logp_C: torch.Tensor  # reference policy; zeros where the method needs none
    advantage_C: torch.Tensor
    active_C: torch.Tensor  # bool, see Sample.active
    behaviour_logp_C: torch.Tensor | None = None  # sampling policy, as the engine reported it
    entropy_C: torch.Tensor | None = None  # of the current policy, detached; for methods with needs_entropy
    statistic_C: torch.Tensor | None = None  # of the current policy, detached; for methods with a `statistic`
    old_statistic_C: torch.Tensor | None = None  # the same of the sampling policy
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what `prepare` returned, broadcast to tokens
    external_C: torch.Tensor | None = None  # bool, written by an expert; None: no token of the microbatch is
    off_policy_C: torch.Tensor | None = None  # bool, with the engine's log-probs as old ones: stored, or under a hint


@dataclass(frozen=True)
class Terms:
    """Result of `terms` for the rows of a chunk.

    `metrics` are detached values per token ([C], or [C, K] for a histogram), float or bool. The trainer sums them over
    response tokens in float64; the log has their means over tokens (docs/metrics.md), without a final `_sum`.
    """

    value_C: torch.Tensor  # to be maximised; differentiable in logp_C
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    entropy_coef_C: torch.Tensor | None = None  # adds this times the token's entropy; for methods with entropy_bonus
    kl_coef_C: torch.Tensor | None = None  # adds this times KL(policy || teacher); for methods with whole_vocabulary


@dataclass(frozen=True)
class SampleView:
    """Inputs of `prepare` for one response that counts; all tensors [L], detached, complete."""

    now_logp_L: torch.Tensor  # current policy
    old_logp_L: torch.Tensor  # sampling policy
    ref_logp_L: torch.Tensor | None  # reference; None where the method needs none, or for samples that are not active
    entropy_L: torch.Tensor | None  # of the current policy; for methods with needs_entropy
    advantage_L: torch.Tensor
    reward: float
    group: int  # samples of one prompt have the same number
    active: bool
    now_statistic_L: torch.Tensor | None = None  # of the current policy; for methods with a `statistic`
    old_statistic_L: torch.Tensor | None = None  # the same of the sampling policy
    external: bool = False  # an expert wrote it
    off_policy: bool = False  # its old log-probs are the engine's: stored, or drawn under a hint


@dataclass(frozen=True)
class Turn:
    """One turn of a response, for methods whose advantages differ from turn to turn."""

    length: int  # generated tokens
    state: tuple[int, ...]  # tokens that the turn was shown: of the observation before it; () before the first one
    reward: float = 0.0  # that the environment gave for it


@dataclass(frozen=True)
class StepView:
    """Inputs of `advantages`: every sample of a step, in submission order.

    Samples with `counts` False (their verification failed, or they were cut off and masked) are not trained on.
    """

    reward_N: Sequence[float]  # after shaping
    counts_N: Sequence[bool]
    group_N: Sequence[int]
    length_N: Sequence[int]  # response tokens, observed ones left out, as in all that follows
    origin_N: Sequence[Origin] = ()  # who wrote the response
    past_N: Sequence[PromptRecord | None] = ()  # of its prompt, before this step; for methods with keeps_ledger
    prompt_N: Sequence[str] = ()  # ids
    right_N: Sequence[bool] = ()  # the verdicts
    part_N: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of the reward by name, before weights
    weights: Mapping[str, float] = field(default_factory=lambda: {"verdict": 1.0})  # of the parts that count
    behaviour_N: Sequence[Sequence[float]] = ()  # [L] log-probs by the engine; for methods with needs_tokens
    entropy_N: Sequence[torch.Tensor] = ()  # [L] of the sampling policy; for methods with needs_old_entropy
    pieces_N: Sequence[Sequence[str]] = ()  # [L] texts of the tokens; for methods with needs_text
    turns_N: Sequence[Sequence[Turn]] = ()  # of each response, one without an environment; with needs_tokens
    max_length: int = 0  # rollout.max_response_tokens
    progress: float = 0.0  # share of the run's steps that are done
    memory: dict[str, Any] = field(default_factory=dict)
    """What the method keeps from step to step, as plain JSON; it is in the checkpoints. The same on every rank."""

    @property
    def groups(self) -> list[list[int]]:
        """Indices of the samples that count, group by group; groups without any are left out."""
        members: dict[int, list[int]] = {}
        for index, (group, counts) in enumerate(zip(self.group_N, self.counts_N, strict=True)):
            if counts:
                members.setdefault(group, []).append(index)
        return list(members.values())


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. Subclass it as a frozen dataclass, declare, and write `terms`.

    Example:
        @dataclass(frozen=True)
        class Reinforce(Method):
            name = "reinforce"
            summary = "A log pi: the plain policy gradient."
            needs_old = False

            def terms(self, logp_C, batch):
                return Terms(batch.advantage_C * logp_C)
    """

    name: ClassVar[str] = ""
    """As in `algorithm.name`: lower-case letters, digits and underscores."""
    summary: ClassVar[str] = ""
    """One line: what is maximised, per token."""
    paper: ClassVar[str] = ""
    """Where it comes from, e.g. "arXiv:2402.03300"."""
    kind: ClassVar[Kind] = "objective"
    coupling: ClassVar[Coupling] = "token"
    divisor: ClassVar[Divisor] = "tokens"
    groups: ClassVar[Groups] = "all"
    reference: ClassVar[ReferenceNeed] = "none"
    needs_old: ClassVar[bool] = True
    needs_entropy: ClassVar[bool] = False
    needs_old_entropy: ClassVar[bool] = False
    """`advantages` gets the sampling policy's entropies: a pass of it before the step's updates."""
    needs_text: ClassVar[bool] = False
    """`advantages` gets the texts of the tokens: as `needs_tokens`."""
    needs_tokens: ClassVar[bool] = False
    """`advantages` gets `behaviour_N` and `turns_N`: every rank receives the tokens of the whole step."""
    entropy_bonus: ClassVar[bool] = False
    """`terms` returns an entropy coefficient per token."""
    uses_rewards: ClassVar[bool] = True
    """False: distillation without a verifier, where shaping rewards would have no effect."""
    max_teachers: ClassVar[int | None] = None
    """Teachers that a method with `reference = "teacher"` can learn from at a time; None: any number."""
    refresh: ClassVar[Refresh] = "interval"
    """Default of `reference.refresh`."""
    keeps_ledger: ClassVar[bool] = False
    """Reads what the run remembers of a prompt: `past_N` in `advantages`, `view.record` in `plan`."""
    draws_as_policy: ClassVar[bool] = True
    """False: the plan draws at other temperatures, so the engine's log-probs are not those of the policy."""
    takes_episodes: ClassVar[bool] = True
    """Its plan works with `environment`. False: it begins or continues responses, shows hints, or gives whole responses
    of others, none of which an episode has a place for."""
    needs_solutions: ClassVar[bool] = False
    """Reads the data's hints or solutions: `view.solutions` in `plan`."""
    needs_answers: ClassVar[bool] = False
    """Reads `view.solutions` for the prompts' answers alone, which every problem has."""
    stores_responses: ClassVar[int] = 0
    """Right responses per prompt that the run's pool keeps for `view.stored`."""
    idle_without_advantage: ClassVar[bool] = False
    """A token whose advantage is 0 has no gradient, whatever its log-probs: the head may leave it out beforehand."""
    needs_exact_head: ClassVar[bool] = False
    """A token's gradient is a difference of log-probs itself, beside which FP8's error is large."""
    keeps_old: ClassVar[bool] = False
    """Some of its responses keep the engine's log-probs as their old ones (stored, or drawn from another prompt)."""

    tis_cap: float | None = field(default=None, repr=False)
    """Truncated importance sampling: each token's value times min(pi_old(trainer) / pi(engine), cap); None: off."""
    entropy_coef: float = field(default=0.0, repr=False)
    """Entropy bonus: adds this times the policy's entropy to each token's value."""
    advantage_std: Literal["unbiased", "population"] = field(default="unbiased", repr=False)
    """Standard deviation by which the default `advantages` divide."""
    divide_by: Divisor | None = field(default=None, repr=False)
    """Divisor instead of the declared one; None: `divisor`."""

    @property
    def needs_reference(self) -> ReferenceNeed:
        """The declared `reference`; a method whose settings switch it off overrides this."""
        return self.reference

    @property
    def statistic(self) -> Statistic | None:
        """A further statistic of the vocabulary per token, of the current and of the sampling policy: for `prepare`, or
        for `terms` where the coupling is `token`."""
        return None

    @property
    def whole_vocabulary(self) -> bool:
        """`terms` returns a coefficient of the KL to the teacher over the whole vocabulary: its weights must be a slot
        of the policy's model."""
        return False

    @property
    def has_entropy_bonus(self) -> bool:
        """The loss has a gradient of the entropy."""
        return self.entropy_bonus or self.entropy_coef != 0

    @property
    def chosen_divisor(self) -> Divisor:
        """`divide_by`, or the declared `divisor`."""
        return self.divide_by or self.divisor

    @property
    def dynamic_sampling(self) -> bool:
        """Groups whose rewards are all equal are dropped and replaced."""
        return self.groups == "mixed"

    @property
    def forgetting(self) -> float:
        """Discount of the Beta counts in a prompt's record at each visit; 1: none."""
        return 1.0

    @property
    def first_counts(self) -> tuple[float, float]:
        """Beta counts (right, wrong) of a prompt before its first visit."""
        return 0.0, 0.0

    def plan(self, view: PlanView) -> Sequence[Ask]:
        """Asks for what to draw next in this step; nothing: the step's rollouts are complete. On global rank 0.

        Default: one group of `rollout.group_size` for each prompt, with dynamic sampling where `view.dynamic`.
        """
        return drawn_groups(view)

    def keep(self, view: PlanView) -> Sequence[Group]:
        """The groups to train on, out of `view.groups`; with fewer siblings or other rewards where a method wants."""
        return first_groups(view)

    def advantages(self, step: StepView) -> Sequence[float | torch.Tensor]:
        """One number, or one value per token [L], for each sample; only those that count are read.

        Default: (R - mean) / std within each group (see `group_advantages`).
        """
        return normalised_in_groups(step, self.advantage_std)

    def prepare(self, samples: Sequence[SampleView]) -> Sequence[Mapping[str, float | torch.Tensor]]:
        """Numbers, or values per token [L], for each sample, worked out of complete log-probs without gradient.

        For methods whose `coupling` is not `token`. Called before `terms` with the samples of a microbatch (`sample`)
        or of the whole minibatch, on every rank alike (`group`, `minibatch`). Every mapping has the same names; the
        result is `batch.given` in `terms`.
        """
        raise AssertionError(f"{self.name} has nothing to prepare")

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        """The value of each row, which may depend on that row alone, and metrics. Pure.

        Rows of one sample may come in several chunks, and one chunk holds rows of several samples: nothing in here may
        reduce over rows (`check_coupling` refuses it).
        """
        raise AssertionError(f"{type(self).__name__} has no terms")


def turns_of(rollout: Rollout, response_ids: Ids) -> list[Turn]:
    """The turns of a response with these tokens [L]."""
    if rollout.episode is None:
        return [Turn(len(response_ids), ())]
    turns: list[Turn] = []
    state: tuple[int, ...] = ()
    start = 0
    for span in rollout.episode.spans:
        end = start + span.length
        if span.generated:
            turns.append(Turn(span.length, state, span.reward))
        else:
            state = tuple(response_ids[start:end])
        start = end
    return turns


def normalised_in_groups(step: StepView, std: Literal["unbiased", "population"]) -> list[float]:
    """`group_advantages` of each group, over its samples that count; 0 for the others."""
    import torch

    out = [0.0] * len(step.reward_N)
    for indices in step.groups:
        reward_1G = torch.tensor([[step.reward_N[index] for index in indices]])
        for index, advantage in zip(indices, group_advantages(reward_1G, std)[0].tolist(), strict=True):
            out[index] = advantage
    return out
