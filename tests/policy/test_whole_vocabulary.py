"""OPD over the whole vocabulary, one update by the policy at several layouts, against transformers and autograd.

The arithmetic in float64: tests/head/test_whole.py. Not covered: CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import Ranks
from teacher_worker import teacher_samples
from tiny import make_config, make_hf_model
from whole_worker import learn_whole

from owpo_megatron.errors import UserError

CASES: dict[int, list[dict[str, Any]]] = {
    1: [{"parallel": {}, "slot": "reference", "placement": "resident"}],
    2: [
        {"parallel": {"tp": 2, "sp": True}, "slot": "teacher", "placement": "resident"},
        {"parallel": {"pp": 2}, "slot": "teacher", "placement": "offloaded"},
        {"parallel": {"dp": 2}, "slot": "reference", "placement": "offloaded"},
        {"parallel": {"cp": 2}, "slot": "teacher", "placement": "resident"},
    ],
}


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def log_softmax(model: Any, sample: Any) -> torch.Tensor:
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    return model(ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1].float().log_softmax(-1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    return {name: make_hf_model(root / name, seed=seed) for seed, name in enumerate(("policy", "teacher"))}


@pytest.fixture(scope="module")
def oracle(models: dict[str, Path]) -> dict[str, Any]:
    """One AdamW update by mean KL(policy || teacher) of each response, then over responses."""
    policy, teacher = loaded(models["policy"]), loaded(models["teacher"])
    total, count, kl_sum = torch.zeros(()), 0, 0.0
    for sample in teacher_samples():
        if sample.masked:
            continue
        logp_LV = log_softmax(policy, sample)
        with torch.no_grad():
            logq_LV = log_softmax(teacher, sample)
        kl_L = (logp_LV.exp() * (logp_LV - logq_LV)).sum(1)
        total, count, kl_sum = total + kl_L.mean(), count + 1, kl_sum + float(kl_L.detach().double().sum())
    (total / count).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
    decayed = [param for param in policy.parameters() if param.dim() > 1]
    plain = [param for param in policy.parameters() if param.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3 / 2, betas=(0.9, 0.95), eps=1e-5).step()  # first of two warm-up updates
    loss = float(total.detach()) / count
    return {"kl": kl_sum, "loss": loss, "grad_norm": norm, "weights": policy.state_dict()}


@pytest.mark.ranks
@pytest.mark.parametrize("count", [1, 2])
def test_an_update_equals_dense(
    count: int, ranks: Ranks, models: dict[str, Path], oracle: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(oracle["weights"], tmp_path / "oracle.pt")
    found = ranks.run(count, learn_whole, models["policy"], models["teacher"], tmp_path / "oracle.pt", CASES[count])[0]
    for one in found:
        for name in ("kl", "loss", "grad_norm"):
            assert one[name] == pytest.approx(oracle[name], rel=1e-5), name
        assert one["weights"] < 1e-5


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"teachers": [{"name": "t", "urls": ["http://y"]}]},
            r"teachers \(t\) urls = http://y: opd with vocabulary full needs the teacher's weights.*use path",
        ),
        ({"model": {"head": "fp8_refined"}}, "model.head = fp8_refined: opd with vocabulary full is exact alone"),
        ({"algorithm": {"tis_cap": 2.0}}, "algorithm.tis_cap = 2.0: opd with vocabulary full weighs no sampled token"),
        ({"algorithm": {"vocabulary": "whole"}}, "algorithm.vocabulary = whole: must be one of sampled, full"),
        ({"algorithm": {"name": "mopd"}}, "vocabulary"),
    ],
)
def test_where_it_cannot_be_it_is_refused(sections: dict[str, Any], message: str) -> None:
    wants: dict[str, Any] = {"algorithm": {"name": "opd", "vocabulary": "full"}}
    for name, fields in sections.items():
        wants[name] = {**wants.get(name, {}), **fields} if isinstance(fields, dict) else fields
    with pytest.raises(UserError, match=message):
        make_config(Path("m"), **wants)
