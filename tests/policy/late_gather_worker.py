"""The same run with and without a late gather of parameters, and each reader of weights right after an update."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

CARELESS = "careless"  # nobody waits


def sha(tensors: Iterable[Any]) -> str:
    import hashlib

    import torch

    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def parameters(policy: Any) -> str:
    return sha(param for chunk in policy._chunks for param in chunk.parameters())


class Readers:
    """Readers of the policy's weights: each returns a hash of what it got, and leaves the policy as it is."""

    def __init__(self, policy: Any, reference: Any, holder: Any, folder: Path):
        from tiny import random_samples

        self.policy, self.reference, self.holder, self.folder = policy, reference, holder, folder
        self.probe = random_samples(50, logps=False)

    def logprobs(self) -> str:
        return sha(self.policy.logprobs(self.probe))

    def named_weights(self) -> str:
        return sha(tensor for _, tensor in self.policy.named_weights())

    def weight_parts(self) -> str:
        return sha(tensor for part in self.policy.weight_parts() for _, tensor in part)

    def weights_in_step(self) -> str:
        return sha(tensor for _, pairs in self.policy.weights_in_step() for _, tensor in pairs)

    def digest(self) -> str:
        return str(self.policy.weights_digest())

    def saved_weights(self) -> str:
        self.policy.save_weights(self._empty("weights"))
        self.holder.load_state(self.folder / "weights")
        return parameters(self.holder)

    def checkpoint(self) -> str:
        self.policy.save(self._empty("checkpoint"))
        self.holder.restore(self.folder / "checkpoint", reference_is_policy=True)
        return parameters(self.holder)

    def candidate(self) -> str:
        self.policy.slots.keep()
        return sha(self.policy.slots._candidate)

    def swapped_identity(self) -> str:
        self.reference.swap(1, "interval")
        return str(self.reference.identity())

    def swapped_logprobs(self) -> str:
        self.reference.swap(2, "interval")
        return sha(self.reference.logprobs(self.probe))

    def _empty(self, name: str) -> Path:
        if self.policy.topology.is_main:
            (self.folder / name).mkdir(parents=True)
        self.policy.topology.barrier()
        return self.folder / name


READERS = [name for name, value in vars(Readers).items() if callable(value) and not name.startswith("_")]


def follow(policy: Any, holder: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    """Return what each reader got after an update of its own, and the metrics of all updates."""
    from tiny import random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference

    reference = SlotReference(policy)
    readers = Readers(policy, reference, holder, folder)
    found: dict[str, Any] = {}
    metrics = []
    for number, name in enumerate(names):
        metrics.append(policy.update(random_samples(number), make_method("owpo")))
        found[name] = getattr(readers, name)()
    for number in range(100, 103):  # nobody reads between these
        metrics.append(policy.update(random_samples(number), make_method("owpo")))
    reference.restart_policy()  # writes where a gather may be under way
    restarted = policy.update(random_samples(200), make_method("owpo"))
    return found | {"metrics": metrics, "restarted": [restarted, parameters(policy), reference.identity()]}


class Arrival:
    """A gather's handle; the parameters arrive when somebody waits for it, and not before."""

    def __init__(self, buckets: list[Any], old: list[Any]):
        self._buckets, self._arrived = buckets, [bucket.param_data.clone() for bucket in buckets]
        for bucket, data in zip(buckets, old, strict=True):
            bucket.param_data.copy_(data)

    def wait(self) -> None:
        for bucket, data in zip(self._buckets, self._arrived, strict=True):
            bucket.param_data.copy_(data)


def hold_back(chunks: Any) -> None:
    """Let everybody who does not wait have old values for certain, as on a slow network."""
    stock = chunks.start

    def start() -> None:
        groups = list(chunks._groups())
        old = [[bucket.param_data.clone() for bucket in group.buckets] for group in groups]
        stock()
        for group, of_group in zip(groups, old, strict=True):
            group.param_gather_handle.wait()
            group.param_gather_handle = Arrival(group.buckets, of_group)

    chunks.start = start


def run_cases(model: Path, root: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases are {"parallel": {...}, "dtype": ..., "readers": names, "runs": kinds to compare with `gradients`}."""
    from functools import partial

    from megatron.core.distributed import DistributedDataParallelConfig
    from tiny import build_policy, make_config

    from owpo_megatron.mcore import optimizer
    from owpo_megatron.mcore.topology import init_topology

    optimizer.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=5000)
    found = []
    for number, case in enumerate(cases):
        topology = init_topology(make_config(model, parallel=case["parallel"]).parallel, 1)

        def build(overlap: str, case: dict[str, Any] = case, topology: Any = topology) -> Any:
            parallel = case["parallel"] | {"overlap": overlap}
            kind = {"path": str(model), "dtype": case["dtype"]}
            return build_policy(make_config(model, model=kind, parallel=parallel, optimizer={"lr": 1e-2}), topology)

        holder = build("none")
        got: dict[str, Any] = {}
        for name in ("gradients", *case["runs"]):
            policy = build("gradients" if name == "gradients" else "all")
            if name in ("held back", CARELESS):
                hold_back(policy._chunks)
            if name == CARELESS:
                policy._chunks.finish = lambda: None
            got[name] = follow(policy, holder, root / f"{number} {name}", case["readers"])
        groups = sum(len(chunk.bucket_groups) for chunk in policy._chunks)
        found.append({"case": case, "groups": groups, "got": topology.all_gather(got)})
    return found
