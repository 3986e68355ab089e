"""Messages between global rank 0 and its rollout workers; pickled, between processes of one run that share a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from owpo_megatron.config import VerifierConfig
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.types import ExpertShape, Rollout, SampleRequest, Sampling

PING = "ping"
"""Asks a worker that has nothing to answer whether it is there; it sends the same back."""
LEAVE = "leave"
"""A worker ends because its rank does."""


@dataclass(frozen=True)
class GradingOrder:
    """Rules and tokenizer that a worker grades with.

    Attributes:
        model_files: folder of the tokenizer.
        domains: domains of the training prompts.
        rules: domains with a rule of their own.
        carried: rules that no import finds, by value (owpo_megatron/carried.py), pickled.
    """

    config: VerifierConfig
    model_files: Path
    domains: frozenset[str]
    rules: Mapping[str, str] = field(default_factory=dict)
    carried: bytes = b""

    @property
    def all_domains(self) -> frozenset[str]:
        return self.domains | self.rules.keys()


@dataclass(frozen=True)
class Ready:
    """A worker's first message after its imports: it takes posts from now on."""

    failure: str = ""  # why it does not


@dataclass(frozen=True)
class Server:
    """An engine as a worker has to know it; the fields are EngineClient's."""

    url: str
    key: str | None
    request_timeout: float
    vocab_size: int | None
    owner: str
    experts: ExpertShape | None

    @classmethod
    def of(cls, client: EngineClient) -> Server:
        return cls(client.url, client.key, client.request_timeout, client.vocab_size, client.owner, client.experts)

    def client(self) -> EngineClient:
        """A client of this engine in another process."""
        made = EngineClient(self.url, self.request_timeout, self.key)
        made.vocab_size, made.owner, made.experts = self.vocab_size, self.owner, self.experts
        return made


@dataclass(frozen=True)
class Ask:
    """A post for an engine: the arguments of EngineClient.submit."""

    number: int
    server: Server
    requests: Sequence[SampleRequest]
    sampling: Sampling
    version: int | None
    names: Sequence[str] | None


@dataclass(frozen=True)
class Answer:
    """The post's rollouts without their prompts, which rank 0 has; or the error that `submit` had."""

    number: int
    rollouts: Sequence[Rollout] = ()
    error: Exception | None = None
