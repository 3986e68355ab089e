"""Teachers that are further slots of the policy's model: weights of its shape that never change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from owpo_megatron.policy.policy import MegatronPolicy, choosing_themselves
from owpo_megatron.types import LogpMode, Sample


class SlotTeacher:
    """Implements LogprobSource over a further slot of a policy. Every method is collective.

    Args:
        path: an HF folder, a converted megatron folder, or a checkpoint or best/ of a run, of the policy's model.
        resident: False keeps the weights in host memory and brings them to the device for a pass.
    """

    def __init__(self, policy: MegatronPolicy, name: str, path: Path, resident: bool):
        self._policy = policy
        self._name = name
        self._identity = ""
        with policy.slots.filling(name, resident):
            policy.load_weights(path)

    @property
    def logp_mode(self) -> LogpMode:
        return self._policy.logp_mode

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """Compute Policy.logprobs with the teacher's weights, the same kernels and the rollout temperature."""
        with self._policy.slots.showing(self._name):
            return self._policy.logprobs(choosing_themselves(samples))

    def identity(self) -> str:
        """Hash of the weights, by name and full tensor: the same in every parallel layout. Worked out once."""
        if self._identity:
            return self._identity
        sha = hashlib.sha256()
        with self._policy.slots.showing(self._name):
            for name, tensor in self._policy.shown_weights():
                sha.update(name.encode())
                sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self._identity = self._policy.topology.broadcast(sha.hexdigest())
        return self._identity
