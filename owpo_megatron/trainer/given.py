"""Parts of a run that a caller gives, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods import Method
from owpo_megatron.types import PromptStream, RolloutEngine, Sink, Verifier, WeightSync

if TYPE_CHECKING:
    from owpo_megatron.policy import MegatronPolicy


@dataclass(frozen=True)
class Given:
    """Parts that are not made out of the configuration but given; None: made.

    Those of global rank 0 (all but method and policy) are ignored elsewhere. A given engine is not closed, and gets the
    policy's weights only where `sync` is given, too.
    """

    method: Method | None = None
    policy: MegatronPolicy | None = None
    engine: RolloutEngine | None = None
    sync: WeightSync | None = None
    verifier: Verifier | None = None
    stream: PromptStream | None = None
    sinks: Sequence[Sink] = ()


NOTHING = Given()
