"""Hard swaps of the reference at one layout and dtype per case; what held on every rank.

A case is {"parallel": {...}, "dtype": ..., "placement": ...}; with "best": true it also swaps to the best of a stage,
with "loaded": true it also starts with other weights as the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

SWAPS_AFTER = {1, 2, 4}  # updates; twice in a row at 1 and 2
UPDATES = 5

Build = Callable[..., Any]  # build(section={field: value}, ...) -> a policy of the case's config with these changes


class CopyingRun:
    """The same run without slots at work: the reference is a third model that weights are copied into at a swap.

    Its optimizer steps in place: a copy of the reference is taken at the start, so that no slot ever changes hands.
    """

    def __init__(self, build: Build):
        self.policy, self.holder = build(), build()
        self.policy.slots.load_reference()

    def swap(self) -> None:
        import torch

        with torch.no_grad():
            for to, of in zip(parameters(self.holder), parameters(self.policy), strict=True):
                to.copy_(of)


def parameters(policy: Any) -> list[Any]:
    return [param for chunk in policy._chunks for param in chunk.parameters()]


def gradients(policy: Any) -> list[Any]:
    return [buffer.grad_data for chunk in policy._chunks for buffer in chunk.buffers]


def same(ours: Any, theirs: Any) -> bool:
    import torch

    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def copies(tensors: Any) -> list[Any]:
    return [tensor.detach().clone() for tensor in tensors]


def follow_a_run(build: Build, placement: str) -> dict[str, bool]:
    """Several updates with swaps against the copying run, bit for bit."""
    from tiny import random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference

    probe = random_samples(50, logps=False)
    copying = CopyingRun(build)
    policy = build(reference={"placement": placement})
    reference = SlotReference(policy)
    held: dict[str, bool] = {}

    def note(name: str, value: bool) -> None:
        held[name] = held.get(name, True) and bool(value)

    note("starts as the policy", reference.is_policy() and same(reference.logprobs(probe), policy.logprobs(probe)))
    for update in range(1, UPDATES + 1):
        before = copying.holder.logprobs(probe)
        digest = policy.slots.digest()
        samples = [replace(sample, ref_logp=None) for sample in random_samples(update)]
        of_reference, of_copy = reference.logprobs(samples), copying.holder.logprobs(samples)
        note("reference log-probs", same(of_reference, of_copy))
        annotated = [replace(s, ref_logp=logp) for s, logp in zip(samples, of_reference, strict=True)]
        sums = policy.update(annotated, make_method("owpo"))
        sums_of_copying = copying.policy.update(annotated, make_method("owpo"))
        note("metrics", sums == sums_of_copying)
        note("policy weights", same(parameters(policy), parameters(copying.policy)))
        note("reference stays after an update", not reference.is_policy() and policy.slots.digest() == digest)
        note("reference log-probs after an update", same(reference.logprobs(probe), before))
        note("policy shown after its reference", same(parameters(policy), parameters(copying.policy)))
        note("named weights", same_weights(policy, copying.policy))
        if update in SWAPS_AFTER:
            reference.swap(update, "interval")
            copying.swap()
            note("is the policy after a swap", reference.is_policy())
            note("its log-probs after a swap", same(reference.logprobs(probe), policy.logprobs(probe)))
            note("version", (reference.version.source_step, reference.version.reason) == (update, "interval"))
    note("counted swaps", reference.version.ref_id == len(SWAPS_AFTER))
    return held


def same_weights(ours: Any, theirs: Any) -> bool:
    """HF names and tensors, compared on global rank 0; collective."""
    import torch

    pairs = zip(list(ours.named_weights()), list(theirs.named_weights()), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def weights_of_one(build: Build) -> dict[str, bool]:
    """Right after a swap OWPO is DAPO bit for bit, whether the reference's pass was spent or not."""
    from tiny import random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference

    runs = {name: build() for name in ("spent", "not spent", "dapo")}
    references = {name: SlotReference(policy) for name, policy in runs.items()}
    for name, policy in runs.items():
        policy.update(random_samples(1), make_method("owpo"))
        references[name].swap(1, "interval")
    samples = random_samples(2, logps=False)
    spent = [replace(s, ref_logp=v) for s, v in zip(samples, references["spent"].logprobs(samples), strict=True)]
    not_spent = [replace(sample, ref_is_old=True) for sample in samples]
    held = {}
    sums = {
        "spent": runs["spent"].update(spent, make_method("owpo")),
        "not spent": runs["not spent"].update(not_spent, make_method("owpo")),
        "dapo": runs["dapo"].update(samples, make_method("dapo")),
    }
    for name in ("spent", "not spent"):
        ours = sums[name]
        held[f"w is 1 ({name})"] = ours["w_sum"] == ours["loss_count"]
        held[f"loss of DAPO ({name})"] = all(ours[key] == sums["dapo"][key] for key in ("loss_sum", "grad_norm"))
        held[f"gradient of DAPO ({name})"] = same(gradients(runs[name]), gradients(runs["dapo"]))
        held[f"weights of DAPO ({name})"] = same(parameters(runs[name]), parameters(runs["dapo"]))
    held["there is a gradient"] = sums["dapo"]["grad_norm"] > 0
    again = runs["not spent"].update(random_samples(3), make_method("owpo"))
    held["later w is not 1"] = again["w_sum"] != again["loss_count"]
    return held


def loaded_reference(build: Build, other: Path) -> dict[str, bool]:
    """`reference.path`: another model's weights until the first swap."""
    from tiny import random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference

    probe = random_samples(50, logps=False)
    plain, teacher = build(), build(model={"path": other})
    of_teacher = teacher.logprobs(probe)
    held = {}
    for placement in ("resident", "offloaded"):
        policy = build(reference={"path": other, "placement": placement})
        reference = SlotReference(policy, loaded=True)
        alone = build()
        held[f"{placement}: not the policy"] = not reference.is_policy() and reference.version.reason == "loaded"
        held[f"{placement}: log-probs"] = same(reference.logprobs(probe), of_teacher)
        held[f"{placement}: policy"] = same(policy.logprobs(probe), plain.logprobs(probe))
        for update in range(2):
            policy.update(random_samples(update), make_method("owpo"))
            alone.update(random_samples(update), make_method("owpo"))
        held[f"{placement}: updates"] = same(parameters(policy), parameters(alone))
        held[f"{placement}: stays"] = same(reference.logprobs(probe), of_teacher)
        reference.swap(2, "interval")
        held[f"{placement}: swap"] = same(reference.logprobs(probe), policy.logprobs(probe))
    return held


def best_of_stage(build: Build, placement: str, root: Path) -> dict[str, bool]:
    """The weights after update 2 of 4 are the stage's best: the reference becomes them, the policy goes on; and again
    in a stage whose best is its last. A run that takes the candidate up from disk has the same bits."""
    from tiny import random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference
    from owpo_megatron.types import Candidate

    probe = random_samples(50, logps=False)
    plain, policy, late = build(), build(reference={"placement": placement}), build(reference={"placement": placement})
    reference, of_late = SlotReference(policy), SlotReference(late)
    topology = policy.topology
    folders = [root / name for name in ("candidate", "checkpoint")]
    if topology.is_main:
        for folder in folders:
            folder.mkdir(parents=True)
    topology.barrier()
    held: dict[str, bool] = {}
    for update in range(1, 5):
        policy.update(random_samples(update), make_method("owpo"))
        plain.update(random_samples(update), make_method("owpo"))
        if update == 1:
            reference.keep(Candidate(1, 0.1))  # beaten by the next
        if update == 2:
            reference.keep(Candidate(2, 0.5))
            of_best, best_weights = policy.logprobs(probe), copies(parameters(policy))
            policy.save_weights(folders[0])
        if update == 3:
            policy.save(folders[1])
            saved, aliased = reference.state_dict(), reference.is_policy()
    held["best: keeping changes no update"] = same(parameters(policy), parameters(plain))
    reference.swap(4, "best_of_stage")
    version = reference.version
    held["best: version"] = (version.ref_id, version.source_step, version.reason) == (1, 2, "best_of_stage")
    held["best: reference is the best, not the policy"] = not reference.is_policy() and reference.candidate is None
    held["best: reference log-probs"] = same(reference.logprobs(probe), of_best)
    held["best: policy goes on"] = same(parameters(policy), parameters(plain))

    of_late.restore_candidate(Candidate(2, 0.5), folders[0])
    late.restore(folders[1], aliased)
    of_late.load_state_dict(saved)
    late.update(random_samples(4), make_method("owpo"))
    of_late.swap(4, "best_of_stage")
    held["resumed: policy"] = same(parameters(late), parameters(policy))
    held["resumed: reference"] = (of_late.identity(), of_late.version) == (reference.identity(), reference.version)

    policy.update(random_samples(5), make_method("owpo"))
    plain.update(random_samples(5), make_method("owpo"))
    held["best: an update after the swap"] = same(parameters(policy), parameters(plain))
    held["best: reference stays"] = same(reference.logprobs(probe), of_best)
    reference.keep(Candidate(5, 0.9))
    reference.swap(5, "best_of_stage")
    held["last is best: nothing is copied"] = reference.is_policy()
    held["last is best: version"] = reference.version.source_step == 5
    return held | restart(build, of_late, late, best_weights)


def restart(build: Build, reference: Any, policy: Any, best_weights: list[Any]) -> dict[str, bool]:
    """`restart_policy` after a swap to other weights: updates as those of a new run from these weights."""
    import torch
    from tiny import random_samples

    from owpo_megatron.methods import make_method

    fresh = build()
    with torch.no_grad():
        for param, best in zip(parameters(fresh), best_weights, strict=True):
            param.copy_(best)
    fresh._optimizer.reload_model_params()
    reference.restart_policy()
    held = {"restart: policy is the best": same(parameters(policy), best_weights) and reference.is_policy()}
    for update in (6, 7):
        sums, expected = (one.update(random_samples(update), make_method("owpo")) for one in (policy, fresh))
        held[f"restart: update {update}"] = sums == expected and same(parameters(policy), parameters(fresh))
    held["restart: reference stays the best"] = not reference.is_policy() and same(
        reference.logprobs(random_samples(50, logps=False)), logprobs_of(best_weights, fresh)
    )
    return held


def logprobs_of(weights: list[Any], policy: Any) -> list[Any]:
    import torch
    from tiny import random_samples

    with torch.no_grad():
        for param, value in zip(parameters(policy), weights, strict=True):
            param.copy_(value)
    return policy.logprobs(random_samples(50, logps=False))


def refusals(build: Build) -> dict[str, bool]:
    """Return the refused operations while the parameters are the reference's."""
    from tiny import random_samples

    from owpo_megatron.methods import make_method

    policy = build()
    policy.update(random_samples(1), make_method("owpo"))
    held = {}
    for name, act in {
        "an update": lambda: policy.update(random_samples(2), make_method("owpo")),
        "weights for engines": lambda: list(policy.named_weights()),
    }.items():
        before = copies(parameters(policy))
        with policy.slots.showing_reference():
            try:
                act()
                held[f"{name} while the reference is shown"] = False
            except AssertionError:
                held[f"{name} while the reference is shown"] = True
        held[f"{name}: policy intact"] = same(parameters(policy), before)
    return held


def run_cases(model: Path, other: Path, root: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from tiny import build_policy, make_config

    from owpo_megatron.mcore.topology import init_topology

    found = []
    for number, case in enumerate(cases):
        sections = {"parallel": case["parallel"], "optimizer": {"tokens_per_microbatch": 48}}
        config = make_config(model, **sections, model={"dtype": case["dtype"]})
        topology = init_topology(config.parallel, config.seed)

        def build(config: Any = config, topology: Any = topology, **changes: dict[str, Any]) -> Any:
            sections = {name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
            return build_policy(config.model_copy(update=sections), topology)

        held = follow_a_run(build, case["placement"])
        if case.get("best"):
            held |= best_of_stage(build, case["placement"], root / str(number))
        if case["placement"] == "resident":
            held |= weights_of_one(build)
        if case.get("loaded"):
            held |= loaded_reference(build, other) | refusals(build)
        everywhere = topology.all_gather(held)
        found.append({"case": case, "held": {name: all(rank[name] for rank in everywhere) for name in held}})
    return found
