"""CUDA handles: what a reader in another process sees of a bucket on the GPU. SGLang itself is not needed here.

Not run yet: no machine with a GPU was at hand. A whole sync on a GPU: `owpo bench sync --device cuda --transport ipc`.
"""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owpo_megatron.sync.bucket import Outbox, on_device
from owpo_megatron.sync.ipc import handles

READER = """
import pickle, sys, torch, types
from torch.multiprocessing import reductions

rebuild = reductions.rebuild_cuda_tensor

def by_uuid(*arguments):  # as SGLang's patch does: the device comes by its UUID
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    return rebuild(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])

reductions.rebuild_cuda_tensor = by_uuid
theirs = types.ModuleType("sglang.srt.weight_sync.tensor_bucket")
theirs.FlattenedTensorMetadata = type("FlattenedTensorMetadata", (), {})
sys.modules |= {name: types.ModuleType(name) for name in ("sglang", "sglang.srt", "sglang.srt.weight_sync")}
sys.modules[theirs.__name__] = theirs
bucket = pickle.loads(open(sys.argv[1], "rb").read())
for part in bucket["metadata"]:  # as SGLang's reconstruct_tensors does
    name, flat = part.name, bucket["flattened_tensor"]
    tensor = flat[part.start_idx : part.end_idx].view(part.dtype).reshape(part.shape)
    print(name, tensor.device.type, str(tensor.dtype), tuple(tensor.shape), tensor.float().sum().item())
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_process_reads_the_bucket(tmp_path: Path) -> None:
    """Two buckets after each other in the same buffer, as two updates are."""
    outbox = Outbox(on_device)
    for update in (1.0, 2.0):
        bucket = [
            ("a", torch.full((3, 5), update, device="cuda")),
            ("b", torch.full((7,), 2 * update, dtype=torch.bfloat16, device="cuda")),
        ]
        (tmp_path / "handles").write_bytes(handles(outbox.stage(bucket, turn=0)))
        done = subprocess.run([sys.executable, "-c", READER, tmp_path / "handles"], capture_output=True, text=True)
        assert done.stdout.splitlines() == [
            f"a cuda torch.float32 (3, 5) {15 * update}",
            f"b cuda torch.bfloat16 (7,) {14 * update}",
        ], done.stderr[-2000:]


class Part:
    """Stands for SGLang's FlattenedTensorMetadata."""


def test_a_bucket_is_what_sglangs_unpickler_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """One handle for two tensors, with torch's own reduction replaced by a recording of what it gives on CUDA."""
    from torch.multiprocessing import reductions

    from owpo_megatron.sync import ipc

    given = (torch.Tensor, torch.Size([34]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, b"handle", 34, 0)
    rest = (False, b"counter", 0, b"event", True)

    class Properties:
        uuid = "GPU-1234"

    shared = []

    def reduced(tensor: torch.Tensor) -> tuple[object, tuple[object, ...]]:
        shared.append(tensor)
        return reductions.rebuild_cuda_tensor, (*given, *rest)

    monkeypatch.setattr(reductions, "reduce_tensor", reduced)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    bucket = [("half", torch.arange(5).bfloat16()), ("whole", torch.arange(6.0).view(2, 3))]
    payload = ipc.handles(Outbox(on_device).stage(bucket, 0))
    seen: set[tuple[str, str]] = set()

    class Recording(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            seen.add((module, name))
            if name == "rebuild_cuda_tensor":
                return lambda *arguments: arguments
            return Part if module.startswith("sglang") else super().find_class(module, name)

    found = Recording(io.BytesIO(payload)).load()
    assert len(shared) == 1
    assert found["flattened_tensor"] == (*given[:6], "GPU-1234", *given[7:], *rest)
    tensors = dict(bucket)
    for part in found["metadata"]:  # as SGLang puts them together
        part_of = shared[0][part.start_idx : part.end_idx].view(part.dtype).reshape(part.shape)
        assert torch.equal(part_of, tensors.pop(part.name)) and part.numel == part_of.nbytes
    assert not tensors
    assert seen == {
        ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
        ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"),
        ("torch", "Tensor"),
        ("torch", "Size"),
        ("torch.storage", "TypedStorage"),
        ("torch", "uint8"),
        ("torch", "bfloat16"),
        ("torch", "float32"),
    }
