"""Damaged documents of six kinds: each is read rightly or refused with one clear line, and never anything else.

A few dozen of each in `make test`, the same ones every time; 5,000 of each in the matrix. Hypothesis draws them.
Rightly read means: what was accepted is well-formed, and where the damage must not change the meaning (hashes,
weights), nothing has changed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import mutated, mutated_bytes
from tiny import make_config, make_hf_model

from owpo_megatron.config import Config
from owpo_megatron.data.sources import read_problems
from owpo_megatron.engine.answers import BadAnswer, Expected, read_answers
from owpo_megatron.errors import UserError
from owpo_megatron.families.reader import HFReader
from owpo_megatron.families.reading import read_hf_config
from owpo_megatron.mcore.sharded_files import PartFile, StoredState, finish_state
from owpo_megatron.run.checkpoints import CheckpointFolder
from owpo_megatron.run.manifest import Conversion
from owpo_megatron.types import Prompt, SampleRequest, Sampling

SHORT, LONG = 40, 5000
LONGEST = 1500  # characters of a message
ROOT = Path(__file__).parents[2]

Check = Callable[[Random, Path, Path], str]


def one_line(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text and "\r" not in text, f"several lines: {text!r}"
    assert len(text) < LONGEST, f"{len(text)} characters: {text[:200]!r}"
    assert "\x1b" not in text and "\x00" not in text, f"control characters: {text!r}"
    return "refused"


def check_config(random: Random, ground: Path, here: Path) -> str:
    """Accepts what can be written and read again, and is the same then."""
    whole = random.choice(CONFIGS)
    file = here / "config.yaml"
    if random.random() < 0.3:
        file.write_bytes(mutated_bytes(yaml.safe_dump(whole).encode(), random))
    else:
        file.write_text(yaml.safe_dump(mutated(whole, random)))
    try:
        config = Config.load(file)
    except UserError as error:
        return one_line(error)
    config.save(here / "again.yaml")
    assert Config.load(here / "again.yaml") == config
    return "accepted"


def check_data(random: Random, ground: Path, here: Path) -> str:
    """Every problem that is accepted has a prompt and an answer that are texts of UTF-8."""
    records = [mutated(record, random) if random.random() < 0.4 else record for record in RECORDS]
    lines = "\n".join(json.dumps(record) for record in records).encode()
    name = random.choice(("a.jsonl", "a.jsonl", "a.json", "a.csv"))
    content = {"a.json": json.dumps(records).encode(), "a.csv": CSV.encode()}.get(name, lines)
    if name == "a.csv" or random.random() < 0.4:
        content = mutated_bytes(content, random)
    file = here / name
    file.write_bytes(content)
    try:
        problems = list(read_problems(str(file)))
    except UserError as error:
        return one_line(error)
    for problem in problems:
        assert isinstance(problem.answer, str) and problem.answer.encode() is not None
        assert problem.text or problem.messages or problem.token_ids
    return "accepted"


def check_manifest(random: Random, ground: Path, here: Path) -> str:
    """A damaged checkpoint is never taken; an older one is, and is what it was."""
    root = here / "checkpoints"
    shutil.copytree(ground / "checkpoints", root)
    folder = CheckpointFolder(root, keep=3)
    name = random.choice(("manifest.json", "manifest.json", "trainer.json", "state/shard"))
    file = folder.path(2) / name
    whole = file.read_bytes()
    if name == "state/shard" or random.random() < 0.5:
        file.write_bytes(mutated_bytes(whole, random))
    else:
        file.write_text(json.dumps(mutated(json.loads(whole), random)))
    folder.tidy()
    found = folder.newest()
    assert found is not None
    state, trainer = found
    assert (state / "shard").read_text() == f"weights of {trainer['step']}"
    assert trainer["step"] == 1 or (not folder.damaged and trainer == {"step": 2, "rollouts": {"epoch": 0}})
    assert all(len(fault) < LONGEST and "\n" not in fault for fault in folder.damaged.values())
    return "accepted" if trainer["step"] == 2 else "refused"


def check_table(random: Random, ground: Path, here: Path) -> str:
    """A table of contents and its files: a tensor of the right shape and type, or one line."""
    state = here / "state"
    shutil.copytree(ground / "state", state)
    file = state / random.choice((".metadata", ".metadata", "__0_0.distcp"))
    file.write_bytes(mutated_bytes(file.read_bytes(), random))
    conversion = here / "conversion.json"
    conversion.write_text(json.dumps(mutated(CONVERSION, random)))
    try:
        Conversion.read(here)
    except UserError as error:
        one_line(error)
    try:
        stored = StoredState(state)
        stored.check_shapes({"model.weight": (4, 3)}, "model.", 4, tied=False)
    except UserError as error:
        return one_line(error)
    return "accepted"


def check_folder(random: Random, ground: Path, here: Path) -> str:
    """A Hugging Face folder: config.json, the index, the header of the weights."""
    model = ground / random.choice(("qwen3", "llama"))
    folder = here / "model"
    shutil.copytree(model, folder)
    name = random.choice(("config.json", "config.json", "model.safetensors"))
    whole = (folder / name).read_bytes()
    if name == "config.json" and random.random() < 0.7:
        (folder / name).write_text(json.dumps(mutated(json.loads(whole), random)))
    elif name == "config.json":
        (folder / name).write_bytes(mutated_bytes(whole, random))
    else:
        header = 8 + int.from_bytes(whole[:8], "little")
        (folder / name).write_bytes(mutated_bytes(whole[:header], random) + whole[header:])
    try:
        described = read_hf_config(folder)
        reader = HFReader(folder)
        for tensor in reader.names()[:3]:
            assert reader.tensor(tensor).shape == reader.shape(tensor)
    except UserError as error:
        return one_line(error)
    assert described.num_layers >= 0 and described.vocab_size >= 0
    return "accepted"


def check_answers(random: Random, ground: Path, here: Path) -> str:
    """Makes of an engine's answer rollouts whose every number can be trained on, or one line."""
    requests = [
        SampleRequest(Prompt(id="p", text="p", token_ids=(1, 2), answer="1", domain="d"), seed=n) for n in (0, 1)
    ]
    sampling = Sampling(max_tokens=3)
    expected = Expected(vocab_size=50, version=4)
    try:
        rollouts = read_answers(mutated(ANSWERS, random), requests, sampling, expected)
    except BadAnswer as error:
        return one_line(error)
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert 1 <= len(rollout.response_ids) == len(rollout.behaviour_logp) <= 3
        assert all(0 <= token < 50 for token in rollout.response_ids)
        assert all(math.isfinite(logp) and logp <= 1e-3 for logp in rollout.behaviour_logp)
        assert rollout.policy_version == 4 and rollout.finish_reason in ("stop", "length")
    return "accepted"


CHECKS: dict[str, Check] = {
    "configs": check_config,
    "data": check_data,
    "manifests": check_manifest,
    "tables": check_table,
    "folders": check_folder,
    "answers": check_answers,
}
RECORDS = [
    {"problem": "1 + 1?", "answer": "2", "domain": "a", "id": "one"},
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "reward_model": {"ground_truth": 4, "style": "rule"}},
    {"question": "3 + 3?", "answer": 6.5, "extra_info": {"index": 3}},
]
CSV = 'problem,answer\n"1 + 1, or so?",2\n"a ""quoted"" one",3\n'
CONVERSION = {"family": "qwen3", "dtype": "float32", "tensors": {"a": "00"}, "proof": None}
ANSWERS = [
    {
        "output_ids": [5, 6, 7],
        "meta_info": {
            "output_token_logprobs": [[-0.5, 5, None], [-1.5, 6, None], [-0.25, 7, None]],
            "finish_reason": {"type": "length", "length": 3},
            "weight_version": "4",
        },
    },
    {
        "output_ids": [8],
        "meta_info": {
            "output_token_logprobs": [[-2.5, 8, None]],
            "finish_reason": {"type": "stop", "matched": 8},
            "weight_version": "4",
        },
    },
]
CONFIGS: list[dict] = []


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole documents that are damaged."""
    ground = tmp_path_factory.mktemp("whole")
    folder = CheckpointFolder(ground / "checkpoints", keep=3)
    for step in (1, 2):
        (folder.start(step) / "shard").write_text(f"weights of {step}")
        folder.finish(step, {"step": step, "rollouts": {"epoch": 0}})
    (ground / "state").mkdir()
    with PartFile(ground / "state", 0) as part:
        part.add("model.weight", (), (), torch.arange(12.0).view(4, 3))
    finish_state(ground / "state", part.entries)
    for family in ("qwen3", "llama"):
        make_hf_model(ground / family, family)
    CONFIGS[:] = [make_config(ground / "qwen3").model_dump(mode="json")]
    for file in sorted((ROOT / "examples").glob("*/*.yaml"))[:6]:
        raw = yaml.safe_load(file.read_text())
        if isinstance(raw, dict):
            CONFIGS.append(raw)
    return ground


def fuzz(check: Check, ground: Path, folder: Path, count: int, repeat: bool) -> Counter[str]:
    seen: Counter[str] = Counter()
    number = iter(range(10**9))

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=repeat,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.randoms(use_true_random=False))
    def draw(random: Random) -> None:
        here = folder / str(next(number))
        here.mkdir()
        seen[check(random, ground, here)] += 1
        shutil.rmtree(here)

    draw()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
def test_damaged(kind: str, ground: Path, tmp_path: Path) -> None:
    seen = fuzz(CHECKS[kind], ground, tmp_path, SHORT, repeat=True)
    assert seen["refused"], "no mutation did any damage: the fuzz tests nothing"


@pytest.mark.matrix
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", CHECKS)
def test_damaged_5000(kind: str, ground: Path, tmp_path: Path) -> None:
    seen = fuzz(CHECKS[kind], ground, tmp_path, LONG, repeat=False)
    print(f"{kind}: {dict(seen)}")
    assert seen["refused"] and seen["accepted"]
