"""Nouns of a rollout: prompts, responses, episodes, verdicts, groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from owpo_megatron.types.experts import RoutedExperts
from owpo_megatron.types.tokens import Ids, Values

FinishReason = Literal["stop", "length", "abort"]
Origin = Literal["policy", "baseline", "expert", "replay"]
"""Who wrote a response: the policy in this step (for a `baseline`: its reward is wanted, it is not trained on), someone
else, or the policy in an earlier step."""
Ended = Literal["done", "turns", "tokens", "seconds", "failed"]
"""Why an episode ended: its environment ended it, a limit was reached, or its environment failed."""
VerdictReason = Literal["ok", "wrong", "no_answer", "parse_failed", "timeout", "crashed", "too_long"]


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
    prefix: int = 0  # last tokens of token_ids that begin the response already: given, graded, not trained on
    messages: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (role, text), for an environment

    def begun(self, tokens: Sequence[int]) -> Prompt:
        """The prompt with a response that these tokens begin."""
        if not tokens:
            return self
        return replace(self, token_ids=(*self.token_ids, *tokens), prefix=self.prefix + len(tokens))


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Log-probs are always those of logits / temperature, before top-p."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # texts that end a response and are part of it
    experts: bool = False  # each response has the experts that it was routed to


@dataclass(frozen=True)
class SampleRequest:
    """One sample to draw; equal requests to an engine with equal weights draw from the same random stream."""

    prompt: Prompt
    seed: int
    sampling: Sampling | None = None  # of this sample; None: that of the call
    session: int | None = None  # requests of one session go to the engine that keeps their prefix; None: to any


@dataclass(frozen=True)
class Span:
    """A stretch of an episode's response: what the policy generated in one turn, or what it was shown in between.

    Example:
        Span(12, policy_version=4), Span(30, generated=False, calls=1), Span(9, policy_version=4, reward=1.0)
    """

    length: int  # tokens
    generated: bool = True
    policy_version: int | None = None  # weights that generated it; None: observed
    reward: float = 0.0  # that the environment gave for this turn
    calls: int = 0  # tool calls that an observed span answers
    errors: int = 0  # of these: failed


@dataclass(frozen=True)
class Episode:
    """Turns of a response, and how its environment judged it.

    Attributes:
        spans: in order; together they are the response. A generated one begins it.
        judgement: None: the environment gave no reward; the verifier's rule judges the last turn.
        detail: how its environment failed.
    """

    spans: tuple[Span, ...]
    ended: Ended = "done"
    judgement: Judgement | None = None
    detail: str = ""

    @property
    def turns(self) -> tuple[Span, ...]:
        """The generated spans."""
        return tuple(span for span in self.spans if span.generated)


@dataclass(frozen=True)
class Rollout:
    """One sampled response, with the engine's own token ids and log-probs (never re-tokenised).

    Example:
        Rollout(prompt, response_ids=(11, 3, 1), behaviour_logp=(-0.1, -2.3, -0.0), policy_version=4,
                finish_reason="stop", seed=77)
    """

    prompt: Prompt
    response_ids: Ids  # [L], the stop token included when finish_reason is "stop"; engines give TokenIds
    behaviour_logp: Values  # [L], of the engine (0: observed), at the sampling temperature; () of an expert
    policy_version: int  # weight version that sampled the last token
    finish_reason: FinishReason
    seed: int
    origin: Origin = "policy"
    keeps_old: bool = False  # behaviour_logp are the old log-probs: the policy at the step's start did not write it so
    trained_ids: tuple[int, ...] | None = None  # prompt tokens to train with; None: those of `prompt`
    versions: tuple[tuple[int, int], ...] = ()  # (weight version, tokens that it sampled), in order; (): one for all
    episode: Episode | None = None  # None: one turn without an environment
    experts: RoutedExperts | None = None  # that the engine chose for prompt and response; None: not asked for
    verdict: Verdict | None = field(default=None, compare=False)  # of the rollout worker; None: it is to be graded

    @property
    def loss_mask(self) -> tuple[bool, ...] | None:
        """[L], True: the policy generated the token; None: it generated all of them."""
        if self.episode is None:
            return None
        return tuple(span.generated for span in self.episode.spans for _ in range(span.length))

    @property
    def generated_length(self) -> int:
        """Number of tokens that the policy generated."""
        return len(self.response_ids) if self.episode is None else sum(span.length for span in self.episode.turns)

    @property
    def judgement(self) -> Judgement | None:
        """The environment's; None: there is none, or it gave no reward."""
        return None if self.episode is None else self.episode.judgement

    @property
    def known_verdict(self) -> Verdict | None:
        """The rollout worker's, or the environment's; None: the verifier's rule judges the response."""
        if self.verdict is None and self.judgement is not None:
            return Verdict.of(self.judgement, 0.0)
        return self.verdict

    @property
    def answer_ids(self) -> Ids:
        """Tokens of the last turn, which a verifier's rule judges."""
        if self.episode is None:
            return self.response_ids
        end = len(self.response_ids)
        for span in reversed(self.episode.spans):
            if span.generated:
                return self.response_ids[end - span.length : end]
            end -= span.length
        return ()

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(weight version, tokens) in order.

        Example:
            >>> rollout = Rollout(Prompt("a", (1,), "", ""), (5, 6, 7), (-0.1, -0.2, -0.3), 4, "stop", 0)
            >>> rollout.spans, replace(rollout, versions=((3, 2), (4, 1))).spans
            (((4, 3),), ((3, 2), (4, 1)))
        """
        if self.episode is not None:
            return tuple((span.policy_version or 0, span.length) for span in self.episode.turns)
        return self.versions or ((self.policy_version, len(self.response_ids)),)


@dataclass(frozen=True)
class GradingItem:
    """Input of a verifier for one response."""

    response: str  # detokenised, special tokens dropped
    answer: str
    domain: str = "default"
    truncated: bool = False  # the response hit the token limit
    form: Literal["response", "answer"] = "response"  # "answer": already extracted by the caller
    prompt: str = ""  # what the response continues; its end may have opened reasoning, a box or an answer line
    verdict: Verdict | None = None  # that is known already (verifiers/known.py); no rule is asked

    @classmethod
    def of(cls, rollout: Rollout, decode: Callable[[Sequence[int]], str], text: bool = False) -> GradingItem:
        """Make a verifier's input out of a response.

        Args:
            decode: token ids to text.
            text: decode the response even where its verdict is known.
        """
        prompt, verdict = rollout.prompt, rollout.known_verdict
        begun = prompt.token_ids[len(prompt.token_ids) - prompt.prefix :]
        return cls(
            response=decode((*begun, *rollout.answer_ids)) if text or verdict is None else "",
            answer=prompt.answer,
            domain=prompt.domain,
            truncated=rollout.finish_reason == "length",
            prompt=prompt.text,
            verdict=verdict,
        )


@dataclass(frozen=True)
class Judgement:
    """Result of a rule for one response where a reason alone is not all."""

    reason: VerdictReason
    score: float | None = None  # a graded reward; None: 1 or 0
    parts: Mapping[str, float] | None = None  # further rewards by name, for `reward.weights`
    detail: str = ""  # what else there is to report


@dataclass(frozen=True)
class Verdict:
    """Result of a verifier for one response; `reason` is "ok" exactly when `correct`."""

    correct: bool
    reason: VerdictReason
    seconds: float = 0.0
    detail: str = ""  # of a crash: what the rule raised
    score: float | None = None  # a graded reward instead of 1 or 0
    parts: Mapping[str, float] | None = None  # further rewards by name

    @classmethod
    def of(cls, result: VerdictReason | Judgement, seconds: float, detail: str = "") -> Verdict:
        """The verdict for a rule's result."""
        if isinstance(result, Judgement):
            return cls(
                result.reason == "ok", result.reason, seconds, detail or result.detail, result.score, result.parts
            )
        return cls(result == "ok", result, seconds, detail)

    @property
    def reward(self) -> float:
        """The score, or 1 or 0."""
        return float(self.correct) if self.score is None else self.score


@dataclass(frozen=True)
class Group:
    """The G siblings of one prompt in submission order, with the verifier's rewards (shaped in trainer/rewards.py)."""

    rollouts: tuple[Rollout, ...]  # [G]
    verdicts: tuple[Verdict, ...]  # [G]
    rewards: tuple[float, ...]  # [G]
    past: PromptRecord | None = None  # of the prompt, before this step; None: its first visit, or no ledger is kept


@dataclass(frozen=True)
class PromptRecord:
    """Memory of a prompt from the steps that drew it (trainer/ledger.py).

    Example:
        PromptRecord(visits=2, responses=16, mean=0.25, squares=3.0, last_step=40, right=4.0, wrong=12.0)
    """

    visits: int  # steps
    responses: int  # that counted
    mean: float  # of their rewards by the verifier
    squares: float  # sum of squared deviations from that mean
    last_step: int
    right: float  # Beta counts: rewards, and 1 - rewards, each visit's discounted by the later ones
    wrong: float
