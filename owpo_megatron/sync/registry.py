"""Table of the transports, and the WeightSync that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from owpo_megatron.config import Config, SyncConfig
from owpo_megatron.engine.command import server_raw
from owpo_megatron.errors import UserError
from owpo_megatron.sync.bucket import on_device
from owpo_megatron.sync.delta.transport import DeltaTransport
from owpo_megatron.sync.disk import DiskTransport
from owpo_megatron.sync.distributed import DistributedTransport
from owpo_megatron.sync.fp8 import engine_arguments, quantized
from owpo_megatron.sync.hashes import EngineHashes, Layout
from owpo_megatron.sync.ipc import IpcTransport, by_handles
from owpo_megatron.sync.nodes import NodeOwners, WeightsInStep
from owpo_megatron.sync.push import EngineSync, Transport, UpdateRequests, WeightEngine, Weights
from owpo_megatron.sync.senders import PartedWeights, Ranks, Senders, machine_name
from owpo_megatron.sync.tensor import TensorTransport

TRANSPORTS: dict[str, Callable[[SyncConfig, Path], Transport]] = {
    "tensor": lambda config, scratch_dir: TensorTransport(),
    "distributed": lambda config, scratch_dir: DistributedTransport(),
    "disk": lambda config, scratch_dir: _disk(config, config.folder or scratch_dir),
    "ipc": lambda config, scratch_dir: IpcTransport(),
}

WITHOUT_MIRROR = "start it with `owpo serve --rendezvous FOLDER` and set engine.rendezvous, or set sync.delta false"


class SentWeights(PartedWeights, WeightsInStep, Protocol):
    """Weights that any of the ways below can send (MegatronPolicy)."""


def make_sync(
    config: SyncConfig,
    engines: Sequence[WeightEngine],
    scratch_dir: Path,
    layout: Layout | None = None,
    senders: Senders | NodeOwners | None = None,
) -> EngineSync:
    """Build the configured sync to these engines (`Fleet.clients`).

    Args:
        scratch_dir: folder for the disk transport when `config.folder` is not set.
        layout: the model's tensors in the engine; only `verify: hash` needs it.
        senders: this rank's part, where several ranks send the weights.

    Raises:
        UserError: an engine's precision does not match `sync.fp8`, or it has no mirror to apply deltas.
    """
    for engine in engines:
        _check_precision(engine, config.fp8)
        if config.delta and not engine.shares_memory and engine.mirror is None:
            raise UserError("sync.delta", True, f"engine {engine.url} has no mirror; {WITHOUT_MIRROR}")
    check = None
    if engines and config.verify == "hash":
        assert layout is not None, "verify: hash compares with the engine's layout"
        check = EngineHashes(engines, layout)
    return EngineSync(
        make_transport(config, scratch_dir),
        engines,
        config.bucket_mb << 20,
        _on_the_way(config.fp8, layout),
        check,
        senders,
    )


def make_senders(config: SyncConfig, ranks: Ranks, weights: SentWeights, layout: Layout) -> Senders | NodeOwners | None:
    """Build this rank's part in pushes from several ranks; None where rank 0 sends all weights. Collective.

    Several ranks send where the model is spread over pipeline stages or expert-parallel ranks, by the transports that
    are requests to the engines. A folder and a mirror are written by one. CUDA handles come from every node's own rank.
    """
    transform = _on_the_way(config.fp8, layout)
    if config.transport == "ipc" and len(set(ranks.all_gather(machine_name()))) > 1:
        return NodeOwners(ranks, weights, weights.weight_senders(), by_handles, on_device, transform)
    if config.transport == "disk" or weights.weight_senders() == [0]:
        return None
    # each sender on a machine has buffers in its shared memory, which may be small: only while it sends
    transport = TensorTransport(keep=False) if config.transport == "tensor" else make_transport(config, Path())
    assert isinstance(transport, UpdateRequests)
    return Senders(ranks, weights, transport, config.bucket_mb << 20, transform)


def run_arguments(config: Config) -> dict[str, Any]:
    """Return SGLang's arguments in a run, beside the defaults. SGLang reads no weights: the first push brings all."""
    raw = {"load_format": "dummy"} | server_raw(config)
    return raw | (engine_arguments(raw) if config.sync.fp8 else {})


def make_transport(config: SyncConfig, scratch_dir: Path) -> Transport:
    """Build the configured transport; the disk transport falls back to `scratch_dir`."""
    return TRANSPORTS[config.transport](config, scratch_dir)


def _on_the_way(fp8: bool, layout: Layout | None) -> Callable[[Weights], Weights] | None:
    """Return what changes the stream of weights before sending; None: nothing does."""
    if layout is None:
        return quantized if fp8 else None
    return (lambda weights: quantized(layout.sent(weights))) if fp8 else layout.sent


def _disk(config: SyncConfig, folder: Path) -> Transport:
    return DeltaTransport(folder, config.mirror) if config.delta else DiskTransport(folder)


def _check_precision(engine: WeightEngine, fp8: bool) -> None:
    found = engine.quantization
    if (found is not None) == fp8 and found in (None, "fp8"):
        return
    if fp8:
        raise UserError("sync.fp8", True, f"engine {engine.url} runs unquantised; start it in block FP8 or set false")
    remedy = f"engine {engine.url} runs with quantization {found}: "
    remedy += "set sync.fp8 true" if found == "fp8" else "its weights cannot be replaced; start it unquantised"
    raise UserError("sync.fp8", False, remedy)
