"""owpo bench sync: push a random model's weights to an engine by each transport, next to copying the same bytes."""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from owpo_megatron.bench.random_model import random_model, random_weights
from owpo_megatron.config import EngineConfig, SyncConfig
from owpo_megatron.engine import EngineClient, Fleet, Server, start_fleet
from owpo_megatron.errors import UserError
from owpo_megatron.families import EngineLayout
from owpo_megatron.sync import EngineSync
from owpo_megatron.sync.delta.replica import Mirror
from owpo_megatron.sync.delta.transport import DeltaTransport
from owpo_megatron.sync.disk import DiskTransport
from owpo_megatron.sync.hashes import EngineHashes
from owpo_megatron.sync.push import Transport
from owpo_megatron.sync.registry import TRANSPORTS, make_transport
from owpo_megatron.sync.tensor import TensorTransport

VARIANTS: dict[str, Callable[[Path], Transport]] = {
    "tensor_by_value": lambda folder: TensorTransport(share=False),
    "delta": lambda folder: make_transport(SyncConfig(transport="disk", delta=True, mirror=folder), folder),
}
NAMES = (*TRANSPORTS, *VARIANTS)
EXPECTED = {"tensor", "distributed"}  # goal: at most the time of 5 copies plus 0.3 s
SHARED_MEMORY = Path("/dev/shm")

Log = Callable[[str], None]


def bench_sync(
    params: int,
    dtype: str,
    transports: Sequence[str],
    device: str,
    rounds: int,
    bucket_mb: int,
    changed: float,
    log: Log,
) -> list[dict[str, Any]]:
    """Push a random model to one engine, `rounds` times by each transport, interleaved with a plain copy.

    On a CPU the engine's own checksums then prove that it holds every bit. Memory is the highest peak of a push above
    the memory resident before it, including the buffers of the first push: of the trainer, and summed over the engine's
    processes.

    Args:
        params: approximate number of parameters of the model.
        dtype: "bfloat16" or "float32".
        transports: names from NAMES.
        device: "cpu" or "cuda", for weights and engine.
        bucket_mb: see `sync.bucket_mb`.
        changed: fraction of elements changed before each push by `delta`. That push goes to a mirror in this process,
            as to a remote engine; its extra memory includes the trainer's copy and the mirror's.
        log: called with a line of progress.

    Raises:
        UserError: a transport or the device is not available here.
        EngineError: the engine does not start, or holds other weights than it was sent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device", device, "torch sees no CUDA device here; use --device cpu")
    if device == "cpu" and "ipc" in transports:
        raise UserError("--transport", "ipc", "needs CUDA memory; use tensor on a CPU, or --device cuda")
    with TemporaryDirectory(prefix="owpo-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = random_model(params, folder, "--params")
        weights = dict(random_weights(model, getattr(torch, dtype), device))
        log(f"starting SGLang for {sum(map(torch.Tensor.numel, weights.values())) / 1e6:.3g} M parameters")
        config = EngineConfig(device=device)  # type: ignore[arg-type]
        fleet = stack.enter_context(start_fleet(config, folder, dtype, {"load_format": "dummy"}, folder))
        scratch = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else folder
        on_disk = stack.enter_context(TemporaryDirectory(prefix="owpo-bench-", dir=scratch))
        made = {name: _transport(name, Path(on_disk)) for name in transports}
        for transport in made.values():
            stack.callback(transport.close)
        engines = dict.fromkeys(made, fleet.clients[0])
        if "delta" in made:
            engines["delta"] = stack.enter_context(_elsewhere(fleet.clients[0].url, Path(on_disk)))
        layout = EngineLayout(model.attention.num_kv_heads)
        return _measure(weights, layout, fleet, made, engines, rounds, bucket_mb << 20, changed, log)


def _transport(name: str, folder: Path) -> Transport:
    if name in VARIANTS:
        return VARIANTS[name](folder)
    return make_transport(SyncConfig.model_validate({"transport": name}), folder)


def _measure(
    weights: dict[str, torch.Tensor],
    layout: EngineLayout,
    fleet: Fleet,
    transports: dict[str, Transport],
    engines: dict[str, EngineClient],
    rounds: int,
    bucket_bytes: int,
    changed: float,
    log: Log,
) -> list[dict[str, Any]]:
    size = sum(tensor.nbytes for tensor in weights.values())
    on_cuda = next(iter(weights.values())).is_cuda
    syncs = {name: EngineSync(transport, [engines[name]], bucket_bytes) for name, transport in transports.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", *syncs)}
    memory: dict[str, tuple[int, ...]] = {name: (0, 0) for name in seconds}  # trainer, engine
    copy = _copy_of(weights)
    for turn in range(rounds + 1):  # the first one creates groups and buffers and is not counted
        for name in seconds:
            log(f"{name}, round {turn} of {rounds}")
            if name == "delta":
                _change(weights, changed)
            with _peaks(fleet) as peak:
                taken = _timed(copy if name == "memcpy" else partial(syncs[name].push, weights.items(), turn))
            memory[name] = tuple(map(max, memory[name], peak()))
            if turn:
                seconds[name].append(taken)
    written = {name: t.written_bytes for name, t in transports.items() if isinstance(t, DiskTransport | DeltaTransport)}
    if not on_cuda:
        for name, transport in transports.items():
            log(f"{name}: checksums")
            check = EngineHashes([engines[name]], layout)
            EngineSync(transport, [engines[name]], bucket_bytes, check=check).push(weights.items(), rounds + 1)
    allowed = 5 * statistics.median(seconds["memcpy"]) + 0.3
    return [
        {
            "transport": name,
            "megabytes": round(size / 1e6, 1),
            "seconds": round(statistics.median(taken), 4),
            "slowest": round(max(taken), 4),
            "MB_per_s": round(size / 1e6 / statistics.median(taken)),
            "written_MB": round(written[name] / 1e6, 3) if name in written else None,
            "allowed_seconds": round(allowed, 4) if name in EXPECTED else None,
            "trainer_extra_MB": round(memory[name][0] / 1e6, 1),
            "engine_extra_MB": round(memory[name][1] / 1e6, 1),
            "bit_identical": None if name == "memcpy" or on_cuda else True,
        }
        for name, taken in seconds.items()
    ]


@contextlib.contextmanager
def _elsewhere(url: str, copies: Path) -> Iterator[EngineClient]:
    """Return a client that treats the engine as remote, with a mirror next to it."""
    key = secrets.token_hex()
    with (
        contextlib.closing(Mirror("127.0.0.1", key, copies)) as mirror,
        contextlib.closing(EngineClient(url, key=key)) as client,
    ):
        client.mirror = f"http://127.0.0.1:{mirror.port}"
        yield client


def _change(weights: dict[str, torch.Tensor], share: float) -> None:
    """Flip the lowest bit of this fraction of the elements."""
    for tensor in weights.values():
        bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
        bits ^= (torch.rand(bits.shape, device=bits.device) < share).to(bits.dtype)


def _copy_of(weights: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that copies as many contiguous bytes, into memory that was touched before."""
    size, device = sum(tensor.nbytes for tensor in weights.values()), next(iter(weights.values())).device
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros(size, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source)

    return copy


def _timed(action: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@contextlib.contextmanager
def _peaks(fleet: Fleet) -> Iterator[Callable[[], tuple[int, int]]]:
    """Measure the peak resident bytes above those at the start: of this process, and summed over the engine's."""
    me = psutil.Process()
    server = fleet.engines[0]
    engine = []
    if isinstance(server, Server) and server.pid is not None:
        engine = psutil.Process(server.pid).children(recursive=True)
    before = [_resident(process.pid, "VmRSS") for process in (me, *engine)]
    for process in (me, *engine):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # reset the peak
    found: list[int] = []
    yield lambda: (found[0], sum(found[1:]))
    peaks = [_resident(process.pid, "VmHWM") for process in (me, *engine)]
    found.extend(max(0, peak - start) for peak, start in zip(peaks, before, strict=True))


def _resident(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field} in /proc/{pid}/status")
