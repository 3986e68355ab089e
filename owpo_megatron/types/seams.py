"""Seams between the rooms: protocols of a few methods whose docstring is the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from owpo_megatron.types.rollouts import GradingItem, Prompt, Rollout, SampleRequest, Sampling, Verdict
from owpo_megatron.types.training import Candidate, LogpMode, ReferenceReason, ReferenceVersion, Sample

if TYPE_CHECKING:
    import torch


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


class Feed(Protocol):
    """Requests that come out of responses to earlier ones, e.g. the next turns of episodes."""

    expected: int  # requests that are under way at a time, about

    def begin(self, wake: Callable[[], None]) -> None:
        """Called once. From then on `wake` is called, in any thread, when there is something to take, or the end."""

    def take(self) -> Sequence[SampleRequest]:
        """Return what is ready; () too. In the thread that draws, as `goes_on` and `finished` are."""

    def goes_on(self) -> bool:
        """Whether requests may come that no response under way waits for."""


class ConversingEngine(Protocol):
    """An engine that draws what a feed asks for."""

    def weight_versions(self) -> list[int]: ...

    def converse(self, feed: Feed, sampling: Sampling, finished: Finished) -> None:
        """Draw until the feed ends; `finished` counts requests in the order in which they were taken."""


class CuttingEngine(Protocol):
    """An engine that can end responses early."""

    def draw_until(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        enough: Callable[[], bool],
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """Draw, in submission order, until `enough` is true, which is asked whenever `finished` was called. The other
        responses have the tokens so far, and the finish reason "abort"."""


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

    def homes(self, samples: Sequence[Sample]) -> list[int]:
        """The data-parallel rank that computes each sample in a pass over these, from lengths: not collective."""

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """fp32 log-probs [L] of each sample's response tokens at the rollout temperature: on every rank, or on those of
        the sample's home, where it has one; no elements elsewhere."""

    def logprobs_and_entropies(self, samples: Sequence[Sample]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The same, with the entropy [L] of each response token's distribution; one pass."""

    def logprobs_and_statistics(
        self, samples: Sequence[Sample], statistic: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Log-probs, entropies, and an owpo_megatron.methods.statistic.Statistic of each token [L]; one pass."""

    def update(self, samples: Sequence[Sample], method: Any) -> dict[str, Any]:
        """One optimizer step on these samples; returns metrics (loss, grad_norm, lr, and the method's).

        `method` is an owpo_megatron.methods.Method; this module imports no room.
        """

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, full tensor) of every weight, complete on global rank 0, in a fixed order."""


class Writing(Protocol):
    """A state on its way to the disk, in another process than the one that trains."""

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether this rank's part is on the disk, or failed; waits so long for it."""

    def progress(self) -> int:
        """A number that grows as long as this rank's part is worked on."""

    def finish(self) -> dict[str, str]:
        """Make it whole, once every rank is ready; returns the sha256 of each file by name. Collective.

        Raises:
            RunError: on every rank, where one could not write.
        """

    def abandon(self) -> None:
        """Write no more of it, on this rank."""


class Storable(Protocol):
    """Weights and optimizer on disk, sharded, in an existing empty folder. Every method is collective."""

    def weights_digest(self) -> str:
        """Identity of the policy's weights, comparable within one parallel layout."""

    def save_weights(self, path: Path) -> None:
        """The weights alone."""

    def save(self, path: Path) -> None:
        """Everything that training goes on from, the reference included."""

    def begin_save(self, path: Path) -> Writing:
        """The same, written while training goes on: the state is as it was when this returned."""

    def restore(self, path: Path, reference_is_policy: bool) -> None:
        """Take over what `save` wrote."""


class LogprobSource(Protocol):
    """Weights that the policy is compared with: its reference, or a teacher. Every method is collective."""

    @property
    def logp_mode(self) -> LogpMode:
        """Mode in which the last `logprobs` were computed."""

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """fp32 log-probs [L] of each sample's response tokens, where Policy.logprobs has them."""

    def identity(self) -> str:
        """Return the identity of these weights, which a resumed run compares."""


class Reference(LogprobSource, Stateful, Protocol):
    """The policy that scales updates, or teachers in its place."""

    version: ReferenceVersion

    def is_policy(self) -> bool:
        """True while the reference has bit for bit the policy's weights (right after a swap, before an update)."""


class Swappable(Protocol):
    """A reference that follows the policy: the ratchet. Every method is collective over all trainer ranks."""

    @property
    def candidate(self) -> Candidate | None:
        """The stage's best so far; its weights are in host memory."""

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

    def any(self, flag: bool) -> bool:
        """True on every rank where the flag is True on one."""


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
