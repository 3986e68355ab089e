"""The reference: versioned state that shares the policy's model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.errors import RunError, UserError
from owpo_megatron.policy.policy import MegatronPolicy, choosing_themselves
from owpo_megatron.types import Candidate, LogpMode, ReferenceReason, ReferenceVersion, Sample


class SlotReference:
    """Implements Reference and Swappable over the two parameter slots of a policy.

    At the start the reference is the initial policy (Algorithm 1, line 2) or, with `reference.path`, loaded weights.
    """

    def __init__(self, policy: MegatronPolicy, loaded: bool = False):
        self._policy = policy
        self.version = ReferenceVersion(ref_id=0, source_step=0, reason="loaded" if loaded else "init", hash="")
        self.candidate: Candidate | None = None
        """The best evaluated policy of the stage under way; its weights are in host memory."""

    def keep(self, candidate: Candidate) -> None:
        """The policy as it is now is the stage's best so far."""
        self._policy.slots.keep()
        self.candidate = candidate

    def swap(self, step: int, reason: ReferenceReason) -> None:
        """Hard swap: the reference becomes the policy as it is after `step` steps (Algorithm 1, line 16).

        With reason "best_of_stage" it becomes the candidate, and the next stage has none yet. Where the candidate is
        the present policy nothing is copied.
        """
        source = step
        if reason == "best_of_stage":
            assert self.candidate is not None, "a stage ends with an evaluation"
            source = self.candidate.step
        if source == step:
            self._policy.slots.swap()
        else:
            self._policy.slots.swap_to_candidate()
        self.candidate = None
        self.version = ReferenceVersion(self.version.ref_id + 1, source, reason, hash="")

    def restart_policy(self) -> None:
        """The policy goes on from the reference's weights, with an optimizer and a warm-up as at a run's start."""
        self._policy.slots.copy_reference_to_policy()
        self._policy.restart_optimizer()

    def restore_candidate(self, candidate: Candidate, state: Path) -> None:
        """Take a candidate up from disk. Call before the policy is restored: its parameters are the landing place."""
        self._policy.load_state(state)
        self.keep(candidate)

    def is_policy(self) -> bool:
        """True from a swap until the next update."""
        return self._policy.slots.aliased

    @property
    def logp_mode(self) -> LogpMode:
        return self._policy.logp_mode

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        with self._policy.slots.showing_reference():
            return self._policy.logprobs(choosing_themselves(samples))

    def identity(self) -> str:
        """The hash of all ranks' weights, from now on in `version`, too; "" where no reference is kept. Collective."""
        if self._policy.slots.keeps_reference and not self.version.hash:
            digests = self._policy.topology.all_gather(self._policy.slots.digest())
            digest = hashlib.sha256("".join(digests).encode()).hexdigest()
            self.version = ReferenceVersion(
                self.version.ref_id, self.version.source_step, self.version.reason, hash=digest
            )
        return self.version.hash

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save next to the weights. Collective (hashes them)."""
        identity, version = self.identity(), self.version
        return {
            "ref_id": version.ref_id,
            "source_step": version.source_step,
            "reason": version.reason,
            "hash": identity,
            "is_policy": self.is_policy(),
            "kept": self._policy.slots.keeps_reference,
            "layout": self._layout(),
            "dtype": self._dtype(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a version whose weights were restored. Collective.

        Raises:
            UserError: the checkpoint was written under a method without a reference, and this one needs it; or in
                another dtype, in which the reference is another one.
            RunError: the restored weights do not hash to what was saved. The hash is of the shards, so it is
                compared only where the parallel layout is the one that saved it.
        """
        self.version = ReferenceVersion(state["ref_id"], state["source_step"], state["reason"], hash="")
        if not self._policy.slots.keeps_reference:
            return
        if not state.get("kept", True):
            raise UserError(
                "algorithm.name",
                "(changed)",
                "the newest checkpoint was written by a method that keeps no reference; resume with that method, or "
                "start a run of another name= with model.path=.../checkpoints/step_N",
            )
        if (dtype := state.get("dtype", self._dtype())) != self._dtype():
            remedy = (
                f"the newest checkpoint has its reference in {dtype}; resume with that, or start a run of another name "
                "with model.path=.../checkpoints/step_N"
            )
            raise UserError("model.dtype", self._dtype(), remedy)
        found = self.identity()
        if state["layout"] == self._layout() and found != state["hash"]:
            raise RunError(
                f"the restored reference {state['ref_id']} hashes to {found[:12]}, but {state['hash'][:12]} was saved. "
                "The checkpoint's files are whole (their hashes were compared), so keep them: something else "
                "differs from the run that wrote it, such as a version of this program or of megatron-core"
            )

    def _dtype(self) -> str:
        return str(self._policy.dtype).removeprefix("torch.")

    def _layout(self) -> list[int]:
        topology = self._policy.topology
        copies = topology.dp_size * topology.context.size
        layout = [topology.tp_size, topology.pp_size, copies, topology.vpp_size or 1]
        # where experts are distributed; left out where they are not, as checkpoints always had it
        experts = [topology.ep_size, topology.etp_size]
        return layout if experts == [1, topology.tp_size] else layout + experts
