"""The nouns that cross rooms, and the seams between the rooms.

Shape suffixes used throughout the project:
    P prompts of a step, G siblings of a prompt, N = P * G samples, T packed tokens of a microbatch, L tokens of one
    response, V vocabulary, H hidden size.

Data are frozen dataclasses; seams are protocols of a few methods whose docstring is the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]
ReferenceReason = Literal["init", "interval", "best_of_stage", "loaded"]
LogpMode = Literal["exact", "fp8_refined", "engine", "fp8_raw"]
"""How log-probs were computed, best first: by the trainer's head, or by a teacher's engine. See head/logprobs.py."""
ReferenceNeed = Literal["none", "active", "all", "teacher"]
"""Samples that need ref_logp: none; active ones; all; all, and a teacher's will do, which may come from an engine."""
VerdictReason = Literal["ok", "wrong", "no_answer", "parse_failed", "timeout", "crashed", "too_long"]


# ---------------------------------------------------------------------------------------------- rollouts
@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sent to an engine.

    Example:
        Prompt(id="cipher/17", token_ids=(4, 9, 2), text="a7q=", answer="x0k", domain="cipher")
    """

    id: str
    token_ids: tuple[int, ...]  # template applied
    text: str  # the same, readable
    answer: str  # what the verifier compares with
    domain: str = "default"  # routes to a verifier rule or a teacher
    source: int = 0  # which of data.sources it is from


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Log-probs are always those of logits / temperature, before top-p."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # texts that end a response and are part of it


@dataclass(frozen=True)
class SampleRequest:
    """One sample to draw; equal requests to an engine with equal weights draw from the same random stream."""

    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response, with the engine's own token ids and log-probs (never re-tokenised).

    Example:
        Rollout(prompt, response_ids=(11, 3, 1), behaviour_logp=(-0.1, -2.3, -0.0), policy_version=4,
                finish_reason="stop", seed=77)
    """

    prompt: Prompt
    response_ids: tuple[int, ...]  # [L], the stop token included when finish_reason is "stop"
    behaviour_logp: tuple[float, ...]  # [L], of the engine, at the sampling temperature
    policy_version: int  # weight version that sampled the last token
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True)
class GradingItem:
    """Input of a verifier for one response."""

    response: str  # detokenised, special tokens dropped
    answer: str
    domain: str = "default"
    truncated: bool = False  # the response hit the token limit
    form: Literal["response", "answer"] = "response"  # "answer": already extracted by the caller
    prompt: str = ""  # what the response continues; its end may have opened reasoning, a box or an answer line


@dataclass(frozen=True)
class Verdict:
    """Result of a verifier for one response; `reason` is "ok" exactly when `correct`."""

    correct: bool
    reason: VerdictReason
    seconds: float = 0.0
    detail: str = ""  # of a crash: what the rule raised


@dataclass(frozen=True)
class Group:
    """The G siblings of one prompt in submission order, with the verifier's rewards (shaped in trainer/rewards.py)."""

    rollouts: tuple[Rollout, ...]  # [G]
    verdicts: tuple[Verdict, ...]  # [G]
    rewards: tuple[float, ...]  # [G]


# ---------------------------------------------------------------------------------------------- training
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
    """One response with everything that a method needs; lists of L floats, or None where a pass was not spent."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # [L]
    advantage: float | torch.Tensor  # shared by all tokens, or one per token [L]
    active: bool  # takes part in the reweighting (top n_act of its group)
    behaviour_logp: tuple[float, ...]  # [L]
    old_logp: torch.Tensor | None = None  # [L] fp32; None: the policy's own, detached (one update per step)
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
    behaviour_logp_T: torch.Tensor | None = None  # sampling policy, as the engine reported it
    row_mask_T: torch.Tensor | None = None  # bool, rows that the head computes (mask_T and more); None: all
    reward_S: torch.Tensor | None = None  # of each sample, for methods that prepare; None: zeros
    group_S: torch.Tensor | None = None  # int64, equal for siblings; None: each alone
    given: Mapping[str, torch.Tensor] | None = None  # what the method prepared for its tokens; None: nothing yet
    old_mode: LogpMode | None = "exact"  # None: no sample here has such log-probs
    ref_mode: LogpMode | None = "exact"
    now_mode: LogpMode | None = "exact"  # of the log-probs that `given` was worked out of


class Verdicts(Protocol):
    """Verdicts of items that are being graded."""

    def done(self) -> bool: ...

    def result(self) -> list[Verdict]:
        """Waits for all of them; in submission order."""


class Verifier(Protocol):
    """Scores responses; never raises for a response's content, returns verdicts in submission order."""

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]: ...

    def submit(self, items: Sequence[GradingItem]) -> Verdicts:
        """Begin to grade while the caller goes on, e.g. collects further responses."""

    def close(self) -> None: ...


class Stateful(Protocol):
    """Return the part's state to save in a checkpoint, as plain JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class PromptStream(Stateful, Protocol):
    """An endless, seeded, resumable stream of training prompts."""

    def take(self, count: int) -> list[Prompt]: ...


class Progress(Protocol):
    """Called with (done, total) while long work goes on."""

    def __call__(self, done: int, total: int) -> None: ...


class Finished(Protocol):
    """Called with responses while others are still being drawn: those of the requests first, first + 1, ..."""

    def __call__(self, first: int, rollouts: Sequence[Rollout]) -> None: ...


class RolloutEngine(Protocol):
    """One or several inference servers behind one face. Used by global rank 0 only."""

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """Draw one response per request, in submission order. Raises EngineError when an engine stays dead.

        `finished` is called in the calling thread, exactly once for each request, in any order.
        """

    def weight_versions(self) -> list[int]:
        """The weight version that each engine reports."""

    def close(self) -> None: ...


class Policy(Protocol):
    """The trained model, sharded over ranks. Every method is collective over all trainer ranks."""

    @property
    def logp_mode(self) -> LogpMode:
        """Mode in which the last `logprobs` were computed."""

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """fp32 log-probs [L] of each sample's response tokens at the rollout temperature."""

    def logprobs_and_entropies(self, samples: Sequence[Sample]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The same, with the entropy [L] of each response token's distribution; one pass."""

    def update(self, samples: Sequence[Sample], method: Any) -> dict[str, Any]:
        """One optimizer step on these samples; returns metrics (loss, grad_norm, lr, and the method's).

        `method` is an owpo_megatron.methods.Method; this module imports no room.
        """

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, full tensor) of every weight, complete on global rank 0, in a fixed order."""


class Storable(Protocol):
    """Weights and optimizer on disk, sharded, in an existing empty folder. Every method is collective."""

    def save_weights(self, path: Path) -> None:
        """The weights alone."""

    def save(self, path: Path) -> None:
        """Everything that training goes on from, the reference included."""

    def restore(self, path: Path, reference_is_policy: bool) -> None:
        """Take over what `save` wrote."""


class LogprobSource(Protocol):
    """Weights that the policy is compared with: its reference, or a teacher. Every method is collective."""

    @property
    def logp_mode(self) -> LogpMode:
        """Mode in which the last `logprobs` were computed."""

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """fp32 log-probs [L] of each sample's response tokens."""

    def identity(self) -> str:
        """Return the identity of these weights, which a resumed run compares."""


class Reference(LogprobSource, Stateful, Protocol):
    """The policy that scales updates, or teachers in its place."""

    version: ReferenceVersion

    def is_policy(self) -> bool:
        """True while the reference has bit for bit the policy's weights (right after a swap, before an update)."""


class Swappable(Protocol):
    """A reference that follows the policy: the ratchet. Every method is collective over all trainer ranks."""

    candidate: Candidate | None  # the stage's best so far; its weights are in host memory

    def swap(self, step: int, reason: ReferenceReason) -> None:
        """Hard swap: the reference becomes the current policy, or the best of the stage. Never between a forward and
        its backward."""

    def restart_policy(self) -> None:
        """The policy goes on from the reference's weights, with a fresh optimizer."""

    def keep(self, candidate: Candidate) -> None:
        """The policy as it is now is the stage's best so far."""

    def restore_candidate(self, candidate: Candidate, state: Path) -> None:
        """Take a candidate up from disk. Call before the policy is restored: its parameters are the landing place."""


class Ranks(Protocol):
    """All trainer ranks, as code that runs on each of them sees them. Every method is collective."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that talks to engines, verifiers and the disk."""

    def barrier(self) -> None: ...

    def broadcast(self, value: Any) -> Any:
        """The main rank's object, on every rank."""


class StepLog(Protocol):
    """One line of metrics.jsonl in the making."""

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Adds the block's seconds to the phase."""

    def add(self, **values: Any) -> None: ...

    def add_update(self, sums: dict[str, Any]) -> None:
        """The sums of one optimizer step (Policy.update)."""


class Sink(Protocol):
    """Receives what a run writes down, on global rank 0, right after it is on disk."""

    def step(self, line: dict[str, Any]) -> None:
        """The metrics line of a finished step."""

    def evaluation(self, step: int, scores: dict[str, Any]) -> None: ...

    def checkpoint(self, step: int, folder: Path) -> None: ...


class WeightSync(Protocol):
    """Carries weights to every engine. `push` is collective; it returns when every engine reports `version`."""

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...

    def close(self) -> None: ...
