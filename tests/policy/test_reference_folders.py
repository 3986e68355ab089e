"""`reference.path`: every kind of folder gives the same reference, and a folder of another model is refused early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.config import HF_FILES, hf_folder
from owpo_megatron.conversion import carry_files
from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf
from owpo_megatron.errors import UserError
from owpo_megatron.families import read_hf_config
from owpo_megatron.methods import make_method
from owpo_megatron.policy import SlotReference, check_same_model
from owpo_megatron.run.best import BestWeights
from owpo_megatron.run.checkpoints import CheckpointFolder
from owpo_megatron.types import Candidate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], list[torch.Tensor]]:
    """(the untrained model, a trained policy in every kind of folder, its log-probs of a probe)."""
    root = tmp_path_factory.mktemp("run")
    model = make_hf_model(root / "model")
    policy = build_policy(make_config(model))
    policy.update(random_samples(1), make_method("owpo"))

    def carry(folder: Path) -> None:
        (folder / HF_FILES).mkdir()
        carry_files(model, folder / HF_FILES)

    checkpoints = CheckpointFolder(root / "checkpoints", keep=1)
    carry(checkpoints.start(1).parent)
    policy.save(checkpoints.state_path(1))
    best = BestWeights(root, policy.topology, policy, carry, checkpoints, of_run=True, stage=None)
    best.consider(1, {"pass@1": 0.5})
    assert best.run == Candidate(1, 0.5)
    folders = {"checkpoint": checkpoints.finish(1, {"step": 1, "best": best.state_dict()}), "best": root / "best"}
    policy.update(random_samples(2), make_method("owpo"))  # neither follows the policy
    fresh = build_policy(make_config(folders["checkpoint"]))
    probe = fresh.logprobs(random_samples(50, logps=False))
    megatron_to_hf(folders["best"], root / "hf")
    hf_to_megatron(root / "hf", root / "megatron")
    return model, folders | {"hf": root / "hf", "megatron": root / "megatron"}, probe


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("kind", ["hf", "megatron", "checkpoint", "best"])
def test_every_kind_of_folder(run: tuple[Path, dict[str, Path], list[torch.Tensor]], kind: str) -> None:
    """The reference has the same bits from each, and the policy starts from the model's."""
    model, folders, expected = run
    config = make_config(model, reference={"path": str(folders[kind]), "refresh": "fixed"})
    check_same_model("reference.path", folders[kind], read_hf_config(hf_folder(model)))
    policy = build_policy(config)
    reference = SlotReference(policy, loaded=True)
    samples = random_samples(50, logps=False)
    ours = reference.logprobs(samples)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(policy.logprobs(samples), expected, strict=True))
    assert reference.version.reason == "loaded" and not reference.is_policy()


def test_another_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    hf = read_hf_config(make_hf_model(tmp_path / "policy"))
    check_same_model("reference.path", make_hf_model(tmp_path / "long", max_position_embeddings=512), hf)
    changes: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("wide", {"hidden_size": 64}, "hidden_size 64 instead of 48"),
        ("tied", {"tied": True}, "tied True instead of False"),
        ("words", {"vocab_size": 97}, "vocab_size 97 instead of 96"),
    )
    for name, fields, told in changes:
        with pytest.raises(UserError, match=f"reference.path = .*is another model than model.path: .*{told}"):
            check_same_model("reference.path", make_hf_model(tmp_path / name, **fields), hf)
    with pytest.raises(UserError, match="teachers .* no such folder"):
        check_same_model("teachers (t) path", tmp_path / "nowhere", hf)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is a run's folder; name its best/ or one of its checkpoints/step_N"):
        check_same_model("reference.path", tmp_path / "run", hf)
