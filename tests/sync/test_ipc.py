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
import pickle, sys, torch
from torch.multiprocessing import reductions

rebuild = reductions.rebuild_cuda_tensor

def by_uuid(*arguments):  # as SGLang's patch does: the device comes by its UUID
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    return rebuild(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])

reductions.rebuild_cuda_tensor = by_uuid
for name, tensor in pickle.loads(open(sys.argv[1], "rb").read()):
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


def test_handles_are_what_sglangs_unpickler_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickle's globals, with torch's own reduction replaced by a recording of what it gives on CUDA."""
    from torch.multiprocessing import reductions

    from owpo_megatron.sync import ipc

    given = (torch.Tensor, torch.Size([6]), (1,), 0, torch.storage.TypedStorage, torch.float32, 0, b"handle", 24, 0)
    rest = (False, b"counter", 0, b"event", True)

    class Properties:
        uuid = "GPU-1234"

    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (reductions.rebuild_cuda_tensor, (*given, *rest)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    payload = ipc.handles(Outbox(on_device).stage([("a", torch.zeros(6))], 0))
    seen: list[tuple[str, str]] = []

    class Recording(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            seen.append((module, name))
            return (lambda *arguments: arguments) if name == "rebuild_cuda_tensor" else super().find_class(module, name)

    ((name, arguments),) = Recording(io.BytesIO(payload)).load()
    assert name == "a" and arguments == (*given[:6], "GPU-1234", *given[7:], *rest)
    assert set(seen) == {
        ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
        ("torch", "Tensor"),
        ("torch", "Size"),
        ("torch.storage", "TypedStorage"),
        ("torch", "float32"),
    }
