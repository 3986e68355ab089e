"""The sequence of a sync, its buckets and its payloads; no server (test_transports.py has one)."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import threading
import time
import weakref
from pathlib import Path
from typing import get_args

import pytest
import torch

from owpo_megatron.config import SyncConfig
from owpo_megatron.engine.tensor_body import TensorBody
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.sync import EngineSync, make_sync
from owpo_megatron.sync.bucket import Bucket, Outbox, Staged, in_buckets, on_device, on_host
from owpo_megatron.sync.distributed import address_seen_from
from owpo_megatron.sync.payload import by_reference, by_value, shared_memory
from owpo_megatron.sync.registry import TRANSPORTS
from owpo_megatron.sync.tensor import TensorTransport


class RecordingEngine:
    """Notes what it is asked to do; can refuse one thing or report another version."""

    incarnation = 0
    tp_size = 1
    shares_memory = True
    quantization: str | None = None

    def __init__(self, calls: list[str], url: str = "http://e", refuses: str = "", reports: int | None = None):
        self.calls, self.url, self.refuses, self.reports = calls, url, refuses, reports
        self.version = -1

    def _call(self, name: str) -> None:
        if name == self.refuses:
            raise EngineError(f"{self.url} refuses {name}")
        self.calls.append(name)

    def pause(self) -> None:
        self._call("pause")

    def resume(self) -> None:
        self._call("resume")

    def flush(self) -> None:
        self._call("flush")

    def begin_update(self) -> None:
        self._call("begin")

    def end_update(self) -> None:
        self._call("end")

    def update_from_tensor(self, payloads: list[bytes]) -> None:
        self._call("tensor")

    def update_from_disk(self, path: str) -> None:
        self.read = Path(path)
        assert self.read.is_dir()
        self._call("disk")

    def set_version(self, version: int) -> None:
        self._call(f"version {version}")
        self.version = version

    def weight_version(self) -> int:
        return self.version if self.reports is None else self.reports


WEIGHTS = [("a", torch.zeros(10)), ("b", torch.zeros(300)), ("c", torch.zeros(5)), ("d", torch.zeros(6))]


def test_sequence_of_a_push() -> None:
    calls: list[str] = []
    sync = make_sync(SyncConfig(), [RecordingEngine(calls)], Path("unused"))  # type: ignore[list-item]
    sync.push(WEIGHTS, 4)
    assert calls == ["pause", "flush", "version -1", "begin", "tensor", "end", "version 4", "resume"]


@pytest.mark.parametrize("refuses", ["", "tensor"])
def test_copies_by_one_thread_and_gives_the_others_back(refuses: str) -> None:
    seen: list[int] = []

    def weights():
        for name, tensor in WEIGHTS:
            seen.append(torch.get_num_threads())
            yield name, tensor

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        sync = make_sync(SyncConfig(), [RecordingEngine([], refuses=refuses)], Path("unused"))  # type: ignore[list-item]
        with pytest.raises(EngineError) if refuses else contextlib.nullcontext():
            sync.push(weights(), 4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize(("tp_size", "refuses"), [(1, ""), (2, ""), (1, "disk"), (2, "disk")])
def test_a_folder_stays_while_further_ranks_may_read_it(tp_size: int, refuses: str, tmp_path: Path) -> None:
    """SGLang answers when its first rank has loaded. Until the next update; what a killed run left goes at once."""
    (tmp_path / "weights_9_killed").mkdir()
    engine = RecordingEngine([])
    engine.tp_size = tp_size
    sync = make_sync(SyncConfig(transport="disk"), [engine], tmp_path)  # type: ignore[list-item]
    sync.push(WEIGHTS, 1)
    first = engine.read
    assert list(tmp_path.iterdir()) == ([first] if tp_size > 1 else [])
    engine.refuses = refuses
    with pytest.raises(EngineError) if refuses else contextlib.nullcontext():
        sync.push(WEIGHTS, 1)
    assert engine.read != first and list(tmp_path.iterdir()) == ([engine.read] if tp_size > 1 else [])
    sync.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_update_leaves_the_engine_paused_and_unversioned() -> None:
    calls: list[str] = []
    sync = make_sync(SyncConfig(), [RecordingEngine(calls, refuses="tensor")], Path("unused"))  # type: ignore[list-item]
    with pytest.raises(EngineError, match="refuses tensor"):
        sync.push(WEIGHTS, 4)
    assert calls == ["pause", "flush", "version -1", "begin"]


def test_an_engine_that_reports_another_version_is_named() -> None:
    engines = [RecordingEngine([]), RecordingEngine([], url="http://f", reports=3)]
    with pytest.raises(EngineError, match="http://f reports weight version 3 after a push of version 4"):
        make_sync(SyncConfig(), engines, Path("unused")).push(WEIGHTS, 4)  # type: ignore[arg-type]


def test_without_engines_the_weights_are_still_iterated() -> None:
    """Iterating gathers over trainer ranks: a replay's rank 0 must take part in it."""
    weights = iter(WEIGHTS)
    make_sync(SyncConfig(), [], Path("unused")).push(weights, 4)
    assert next(weights, None) is None


def test_buckets_respect_their_size() -> None:
    names = [[name for name, _ in bucket] for bucket in in_buckets(WEIGHTS, 64)]
    assert names == [["a"], ["b"], ["c", "d"]]
    assert [[name for name, _ in bucket] for bucket in in_buckets(WEIGHTS, 1 << 20)] == [["a", "b", "c", "d"]]


def test_memory_is_buckets_whatever_the_model_is() -> None:
    """40 tensors of 1 MB in buckets of 4 MB: never more of the stream is alive than a bucket and a tensor, and what is
    packed lies in two buffers of one bucket.

    Measured in bytes of live tensors, with an engine that is slow to take them.
    """
    megabyte, alive, most = 1 << 20, 0, 0

    class Counted:
        """Notes when a tensor of the stream is let go."""

        def __init__(self, tensor: torch.Tensor):
            nonlocal alive, most
            alive += tensor.nbytes
            most = max(most, alive)
            weakref.finalize(tensor, self.gone, tensor.nbytes)

        @staticmethod
        def gone(size: int) -> None:
            nonlocal alive
            alive -= size

    def weights():
        for index in range(40):
            tensor = torch.full((megabyte,), index, dtype=torch.uint8)
            Counted(tensor)
            yield f"w{index}", tensor
            del tensor

    got: list[int] = []

    class Slow(RecordingEngine):
        def update_from_tensor(self, payloads: list[bytes]) -> None:
            time.sleep(0.02)
            got.extend(int(tensor[0]) for _, tensor in pickle.loads(payloads[0]))

    transport = TensorTransport(share=False)
    transport.max_bucket_bytes = 4 * megabyte
    EngineSync(transport, [Slow([])], bucket_bytes=512 * megabyte).push(weights(), 1)  # type: ignore[list-item]
    assert got == list(range(40))
    assert most <= 5 * megabyte, f"{most} bytes of the stream were alive at once"
    assert [buffer.nbytes for buffer in transport._private._buffers if buffer is not None] == [4 * megabyte] * 2


def test_an_error_on_the_way_ends_the_push_with_nothing_under_way() -> None:
    """The second bucket is refused while others wait; when the error is out, no thread still sends."""
    sent: list[str] = []

    def deliver(staged: Staged) -> None:
        sent.append(staged.slices[0].name)
        if len(sent) == 2:
            raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"), Outbox(on_device).open(deliver) as delivery:
        for bucket in in_buckets([(f"w{index}", torch.zeros(16)) for index in range(9)], 64):
            delivery.put(bucket)
    assert len(sent) <= 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


BUCKET: Bucket = [
    ("view", torch.arange(1_000_000.0)[10:16].view(2, 3)),  # of a large buffer, as the policy's parameters are
    ("transposed", torch.arange(6.0).view(2, 3).T),
    ("half", torch.ones(3, dtype=torch.bfloat16)),
    ("fp8", torch.ones(5).to(torch.float8_e4m3fn)),
    ("scalar", torch.tensor(3.5)),
    ("none", torch.zeros(0)),
]


@pytest.mark.parametrize("reference", [False, True])
def test_payload_holds_the_values_and_nothing_else(reference: bool) -> None:
    allocate = (lambda size, device: shared_memory(size)) if reference else on_host
    staged = Outbox(allocate).stage(BUCKET, 0)
    payload = by_reference(staged) if reference else by_value(staged)
    assert len(payload) < 3_000
    got = dict(pickle.loads(payload))
    assert got.keys() == {name for name, _ in BUCKET}
    for name, tensor in BUCKET:
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(got[name].float(), tensor.float())


@pytest.mark.parametrize("room", [True, False])
def test_shared_memory_that_is_full_is_not_used(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to more of it than there is would be a SIGBUS: the bytes are sent inline, with a warning, and arrive."""
    got: list[bytes] = []

    class Keeping(RecordingEngine):
        def update_from_tensor(self, payloads: list[bytes]) -> None:
            got.extend(payloads)
            self.values = {name: tensor.clone() for name, tensor in pickle.loads(payloads[0])}

    if not room:
        full = os.statvfs_result((4096, 4096, 10, 10, 0, *[0] * 5))
        monkeypatch.setattr(os, "statvfs", lambda path: full)
    engine = Keeping([])
    weights = [("a", torch.arange(100_000.0))]
    with contextlib.nullcontext() if room else pytest.warns(UserWarning, match="/dev/shm has 0 MB free"):
        make_sync(SyncConfig(), [engine], Path("unused")).push(weights, 1)  # type: ignore[list-item]
    assert torch.equal(engine.values["a"], weights[0][1])
    assert (len(got[0]) < 1000) == room


def test_body_is_the_json_that_its_length_says() -> None:
    """Payloads longer than a chunk, of lengths that base64 pads, one for each rank."""
    payloads = [bytes(range(256)) * 4000 + b"x" * extra for extra in (0, 1, 2)]
    pieces = list(TensorBody(payloads))
    body = b"".join(pieces)
    assert len(body) == len(TensorBody(payloads)) and max(map(len, pieces)) < 2 << 20
    sent = json.loads(body)
    assert [base64.b64decode(payload) for payload in sent["serialized_named_tensors"]] == payloads
    assert sent["flush_cache"] is False


def test_precisions_that_do_not_fit_are_refused() -> None:
    engine = RecordingEngine([])
    with pytest.raises(UserError, match="sync.fp8 = True.*runs unquantised"):
        make_sync(SyncConfig(fp8=True), [engine], Path("unused"))  # type: ignore[list-item]
    engine.quantization = "fp8"
    with pytest.raises(UserError, match="sync.fp8 = False.*set sync.fp8 true"):
        make_sync(SyncConfig(), [engine], Path("unused"))  # type: ignore[list-item]
    engine.quantization = "awq"
    for fp8 in (False, True):
        with pytest.raises(UserError, match="sync.fp8"):
            make_sync(SyncConfig(fp8=fp8), [engine], Path("unused"))  # type: ignore[list-item]


def test_the_configuration_names_every_transport() -> None:
    """ipc and deltas have their own files; the others run in tests/sync/test_transports.py."""
    assert set(get_args(SyncConfig.model_fields["transport"].annotation)) == set(TRANSPORTS)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="sync.delta = True: only transport disk"):
        SyncConfig(delta=True)
    with pytest.raises(ValueError, match="sync.verify = hash: engines hash"):
        SyncConfig(fp8=True, verify="hash")


def test_address_that_a_local_engine_sees() -> None:
    assert address_seen_from("http://127.0.0.1:30000") == "127.0.0.1"
