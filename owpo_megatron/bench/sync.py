"""What it takes to bring weights to an engine, next to copying the same bytes, in one run on a random model."""

from __future__ import annotations

import contextlib
import json
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

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import EngineClient, Fleet, Server, start_fleet
from owpo_megatron.errors import UserError
from owpo_megatron.families import EngineLayout, hf_shapes, read_hf_config
from owpo_megatron.sync import EngineSync
from owpo_megatron.sync.delta.replica import Mirror
from owpo_megatron.sync.delta.transport import DeltaTransport
from owpo_megatron.sync.disk import DiskTransport
from owpo_megatron.sync.distributed import DistributedTransport
from owpo_megatron.sync.hashes import EngineHashes
from owpo_megatron.sync.ipc import IpcTransport
from owpo_megatron.sync.push import Transport
from owpo_megatron.sync.tensor import TensorTransport

TRANSPORTS: dict[str, Callable[[Path], Transport]] = {
    "tensor": lambda folder: TensorTransport(),
    "tensor_by_value": lambda folder: TensorTransport(share=False),
    "distributed": lambda folder: DistributedTransport(),
    "disk": DiskTransport,
    "delta": lambda folder: DeltaTransport(folder, folder),
    "ipc": lambda folder: IpcTransport(),
}
EXPECTED = {"tensor", "distributed"}  # held to 5 copies and 0.3 s
SHARED_MEMORY = Path("/dev/shm")
VOCABULARY, HEAD_DIM, LAYERS = 8192, 64, 12

Say = Callable[[str], None]


def bench_sync(
    params: int,
    dtype: str,
    transports: Sequence[str],
    device: str,
    rounds: int,
    bucket_mb: int,
    changed: float,
    say: Say,
) -> list[dict[str, Any]]:
    """Push a random model to one engine, `rounds` times by each transport, taking turns with a plain copy.

    The engine then says by its own checksums (CPU) whether it has every bit. Memory is the highest peak of a push over
    what was resident before it, the first one's buffers included: of the trainer, and of all processes of the engine
    together, each by its own peak.

    Args:
        params: parameters of the model, roughly.
        dtype: bfloat16 or float32.
        transports: names of TRANSPORTS.
        device: cpu or cuda; where the weights are and the engine runs.
        bucket_mb: as `sync.bucket_mb`.
        changed: share of the elements that become others before each push of `delta`, which goes to a mirror in this
            process, as to an engine elsewhere; its extra memory has the trainer's copy and the mirror's.
        say: told what is going on.

    Raises:
        UserError: a transport or device that is not to be had here.
        EngineError: the engine does not start, or has other weights than it was sent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device", device, "torch sees no CUDA device here; use --device cpu")
    if device == "cpu" and "ipc" in transports:
        raise UserError("--transport", "ipc", "handles are of CUDA memory; use tensor on a CPU, or --device cuda")
    with TemporaryDirectory(prefix="owpo-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        weights, num_kv_heads = random_model(params, folder, getattr(torch, dtype), device)
        say(f"starting SGLang for {sum(map(torch.Tensor.numel, weights.values())) / 1e6:.3g} M parameters")
        config = EngineConfig(device=device)  # type: ignore[arg-type]
        fleet = stack.enter_context(start_fleet(config, folder, dtype, {"load_format": "dummy"}, folder))
        scratch = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else folder
        on_disk = stack.enter_context(TemporaryDirectory(prefix="owpo-bench-", dir=scratch))
        made = {transport: TRANSPORTS[transport](Path(on_disk)) for transport in transports}
        for transport in made.values():
            stack.callback(transport.close)
        engines = dict.fromkeys(made, fleet.clients[0])
        if "delta" in made:
            engines["delta"] = stack.enter_context(_elsewhere(fleet.clients[0].url, Path(on_disk)))
        return _measure(weights, num_kv_heads, fleet, made, engines, rounds, bucket_mb << 20, changed, say)


def random_model(params: int, folder: Path, dtype: torch.dtype, device: str) -> tuple[dict[str, torch.Tensor], int]:
    """Weights of a Qwen3 of about this size by HF name, its config.json in `folder`; and its key-value heads."""
    width = 2 * HEAD_DIM
    while _count(folder, width + HEAD_DIM) <= params:
        width += HEAD_DIM
    if _count(folder, width) > 2 * params:
        raise UserError("--params", params, f"use at least {_count(folder, width)}")
    model = read_hf_config(folder)
    generator = torch.Generator(device).manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator, device=device, dtype=dtype) * 0.02
        for name, shape in hf_shapes(model).items()
    }
    return weights, model.attention.num_kv_heads


def _count(folder: Path, width: int) -> int:
    """Parameters of the model of this width, whose config.json is left in `folder`."""
    heads = width // HEAD_DIM
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": LAYERS if width <= 1024 else 36,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(torch.Size(shape).numel() for shape in hf_shapes(read_hf_config(folder)).values())


def _measure(
    weights: dict[str, torch.Tensor],
    num_kv_heads: int,
    fleet: Fleet,
    transports: dict[str, Transport],
    engines: dict[str, EngineClient],
    rounds: int,
    bucket_bytes: int,
    changed: float,
    say: Say,
) -> list[dict[str, Any]]:
    size = sum(tensor.nbytes for tensor in weights.values())
    on_cuda = next(iter(weights.values())).is_cuda
    syncs = {name: EngineSync(transport, [engines[name]], bucket_bytes) for name, transport in transports.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ("memcpy", *syncs)}
    memory: dict[str, tuple[int, ...]] = {name: (0, 0) for name in seconds}  # trainer, engine
    copy = _copy_of(weights)
    for turn in range(rounds + 1):  # the first one makes groups and buffers, and is not counted
        for name in seconds:
            say(f"{name}, round {turn} of {rounds}")
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
            say(f"{name}: checksums")
            check = EngineHashes([engines[name]], EngineLayout(num_kv_heads))
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
    """The engine as one of another machine, with a mirror beside it."""
    key = secrets.token_hex()
    with (
        contextlib.closing(Mirror("127.0.0.1", key, copies)) as mirror,
        contextlib.closing(EngineClient(url, key=key)) as client,
    ):
        client.mirror = f"http://127.0.0.1:{mirror.port}"
        yield client


def _change(weights: dict[str, torch.Tensor], share: float) -> None:
    """Turn the lowest bit of this share of the elements."""
    for tensor in weights.values():
        bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
        bits ^= (torch.rand(bits.shape, device=bits.device) < share).to(bits.dtype)


def _copy_of(weights: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A contiguous copy of as many bytes, into memory that was touched before."""
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
    """Peak resident bytes over those at the start: of this process, and of the engine's processes together."""
    me = psutil.Process()
    server = fleet.engines[0]
    engine = []
    if isinstance(server, Server) and server.pid is not None:
        engine = psutil.Process(server.pid).children(recursive=True)
    before = [_resident(process.pid, "VmRSS") for process in (me, *engine)]
    for process in (me, *engine):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak starts anew
    found: list[int] = []
    yield lambda: (found[0], sum(found[1:]))
    peaks = [_resident(process.pid, "VmHWM") for process in (me, *engine)]
    found.extend(max(0, peak - start) for peak, start in zip(peaks, before, strict=True))


def _resident(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {field} in /proc/{pid}/status")
