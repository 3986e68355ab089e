"""Weights by value inside the HTTP request: needs no shared memory, file system or process group."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence

import torch

from owpo_megatron.sync.push import Bucket, WeightEngine, on_all


class TensorTransport:
    """POST /update_weights_from_tensor with pickled (name, tensor) pairs. Simple, and fit for small models: the bytes
    are copied about five times on their way."""

    def begin(self, engines: Sequence[WeightEngine], version: int) -> None:
        on_all(engines, lambda engine: engine.begin_update())

    def send(self, engines: Sequence[WeightEngine], bucket: Bucket) -> None:
        payload = serialize(bucket)
        on_all(engines, lambda engine: engine.update_from_tensor(payload))

    def end(self, engines: Sequence[WeightEngine]) -> None:
        on_all(engines, lambda engine: engine.end_update())

    def close(self) -> None:
        pass


def serialize(bucket: Bucket) -> str:
    """Base64 of a pickle that SGLang's restricted unpickler accepts, with the tensors' bytes inside.

    torch's own multiprocessing pickles would send handles of shared memory, which kill an engine that cannot open them.
    """
    return base64.b64encode(pickle.dumps([(name, _alone(tensor)) for name, tensor in bucket], protocol=5)).decode()


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, with a storage of its own: a view would be pickled with the whole buffer behind it."""
    tensor = tensor.cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
