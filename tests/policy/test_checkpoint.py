"""Checkpoints: a run that is saved and restored in another process goes on bit for bit.

Covered: parameters, masters, Adam's moments (in bfloat16, too) and count, learning rate in the middle of the warm-up,
the reference and its version, at tp = 2, dp = 2, pp = 2 and interleaved pp = 2; what two tensor-parallel ranks saved in
a world of one.
Not covered: CUDA, Transformer Engine's FusedAdam. The folder around it (manifest, trainer state): the trainer's tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_worker import SAVED_AFTER, run_cases, start, update
from rank_pool import Ranks
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.errors import UserError
from owpo_megatron.policy import SlotReference

LAYOUTS: list[dict[str, int]] = [{"tp": 2}, {"dp": 2}, {"pp": 2}]
CASES: list[dict[str, Any]] = [
    *(
        {"parallel": layout, "dtype": "float32", "aliased": aliased, "loaded": False}
        for layout in LAYOUTS
        for aliased in (False, True)
    ),
    {"parallel": {"pp": 2, "vpp": 2}, "dtype": "float32", "aliased": False, "loaded": False},
    {"parallel": {"dp": 2}, "dtype": "bfloat16", "aliased": False, "loaded": False},
    {"parallel": {"cp": 2}, "dtype": "float32", "aliased": False, "loaded": False},
    {"parallel": {"dp": 2}, "dtype": "float32", "aliased": True, "loaded": True},
    {"parallel": {"dp": 2}, "dtype": "bfloat16", "aliased": False, "loaded": False, "moments": "bfloat16"},
]


def name_of(case: dict[str, Any]) -> str:
    layout = "x".join(f"{axis}{size}" for axis, size in case["parallel"].items())
    rest = ["aliased" if case["aliased"] else "apart", *["loaded"] * case["loaded"], *["rounded"] * ("moments" in case)]
    return "-".join([layout, case["dtype"], *rest])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("checkpoint_models")
    fields: dict[str, Any] = {"family": "qwen2", "vocab_size": 97, "tied": True}
    return make_hf_model(root / "model", **fields), make_hf_model(root / "other", seed=1, **fields)


@pytest.fixture(scope="module")
def saved(
    ranks: Ranks, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """(folder with a checkpoint a case, what the saving process found)."""
    root = tmp_path_factory.mktemp("checkpoints")
    return root, ranks.run(2, run_cases, "save", *models, root, CASES)[0]


@pytest.fixture(scope="module")
def resumed(ranks: Ranks, models: tuple[Path, Path], saved: tuple[Path, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Results loaded in other processes than those that saved."""
    return ranks.run(2, run_cases, "load", *models, saved[0], CASES)[0]


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name_of(case) for case in CASES])
def test_resumed_run_has_the_same_bits(
    index: int, saved: tuple[Path, list[dict[str, Any]]], resumed: list[dict[str, Any]]
) -> None:
    before, after = saved[1][index], resumed[index]
    assert before["case"] == after["case"] == CASES[index]
    assert [name for found in (before, after) for name, held in found["held"].items() if not held] == []
    assert {"saved optimizer", "saved lr", "final parameters", "final reference log-probs"} <= set(after["held"])


@pytest.mark.parametrize("aliased", [False, True])
def test_checkpoint_of_two_ranks_in_a_world_of_one(
    aliased: bool, models: tuple[Path, Path], saved: tuple[Path, list[dict[str, Any]]]
) -> None:
    """Log-probs of policy and reference within 1e-6, and so after two more updates (resharded optimizer state)."""
    index = next(i for i, case in enumerate(CASES) if case["parallel"] == {"tp": 2} and case["aliased"] == aliased)
    folder = saved[0] / str(index)
    expected = torch.load(folder / "rank_0.pt")
    policy, reference = start(CASES[index] | {"parallel": {}}, *models)
    policy.restore(folder / "state", aliased)
    reference.load_state_dict(expected["saved"]["reference"])
    probe = random_samples(50, logps=False)
    close(policy.logprobs(probe), expected["saved"]["log-probs"])
    close(reference.logprobs(probe), expected["saved"]["reference log-probs"])
    assert reference.is_policy() == aliased
    for number, sums in enumerate(expected["sums"], SAVED_AFTER + 1):
        assert update(policy, reference, number)["grad_norm"] == pytest.approx(sums["grad_norm"], rel=1e-5)
    weights = dict(policy.named_weights())
    for name, tensor in expected["end"]["weights"]:
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.fixture
def one_rank(models: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Any]:
    """(state folder, policy) of a run of one rank that was saved after two updates, the reference apart."""
    policy = build_policy(make_config(models[0]))
    reference = SlotReference(policy)
    for number in range(2):
        update(policy, reference, number)
    (tmp_path / "state").mkdir()
    policy.save(tmp_path / "state")
    return tmp_path / "state", policy


@pytest.mark.slow
@pytest.mark.process
def test_settings_come_from_the_config_after_a_resume(models: tuple[Path, Path], one_rank: tuple[Path, Any]) -> None:
    """Another learning rate, weight decay, beta and number of steps hold; the updates made so far are restored."""
    changes = {"lr": 5e-4, "weight_decay": 0.5, "beta2": 0.5, "steps": 50, "warmup_steps": 4}
    policy = build_policy(make_config(models[0], optimizer=changes))
    policy.restore(one_rank[0], reference_is_policy=False)
    assert policy._scheduler.num_steps == 2
    reference = SlotReference(policy)
    assert [update(policy, reference, number)["lr"] for number in (2, 3, 4)] == pytest.approx(
        [5e-4 * 3 / 4, 5e-4, 5e-4]
    )
    groups = policy._optimizer.param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.5)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}


@pytest.mark.slow
@pytest.mark.process
def test_adam_counts_one_step_an_update_after_a_resume(models: tuple[Path, Path], one_rank: tuple[Path, Any]) -> None:
    """megatron shares one `step` tensor among all parameters when it loads; every update would count n_params."""
    policy = build_policy(make_config(models[0]))
    policy.restore(one_rank[0], reference_is_policy=False)
    update(policy, SlotReference(policy), 2)
    steps = [state["step"] for state in policy._optimizer.chained_optimizers[0].optimizer.state.values()]
    assert {float(step) for step in steps} == {3.0}
    assert len({step.data_ptr() for step in steps}) == len(steps) > 10


@pytest.mark.slow
@pytest.mark.process
def test_wrong_reference_is_told(models: tuple[Path, Path], one_rank: tuple[Path, Any]) -> None:
    """The hash of the reference's weights is checked after a restore."""
    state = SlotReference(one_rank[1]).state_dict()
    policy = build_policy(make_config(models[0]))
    policy.restore(one_rank[0], reference_is_policy=False)
    SlotReference(policy).load_state_dict(state)
    with pytest.raises(RuntimeError, match="hashes to .* was saved. The checkpoint's files are whole"):
        SlotReference(policy).load_state_dict(state | {"hash": "0" * 64})
    with pytest.raises(UserError, match=r"model\.dtype = float32: .* has its reference in bfloat16; resume with that"):
        SlotReference(policy).load_state_dict(state | {"dtype": "bfloat16"})
    SlotReference(policy).load_state_dict({name: value for name, value in state.items() if name != "dtype"})


def test_hash_sees_parameters_only(models: tuple[Path, Path]) -> None:
    """Gaps between parameters in the spare slot are zero, whatever the memory held: equal weights, equal hashes."""
    hashes = set()
    for fill in (False, True):
        policy = build_policy(make_config(models[0]))
        torch.use_deterministic_algorithms(fill)  # fills what torch.empty gives with NaN
        try:
            policy.slots.before_step()  # the spare slot becomes the policy's
        finally:
            torch.use_deterministic_algorithms(False)
        reference = SlotReference(policy)
        update(policy, reference, 1)
        reference.swap(1, "interval")
        hashes.add(reference.identity())
    assert len(hashes) == 1
