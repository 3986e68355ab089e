"""Jobs that cannot work are refused before sbatch is called; a mistake costs hours in a queue."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from described import describe_model
from owpo import ROOT, Owpo, write_config
from tiny import make_hf_model

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.launch.checks import check_job, check_model, time_seconds
from owpo_megatron.launch.job import Job


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A job with nothing wrong: four nodes of 8 GPUs, and two for engines."""
    model = describe_model(tmp_path / "model")
    return {
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": str(model), "dtype": "bfloat16"},
        "data": {"source": "task:cipher"},
        "parallel": {"tp": 8, "dp": 4},
        "engine": {"python": sys.executable, "tp": 2},
        "launch": {"nodes": 4, "engine_nodes": 2, "time": "04:00:00"},
    }


def check(raw: dict[str, Any], changes: dict[str, Any], **more: Any) -> None:
    merged = {key: {**raw[key], **value} if isinstance(value, dict) and key in raw else value
              for key, value in {**raw, **changes}.items()}  # fmt: skip
    check_job(Job(Config.build(merged), Path.cwd(), **more))


def test_nothing_wrong(raw: dict[str, Any]) -> None:
    check(raw, {})
    check(raw, {"launch": {"engine_nodes": 0}, "sglang": {"mem_fraction_static": 0.3}})
    check(raw, {"launch": {"engine_nodes": 0}, "sglang": {"max_total_tokens": 200000}})
    check(raw, {"sync": {"transport": "distributed"}})
    one = {"nodes": 1, "engine_nodes": 0}
    bounded = {"mem_fraction_static": 0.3}
    check(raw, {"launch": one, "parallel": {"dp": 1}, "sync": {"transport": "ipc"}, "sglang": bounded})
    check(raw, {"launch": {"engine_nodes": 0}, "sync": {"transport": "ipc"}, "sglang": bounded})
    check(raw, {"launch": {"gpus_per_node": 0, "engine_nodes": 0}, "parallel": {"tp": 2, "dp": 2}})


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"parallel": {"dp": 2}}, "nodes * ranks per node", "set parallel.dp=4"),
        ({"launch": {"nodes": 3}}, "nodes * ranks per node", "3 * 8 = 24"),
        ({"launch": {"ranks_per_node": 9}}, "launch.ranks_per_node", "8 GPUs"),
        ({"parallel": {"tp": 16, "dp": 2}}, "parallel.tp", "raise parallel.pp"),
        ({"model": {"dtype": "float32"}}, "model.dtype", "set model.dtype=bfloat16"),
        ({"model": {"path": "no/such/model"}}, "model.path", "no such folder"),
        ({"data": {"source": "missing.jsonl"}}, "data.source", "missing.jsonl"),
        ({"launch": {"engine_nodes": 0}}, "launch.engine_nodes", "sglang.mem_fraction_static"),
        ({"sync": {"transport": "ipc"}}, "sync.transport", "use distributed for engine nodes"),
        ({"sync": {"transport": "distributed"}, "launch": {"engine_nodes": 0}}, "sync.transport", "takes a GPU into"),
        ({"engine": {"urls": ["http://a:1"]}}, "launch.engine_nodes", "no engine is started"),
        ({"engine": {"tp": 3}}, "engine.tp", "must divide the 8 GPUs"),
        ({"engine": {"python": "/no/python"}}, "engine.python", "no such interpreter"),
        ({"launch": {"python": "/no/python"}}, "launch.python", "no such interpreter"),
        ({"launch": {"time": "5"}}, "launch.time", "signal_seconds"),
        ({"launch": {"time": "four hours"}}, "launch.time", "as sbatch takes it"),
        ({"launch": {"container": "/no/image.sif"}}, "launch.container", "no such image file"),
        ({"launch": {"container": "owpo:gpu", "mounts": ["/no/data:/data"]}}, "launch.mounts", "does not exist"),
        ({"launch": {"mounts": ["/data"]}}, "launch.mounts", "SOURCE:DESTINATION"),
        ({"launch": {"env": {"A-B": 1}}}, "launch.env", "shell"),
        ({"launch": {"sbatch": ["constraint=h100"]}}, "launch.sbatch", "--constraint"),
        ({"name": "my run"}, "name", "letters"),
    ],
)
def test_the_mistake_is_named(raw: dict[str, Any], changes: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check(raw, changes)
    assert caught.value.field == field
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("more", "field"), [({"seeds": (1, 1)}, "--seeds"), ({"seeds": (1, 2), "links": 2}, "--chain")]
)
def test_arrays_and_chains(raw: dict[str, Any], more: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        check(raw, {}, **more)
    assert caught.value.field == field


def test_tp_that_does_not_divide_the_heads(raw: dict[str, Any], tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "qwen3")
    config = Config.build(raw | {"model": {"path": str(model)}, "parallel": {"tp": 8, "dp": 4}})
    with pytest.raises(UserError, match="parallel.tp = 8: must divide the model's 4 attention heads"):
        check_model(Job(config, tmp_path))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("4:00:00", 14400), ("1-12", 129600), ("1-0:30", 88200), ("2-01:02:03", 176523)],
)
def test_time_limits_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds


@pytest.mark.process
def test_the_command_leaves_nothing_behind(raw: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", raw)
    refused = Owpo(tmp_path, "launch", "-c", str(config), "--nodes", "2")
    assert refused.wait() == 2
    assert refused.stderr.startswith("error: nodes * ranks per node = 2 * 8 = 16") and refused.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.process
def test_a_dry_run_shows_the_script_and_leaves_nothing_behind(raw: dict[str, Any], tmp_path: Path) -> None:
    model = make_hf_model(
        tmp_path / "qwen3", num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=9216
    )
    config = write_config(tmp_path / "run.yaml", raw, {"model": {"path": str(model)}})
    shown = Owpo(tmp_path, "launch", "-c", str(config), "--time", "1-00:00:00", "--account", "lab", "--dry-run").done()
    assert shown.startswith("#!/bin/bash\n# run: 32 ranks on 4 nodes, 8 engines on 2 more nodes.\n")
    assert "#SBATCH --time=1-00:00:00\n#SBATCH --account=lab\n" in shown and f"--chdir={ROOT}" in shown
    assert not (tmp_path / "runs").exists()
