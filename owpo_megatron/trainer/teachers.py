"""Teachers in the reference's place: each sample's log-probs come from the teacher of its prompt's domain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from owpo_megatron.config.reference import TeacherConfig
from owpo_megatron.errors import UserError
from owpo_megatron.trainer.exchange import Exchange
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.types import Ids, LogpMode, LogprobSource, ReferenceVersion, Sample


class EngineTeacher:
    """A LogprobSource behind running servers, which global rank 0 asks.

    Args:
        score: on rank 0, returns log-probs of (prompt ids, response ids) pairs.
        serves: on rank 0, the model that the servers report.
        exchange: has the tokens of the samples; None: they come with them.
    """

    logp_mode: LogpMode = "engine"

    def __init__(
        self,
        main: MainRank,
        score: Callable[[Sequence[tuple[tuple[int, ...], Ids]]], list[list[float]]] | None,
        serves: str | None,
        exchange: Exchange | None = None,
    ):
        self._main = main
        self._score = score
        self._serves = serves
        self._exchange = exchange

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        exchange = self._exchange

        def ask() -> list[list[float]]:
            assert self._score is not None
            here = samples if exchange is None else [exchange.kept(sample) for sample in samples]
            return self._score([(tuple(sample.prompt_ids), sample.response_ids) for sample in here])

        if exchange is None or any(sample.home is None for sample in samples):
            return [torch.tensor(logps) for logps in self._main.run(ask)]
        scored: list[torch.Tensor] = []  # on global rank 0
        self._main.run(lambda: scored.extend(torch.tensor(logps) for logps in ask()))
        return exchange.to_homes(scored if self._score is not None else None, samples)

    def identity(self) -> str:
        return self._main.run(lambda: str(self._serves))


class Routing:
    """Return the teacher of a domain.

    Example: teachers `a` for maths and `b` without domains: {"maths": "a"}, and "b" for all others.
    """

    def __init__(self, teachers: Sequence[TeacherConfig]):
        self._of_domain = {domain: teacher.name for teacher in teachers for domain in teacher.domains}
        self._others = next((teacher.name for teacher in teachers if not teacher.domains), None)

    def check(self, domains: Iterable[str]) -> None:
        """Look at the domains of a run's prompts before it starts.

        Raises:
            UserError: one of them has no teacher, or a teacher has no prompt.
        """
        found = set(domains)
        alone = sorted(domain for domain in found if self.teacher(domain) is None)
        if alone:
            remedy = "prompts of this domain have no teacher; add it to one's domains, or a teacher without domains"
            raise UserError("teachers", ", ".join(alone), remedy)
        idle = sorted(domain for domain in self._of_domain if domain not in found)
        if idle:
            remedy = f"no prompt has this domain; those of the data are {', '.join(sorted(found))}"
            raise UserError("teachers", ", ".join(idle), remedy)

    def teacher(self, domain: str) -> str | None:
        return self._of_domain.get(domain, self._others)


class Teachers:
    """Implements the Reference protocol; there is nothing to swap.

    Args:
        teachers: by name; those that a sample can be routed to.
    """

    def __init__(self, routing: Routing, teachers: Mapping[str, LogprobSource]):
        self._routing = routing
        self._teachers = dict(teachers)
        self.version = ReferenceVersion(ref_id=0, source_step=0, reason="loaded", hash="")
        self.logp_mode: LogpMode = "exact"
        """The least exact mode among the teachers of the last `logprobs`."""

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Compute the log-probs of each sample's own teacher, in submission order, one call per teacher. Collective."""
        places: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            name = self._routing.teacher(sample.domain)
            assert name is not None, f"domain {sample.domain} was not checked"
            places.setdefault(name, []).append(index)
        logps: dict[int, torch.Tensor] = {}
        modes: list[LogpMode] = []
        for name in sorted(places):
            teacher = self._teachers[name]
            answers = teacher.logprobs([samples[index] for index in places[name]])
            logps |= dict(zip(places[name], answers, strict=True))
            modes.append(teacher.logp_mode)
        self.logp_mode = _least_exact(modes)
        return [logps[index] for index in range(len(samples))]

    def is_policy(self) -> bool:
        return False

    def identity(self) -> str:
        """Return the identities of all teachers, by name."""
        return " ".join(f"{name}={self._teachers[name].identity()}" for name in sorted(self._teachers))

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save: the teachers' identities. There is no reference slot: `is_policy`. Collective."""
        return {
            "is_policy": True,
            "teachers": {name: self._teachers[name].identity() for name in sorted(self._teachers)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the run so far. Collective.

        Raises:
            UserError: a teacher is another one than before.
        """
        before = state.get("teachers", {})
        for name, now in self.state_dict()["teachers"].items():
            if before.get(name) != now:
                told = f"was {_short(before.get(name))} when the checkpoint was written and is {_short(now)} now"
                raise UserError(f"teachers ({name})", name, f"{told}; put it back, or start over with --fresh")


_EXACTNESS: tuple[LogpMode, ...] = ("exact", "fp8_refined", "engine", "fp8_raw")


def _least_exact(modes: Sequence[LogpMode]) -> LogpMode:
    return max(modes, key=_EXACTNESS.index, default="exact")


def _short(identity: str | None) -> str:
    """Shorten hashes to their first digits; keep what a server reports."""
    if identity is None:
        return "not there"
    return identity if "/" in identity else identity[:12]
