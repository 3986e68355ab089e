"""`owpo config`: show, explain, init."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from owpo_megatron.cli.config import starter
from owpo_megatron.cli.main import app
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["config", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\ndata: {source: 'task:cipher'}\noptimizer: {lr: 0.5}\n")
    return path


def test_show_prints_what_loads_again(file: Path, tmp_path: Path) -> None:
    shown = invoke("show", "-c", str(file), "parallel.tp=2")
    (tmp_path / "again.yaml").write_text(shown)
    assert Config.load(tmp_path / "again.yaml") == Config.load(file, ["parallel.tp=2"])
    changed = yaml.safe_load(invoke("show", "-c", str(file), "--changed"))
    changed.pop("reference", None)  # resolved by the method
    assert changed == {"model": {"path": "m"}, "data": {"source": "task:cipher"}, "optimizer": {"lr": 0.5}}


def test_explain_a_field_a_section_and_a_hyper_parameter() -> None:
    assert invoke("explain", "reference.every").startswith("reference.every: integer > 0, default `80`")
    section = invoke("explain", "rollout")
    assert all(f"rollout.{name}" in section for name in ("group_size", "temperature", "max_rounds"))
    assert "algorithm.weight_low of owpo: default 0.8. Lower bound of the weight w." in invoke(
        "explain", "algorithm.weight_low"
    )
    everything = invoke("explain")
    assert "launch.max_requeues" in everything and "sinks.to" in everything


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("optimizr.lr", "did you mean optimizer.lr"),
        ("warmup_steps", "did you mean optimizer.warmup_steps"),
        ("name.first", "name is a value, not a section"),
    ],
)
def test_a_field_that_is_none(field: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        invoke("explain", field)


@pytest.mark.parametrize("gpus", [0, 1, 4, 8])
@pytest.mark.parametrize("data", ["train.jsonl", "task:cipher"])
def test_a_starter_file_loads(gpus: int, data: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(starter("mine", "models/m", data, "held.jsonl", gpus))
    config = Config.load(path)
    assert config.name == "mine" and config.parallel.world_size == max(1, gpus)
    assert config.data.eval_source == (None if data.startswith("task:") else "held.jsonl")


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    target = tmp_path / "run.yaml"
    assert "owpo train -c" in invoke("init", str(target))
    with pytest.raises(UserError, match="exists already"):
        invoke("init", str(target))
    invoke("init", str(target), "--force", "--gpus", "2")
    assert Config.load(target).parallel.tp == 2


@pytest.mark.parametrize(
    ("context", "gpus", "lengths"),
    [(512, 0, (256, 256)), (512, 8, (256, 256)), (4096, 8, (512, 3584)), (32768, 8, (512, 4096)), (128, 0, (64, 64))],
)
def test_lengths_fit_into_the_models_context(context: int, gpus: int, lengths: tuple[int, int], tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
    invoke("init", str(tmp_path / "run.yaml"), "--model", str(model), "--gpus", str(gpus))
    config = Config.load(tmp_path / "run.yaml")
    assert (config.data.max_prompt_tokens, config.rollout.max_response_tokens) == lengths
    assert sum(lengths) <= context


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, "completion"),
        ({"tokenizer_config.json": "{}"}, "completion"),
        ({"tokenizer_config.json": "not JSON"}, "completion"),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, "chat"),
        ({"chat_template.jinja": "{{ messages }}"}, "chat"),
    ],
)
def test_the_template_is_the_one_that_the_tokenizer_has(files: dict[str, str], template: str, tmp_path: Path) -> None:
    model = tmp_path / "m"
    (model / "hf").mkdir(parents=True)  # a converted folder keeps them there
    for name, content in ({"config.json": "{}"} | files).items():
        (model / "hf" / name).write_text(content)
    invoke("init", str(tmp_path / "run.yaml"), "--model", str(model))
    assert Config.load(tmp_path / "run.yaml").data.template == template
    invoke("init", str(tmp_path / "task.yaml"), "--model", str(model), "--data", "task:cipher")
    assert Config.load(tmp_path / "task.yaml").data.template == "raw"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model"):
        invoke("init", str(tmp_path / "run.yaml"), "--model", str(tmp_path))


def test_columns_of_other_names_are_written(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"question": "1+1?", "target": 2}\n')
    invoke("init", str(tmp_path / "run.yaml"), "--data", str(tmp_path / "d.jsonl"))
    columns = Config.load(tmp_path / "run.yaml").data.columns
    assert columns == {"problem": "question", "answer": "target"}
    (tmp_path / "d.jsonl").write_text('{"problem": "1+1?", "answer": 2}\n')
    invoke("init", str(tmp_path / "run.yaml"), "--data", str(tmp_path / "d.jsonl"), "--force")
    assert Config.load(tmp_path / "run.yaml").data.columns == {}
