"""Teachers of opd and mopd: slots at several layouts against a dense oracle, a real engine against a slot, routing.

The oracle is transformers and autograd, and shares no code with the trainer. Not covered: CUDA, a teacher of another
size behind an engine (its log-probs come the same way).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import alone
from head.head_oracle import make_batch
from rank_pool import Ranks
from teacher_worker import DOMAINS, learn, routing, teacher_samples
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.config import EngineConfig
from owpo_megatron.config.reference import TeacherConfig
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.head.logprobs import check_batch
from owpo_megatron.methods import make_method
from owpo_megatron.policy import SlotTeacher
from owpo_megatron.trainer.teachers import EngineTeacher, Routing, Teachers
from owpo_megatron.types import LogpMode, Sample

ALPHA = 0.5
CASES: list[dict[str, Any]] = [
    {"parallel": {"tp": 2}, "dtype": "float32", "placement": "resident"},
    {"parallel": {"pp": 2}, "dtype": "float32", "placement": "offloaded"},
    {"parallel": {"dp": 2}, "dtype": "bfloat16", "placement": "offloaded"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {name: make_hf_model(root / name, seed=seed) for seed, name in enumerate(("policy", "first", "second"))}


def dense_logp(model: Any, sample: Sample) -> torch.Tensor:
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    logits = model(ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, len(sample.prompt_ids) :, None])[:, 0]


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def oracle(models: dict[str, Path]) -> dict[str, Any]:
    """Log-probs of each teacher, and one AdamW update by MOPD (paper, Eq. 3 and 4) written out again."""
    samples = teacher_samples()
    with torch.no_grad():
        logp = {name: [dense_logp(loaded(models[name]), s) for s in samples] for name in ("first", "second")}
    routed = [logp["first" if s.domain == "maths" else "second"][index] for index, s in enumerate(samples)]
    policy = loaded(models["policy"])
    with torch.no_grad():
        probe = [dense_logp(policy, sample) for sample in random_samples(50, logps=False)]
    total, counted, gaps = torch.zeros(()), 0, []
    for sample, teacher in zip(samples, routed, strict=True):
        if sample.masked:
            continue
        ours = dense_logp(policy, sample)
        ratio = (ours.detach() - sample.old_logp).exp()
        push = ratio * (teacher - ours.detach() + ALPHA * sample.advantage)
        push = torch.where((ratio < 0.8) | (ratio > 1.28), torch.zeros_like(push), push)
        total, counted = total - (push * ours).mean(), counted + 1
        gaps.append(ours.detach() - teacher)
    (total / counted).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
    decayed = [param for param in policy.parameters() if param.dim() > 1]
    plain = [param for param in policy.parameters() if param.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3 / 2, betas=(0.9, 0.95), eps=1e-5).step()  # first of two warm-up updates
    return {
        "logp": logp,
        "routed": routed,
        "probe": probe,
        "grad_norm": norm,
        "metric": float(torch.cat(gaps).mean()),
        "weights": policy.state_dict(),
    }


@pytest.fixture(scope="module")
def results(
    ranks: Ranks, models: dict[str, Path], oracle: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("oracle") / "oracle.pt"
    torch.save(oracle, file)
    return ranks.run(2, learn, models["policy"], {name: models[name] for name in ("first", "second")}, file, CASES)[0]


@pytest.mark.parametrize("index", range(len(CASES)), ids=["tp2", "pp2-offloaded", "dp2-bf16-offloaded"])
def test_two_slots_against_a_dense_oracle(index: int, results: list[dict[str, Any]], oracle: dict[str, Any]) -> None:
    found = results[index]
    assert found["case"] == CASES[index] and found["mode"] == "exact"
    assert [name for name, held in found["held"].items() if not held] == []
    assert len(set(found["identities"].values())) == 2, "two teachers have two identities"
    exact = CASES[index]["dtype"] == "float32"
    tolerance = 1e-5 if exact else 0.15
    assert max(found["of_each"].values()) < tolerance and found["routed"] < tolerance
    assert found["grad_norm"] == pytest.approx(oracle["grad_norm"], rel=1e-5 if exact else 0.05)
    assert found["metric"] == pytest.approx(oracle["metric"], abs=tolerance)
    if exact:
        assert found["weights"] < 1e-5
    assert largest(oracle["logp"]["first"], oracle["logp"]["second"]) > 1, "the teachers differ; routing shows"


def largest(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_a_teachers_identity_is_the_same_in_every_layout(results: list[dict[str, Any]]) -> None:
    """Saved at tp = 2, compared at pp = 2; in bfloat16 it is another, of rounded weights."""
    first, second, rounded = (found["identities"] for found in results)
    assert first == second and not set(first.values()) & set(rounded.values())


# ---------------------------------------------------------------------------------------------- routing
class Fixed:
    """A teacher that finds every token equally probable, and notes what it was asked."""

    def __init__(self, logp: float, logp_mode: LogpMode = "exact"):
        self.logp, self.logp_mode = logp, logp_mode
        self.asked: list[int] = []

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        self.asked.append(len(samples))
        return [torch.full((len(sample.response_ids),), self.logp) for sample in samples]

    def identity(self) -> str:
        return f"weights {self.logp}"


def test_every_sample_has_the_teacher_of_its_domain_and_each_is_asked_once() -> None:
    first, second = Fixed(-1.0), Fixed(-2.0, "engine")
    teachers = Teachers(routing(), {"first": first, "second": second})
    samples = teacher_samples()
    logps = teachers.logprobs(samples)
    assert [float(logp[0]) for logp in logps] == [-1.0 if s.domain == "maths" else -2.0 for s in samples]
    assert [len(logp) for logp in logps] == [len(sample.response_ids) for sample in samples]
    assert (first.asked, second.asked) == ([3], [5])
    assert teachers.logp_mode == "engine", "one of them came from an engine"
    teachers.logprobs([sample for sample in samples if sample.domain == "maths"])
    assert second.asked == [5] and teachers.logp_mode == "exact"
    assert not teachers.is_policy()


def test_a_domain_without_a_teacher_is_one_clear_error_before_the_run() -> None:
    only_maths = Routing([TeacherConfig(name="first", domains=["maths"], path=Path("x"))])
    with pytest.raises(UserError, match="teachers = code, poems: prompts of this domain have no teacher"):
        only_maths.check(DOMAINS)
    with pytest.raises(UserError, match="teachers = maths: no prompt has this domain; those of the data are code"):
        routing().check(["code"])
    routing().check(DOMAINS)


def test_a_resumed_run_has_the_same_teachers() -> None:
    teachers = Teachers(routing(), {"first": Fixed(-1.0), "second": Fixed(-2.0)})
    state = teachers.state_dict()
    teachers.load_state_dict(state)
    changed = Teachers(routing(), {"first": Fixed(-1.0), "second": Fixed(-3.0)})
    with pytest.raises(UserError, match=r"teachers \(second\) .* was weights -2.0 .* and is weights -3.0 now"):
        changed.load_state_dict(state)


# ---------------------------------------------------------------------------------------------- modes
def test_engine_log_probs_may_teach_and_may_not_stand_in_a_ratio() -> None:
    batch = replace(make_batch(torch.zeros(4)), ref_mode="engine")
    check_batch(batch, "teacher", "exact")
    for need in ("active", "all"):
        with pytest.raises(TypeError, match="reference log-probs are engine"):
            check_batch(batch, need, "exact")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="old log-probs are engine"):
        check_batch(replace(batch, old_mode="engine"), "teacher", "exact")
    with pytest.raises(TypeError, match="teacher log-probs are fp8_raw"):
        check_batch(replace(batch, ref_mode="fp8_raw"), "teacher", "exact")


def test_an_update_of_owpo_refuses_what_one_of_mopd_takes(models: dict[str, Path]) -> None:
    policy = build_policy(make_config(models["policy"]))
    samples = [replace(sample, ref_mode="engine") for sample in random_samples(1)]
    policy.update(samples, make_method("mopd"))
    with pytest.raises(TypeError, match="reference log-probs are engine"):
        policy.update(samples, make_method("owpo"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"algorithm": {"name": "owpo"}},
            "teachers = t: owpo compares the policy with its own reference through one kernel",
        ),
        ({"algorithm": {"name": "grpo"}}, "teachers = t: grpo has no teachers; leave them out, or use mopd or opd"),
        ({"reference": {"path": "x"}}, "reference.path = x: teachers take the reference's place"),
        (
            {"rollout": {"temperature": 0.7}},
            "servers return log-probs at temperature 1, but rollout.temperature is 0.7",
        ),
        ({"teachers": [{"name": "t"}]}, r"teachers \(t\) = \(neither\): set either path or urls"),
        ({"teachers": [{"name": "t", "path": "x", "urls": ["http://y"]}]}, "set either path or urls"),
        ({"teachers": [{"name": "t", "urls": ["y:1"]}]}, "write whole URLs"),
        ({"algorithm": {"name": "opd"}, "teachers": [{"name": n, "path": n} for n in "ab"]}, "opd has one teacher"),
        ({"teachers": [{"name": "a", "path": n} for n in "ab"]}, "two teachers have this name"),
        ({"teachers": [{"name": n, "path": n} for n in "ab"]}, r"\(all others\): two teachers have this domain"),
        ({"teachers": [{"name": n, "path": n, "domains": ["d"]} for n in "ab"]}, "d: two teachers have this domain"),
        ({"teachers": [{"name": "a", "domain": ["d"]}]}, "unknown field; did you mean domains"),
    ],
)
def test_teachers_that_contradict(sections: dict[str, Any], message: str) -> None:
    wants: dict[str, Any] = {"algorithm": {"name": "mopd"}, "teachers": [{"name": "t", "urls": ["http://y"]}]}
    with pytest.raises(UserError, match=message):
        make_config(Path("m"), **(wants | sections))


# ---------------------------------------------------------------------------------------------- a real engine
@pytest.mark.server
def test_a_teacher_behind_an_engine_says_what_the_same_weights_in_a_slot_say(
    engine: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equality to 1e-4, in several posts to two URLs; prompts of one token, responses longer than their prompts."""
    from owpo_megatron.config import SyncConfig
    from owpo_megatron.engine import Scorer
    from owpo_megatron.sync import make_sync

    policy = build_policy(make_config(make_hf_model(tmp_path / "policy", seed=5)))
    slot = SlotTeacher(policy, "slot", tiny_model, resident=True)
    sync = make_sync(SyncConfig(), engine.clients, tmp_path)
    sync.push(loaded(tiny_model).state_dict().items(), version=41)
    url = engine.clients[0].url
    told: list[tuple[int, int]] = []
    monkeypatch.setattr("owpo_megatron.engine.scorer.TOKENS_PER_POST", 64)
    scorer = Scorer([url, url], EngineConfig(), "teachers (t) urls", lambda done, total: told.append((done, total)))
    teacher = EngineTeacher(alone(), scorer.score, scorer.serves)
    samples = random_samples(8, count=40)
    ours, theirs = teacher.logprobs(samples), slot.logprobs(samples)
    assert min(len(sample.prompt_ids) for sample in samples) == 1
    assert 0 < largest(ours, theirs) < 1e-4, "two programs never agree to the bit"
    assert largest(ours, policy.logprobs(samples)) > 1, "the policy has other log-probs"
    assert told[-1] == (40, 40) and len(told) > 4
    assert teacher.logp_mode == "engine" and "weights 41" in teacher.identity()
    scorer.close()


@pytest.mark.parametrize(
    ("told", "right"),
    [([7, 5, 95], True), ([7, 5, 0], True), ([7, 6, 95], False), ([7, 5], False), ([7, 5, 95, 1], False)],
)
def test_log_probs_of_other_tokens_are_refused(told: list[int], right: bool) -> None:
    """The answer begins with the prompt's last token; SGLang calls the vocabulary's last one (95 here) 0."""
    from owpo_megatron.engine.scorer import _logp_of

    scored = [[None if index == 0 else -float(index), token, None] for index, token in enumerate(told)]
    answer = {"meta_info": {"input_token_logprobs": scored}}
    if right:
        assert _logp_of((5, 95), answer) == [-1.0, -2.0]
    else:
        with pytest.raises(EngineError, match="scored other tokens than it was given"):
            _logp_of((5, 95), answer)


def test_a_teachers_server_that_does_not_answer_is_told_before_the_run() -> None:
    from owpo_megatron.engine import Scorer

    with pytest.raises(UserError, match=r"teachers \(t\) urls = http://127.0.0.1:9: no SGLang server answers"):
        Scorer(["http://127.0.0.1:9"], EngineConfig(), "teachers (t) urls")
