"""The section `checks:`: what a run does about a step that cannot be right."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from owpo_megatron.config.file import Section


class ChecksConfig(Section):
    silent_steps: int = Field(10, ge=0)
    """Steps in a row that change nothing (no group with a signal, every verdict failed, no tokens) before the run ends
    with exit code 1; the first one is reported. 0: never."""
    mismatch: float | None = Field(None, gt=0)
    """Largest mean |log-prob of the trainer - log-prob of the engine| of a step, in nats; a step above it is marked.
    null: 0.01 in float32, 0.3 in bfloat16, 0.6 with sync.fp8. Not checked on replayed rollouts."""
    mismatch_steps: int = Field(3, ge=0)
    """Steps in a row above `mismatch` before the run ends with exit code 1. 0: never."""
    bad_gradient: Literal["stop", "skip"] = "stop"
    """What an update with a gradient that is not finite does: `stop` ends the run, `skip` leaves weights and optimizer
    as they are and goes on. Its batch is kept for `owpo replay` either way."""
    hang_seconds: float | None = Field(None, ge=0)
    """Seconds without progress on any rank before the run ends with exit code 1 and all ranks' stacks in its logs;
    null: ten times the longest pause measured in the phase so far, at least 300 s and at most 7200 s, and 1800 s in a
    phase that was not measured yet; phases that wait for an engine add its time-outs. 0: never."""
