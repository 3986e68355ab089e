"""The DAPO-Math example on records of the data set's own schema, with a real SGLang server.

The model is random: that it learns nothing is expected, and that answers can be right is in tests/verifiers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from owpo import ROOT, steps_of
from rank_pool import Ranks
from warm import train as train_warm

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import load_rollouts, start_fleet

pytestmark = pytest.mark.server

DATA = Path(os.environ.get("OWPO_TEST_DATA", ROOT.parent / "shared" / "data"))
SAMPLE = DATA / "dapo_schema_sample.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's random model with a byte-level tokenizer."""
    sys.path.insert(0, str(ROOT / "examples" / "dapo_math_cpu"))
    from make_model import make_random_model

    folder = tmp_path_factory.mktemp("dapo") / "model"
    make_random_model(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = EngineConfig(python=engine_python, device="cpu")
    with start_fleet(config, model, "float32", {}, tmp_path_factory.mktemp("dapo_server")) as fleet:
        yield fleet.clients[0].url


def train(ranks: Ranks, model: Path, url: str, source: Path, here: Path, *overrides: str) -> tuple[Path, str]:
    """Run the example with this file; return (run folder, its output)."""
    config = ROOT / "examples" / "dapo_math_cpu" / "config.yaml"
    own = [f"model.path={model}", f"data.source={source}", f"runs_dir={here}", f"engine.urls=['{url}']"]
    return here / "dapo_math_cpu", train_warm(ranks, config, *own, *overrides)


def test_six_records_in_parquet(ranks: Ranks, model: Path, url: str, tmp_path: Path) -> None:
    """One of six appears twice and one is too long; a step of four takes the other four, the second all again."""
    texts = [f"What is {number} + {number}?" for number in range(4)]
    records = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": text, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * number), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"uuid-{number}"},
        }
        for number, text in enumerate([*texts, "Why " + "so " * 300 + "long?"])
    ]
    table = pyarrow.Table.from_pylist([*records, records[0]])
    pyarrow.parquet.write_table(table, tmp_path / "dapo.parquet")
    run_dir, said = train(ranks, model, url, tmp_path / "dapo.parquet", tmp_path, "optimizer.steps=2")
    assert "4 of 6 problems (left out: 1 repeated, 1 too long)" in said
    lines = steps_of(run_dir)
    for number, line in enumerate(lines, 1):
        rollouts = load_rollouts(run_dir / "rollouts" / f"step_{number:06d}.jsonl")
        assert {rollout.prompt.id for rollout in rollouts} == {f"uuid-{index}" for index in range(4)}
        assert {rollout.prompt.answer for rollout in rollouts} == {"0", "2", "4", "6"}
        assert all(text in " ".join(r.prompt.text for r in rollouts) for text in texts)
        assert sum(line["verifier"].values()) == 16 and line["groups"] == 4
        assert line["mismatch"] < 1e-4
    assert [line["policy_version"] for line in lines] == [0, 1]


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"no {SAMPLE}; set OWPO_TEST_DATA")
def test_the_published_records(ranks: Ranks, model: Path, url: str, tmp_path: Path) -> None:
    """Real problems, all of their lengths."""
    records = [json.loads(text) for text in SAMPLE.read_text().splitlines()]
    overrides = ("optimizer.steps=1", "data.max_prompt_tokens=3000", "rollout.prompts_per_step=4")
    run_dir, _ = train(ranks, model, url, SAMPLE, tmp_path, *overrides)
    (line,) = steps_of(run_dir)
    rollouts = load_rollouts(run_dir / "rollouts" / "step_000001.jsonl")
    published = {record["prompt"][0]["content"].strip(): record["reward_model"]["ground_truth"] for record in records}
    for rollout in rollouts:
        assert any(text in rollout.prompt.text and rollout.prompt.answer == published[text] for text in published)
    assert len({rollout.prompt.id for rollout in rollouts}) == 4
    assert line["mismatch"] < 1e-4 and sum(line["verifier"].values()) == 16
