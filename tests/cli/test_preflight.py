"""Mistakes found before anything starts.

The engine's own interpreter is looked at in tests/rollout, the model's shape by the trainer.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from described import describe_model

from owpo_megatron.config import Config
from owpo_megatron.engine.context import check_context_length, context_length
from owpo_megatron.errors import UserError
from owpo_megatron.launch import preflight as room
from owpo_megatron.launch.preflight import preflight


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration with nothing wrong, and an engine that runs already."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = describe_model(tmp_path / "model")
    return {
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": str(model)},
        "data": {"source": "task:cipher"},
        "rollout": {"prompts_per_step": 16},
        "engine": {"urls": ["http://127.0.0.1:1"]},
    }


def mistake(raw: dict[str, Any], **changes: dict[str, Any]) -> UserError:
    for section, fields in changes.items():
        raw[section] = {**raw.get(section, {}), **fields}
    with pytest.raises(UserError) as caught:
        preflight(Config.build(raw))
    return caught.value


def with_context(raw: dict[str, Any], **fields: Any) -> None:
    describe_model(Path(raw["model"]["path"]), **fields)


def test_a_response_longer_than_the_context_is_refused(raw: dict[str, Any]) -> None:
    """The defaults ask for 8192 tokens; the remedy names the field and a length that works."""
    with_context(raw, max_position_embeddings=512)
    error = mistake(raw)
    assert (error.field, error.value) == ("rollout.max_response_tokens", 8192)
    assert "context of 512 tokens; set it to at most 256" in error.remedy
    raw["rollout"] |= {"max_response_tokens": 256}
    preflight(Config.build(raw))


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 400),
        ({"max_position_embeddings": 100, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 100),
        (
            {"max_position_embeddings": 100, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 25}},
            100,
        ),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "default"}}, 100),
        ({"hidden_size": 8}, None),
    ],
)
def test_the_context_is_the_engines(raw: dict[str, Any], fields: dict[str, Any], context: int | None) -> None:
    """The context is SGLang's get_context_length; `sglang.context_length` overrides it."""
    with_context(raw, **fields)
    assert context_length(Path(raw["model"]["path"]), {}) == context
    assert context_length(Path(raw["model"]["path"]), {"context-length": 64}) == 64


def test_the_longest_prompt_counts(raw: dict[str, Any]) -> None:
    with_context(raw, max_position_embeddings=512)
    raw["rollout"] |= {"max_response_tokens": 500}
    config = Config.build(raw)
    check_context_length(config, longest_prompt=12)
    with pytest.raises(UserError, match=r"longest prompt \(13 tokens\).*at most 499"):
        check_context_length(config, longest_prompt=13)
    with pytest.raises(UserError, match="leaves no room"):
        check_context_length(config, longest_prompt=512)


@pytest.mark.process
def test_a_rule_that_cannot_be_imported_is_found_here(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule is found from the working folder, as by a rank, without importing it into this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards_here.py").write_text("def exact(response, answer):\n    return response == answer\n")
    error = mistake(raw, verifier={"rule": "python:my_rewards_here:exacct"})
    assert error.field == "verifier.rule" and "has no attribute 'exacct'" in error.remedy
    assert "No module named 'my_reward'" in mistake(raw, verifier={"rule": "python:my_reward:exact"}).remedy
    raw["verifier"] = {"rule": "python:my_rewards_here:exact"}
    preflight(Config.build(raw))
    assert "my_rewards_here" not in sys.modules


@pytest.mark.process
def test_a_rule_for_reasoning_and_the_files_of_judges_are_found_here(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = mistake(raw, eval={"chain": "python:my_reward:exact"})
    assert error.field == "eval.chain" and "No module named 'my_reward'" in error.remedy
    (tmp_path / "judge.yaml").write_text("url: nowhere\n")
    sets = [{"name": "mine", "source": "task:cipher", "chain": "judge:judge.yaml"}]
    error = mistake(raw, eval={"sets": sets, "chain": None})
    assert error.field == "eval.sets.mine.chain" and "judge.yaml: url = nowhere" in error.remedy


def test_recomputation_as_megatron_core_wants_it(raw: dict[str, Any]) -> None:
    half = {"recompute_granularity": "full"}
    assert mistake(raw, megatron=half).field == "megatron.recompute_method"
    assert mistake(raw, megatron=half | {"recompute_method": "uniform"}).field == "megatron.recompute_num_layers"
    raw["megatron"] = half | {"recompute_method": "uniform", "recompute_num_layers": 1}
    preflight(Config.build(raw))


def test_nothing_wrong(raw: dict[str, Any]) -> None:
    preflight(Config.build(raw | {"parallel": {"tp": 2, "pp": 3}}))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "path", "no/such/folder"),
        ("data", "source", "task:chess"),
        ("data", "source", "problems.csv"),
        ("data", "source", "missing.jsonl"),
        ("data", "eval_source", "missing.parquet"),
        ("reference", "path", "no/such/folder"),
        ("rollout", "replay", "no/such/folder"),
        ("engine", "device", "cuda"),
        ("engine", "urls", ["127.0.0.1:30000"]),
        ("engine", "router", "http://127.0.0.1:30001"),
        ("engine", "count", 2),
        ("sync", "transport", "ipc"),
        ("sync", "fp8", True),
        ("sglang", "quantization", "fp8"),
        ("megatron", "fp8", "hybrid"),
    ],
)
def test_the_field_at_fault_is_named(raw: dict[str, Any], section: str, field: str, value: Any) -> None:
    error = mistake(raw, **{section: {field: value}})
    wanted = "data.source" if value == "task:chess" else f"{section}.{field}"
    assert error.field == wanted
    assert str(value if not isinstance(value, list) else value[0]) in str(error)
    assert error.remedy


def test_changes_of_weights_need_a_mirror(raw: dict[str, Any]) -> None:
    delta = {"transport": "disk", "delta": True}
    for engine in ({"urls": ["http://127.0.0.1:30000"]}, {"urls": [], "router": "http://127.0.0.1:30001"}):
        error = mistake(raw, sync=delta, engine=engine)
        assert error.field == "sync.delta" and "owpo serve --rendezvous" in error.remedy


def test_an_empty_model_folder(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "neither config.json" in mistake(raw, model={"path": str(tmp_path / "empty")}).remedy


def test_a_converted_model_has_its_hf_files_inside(raw: dict[str, Any], tmp_path: Path) -> None:
    describe_model(tmp_path / "megatron" / "hf")
    preflight(Config.build(raw | {"model": {"path": str(tmp_path / "megatron")}}))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": '{"model_type": "gpt2"}'}, "model_type gpt2 is not supported; supported: llama"),
        ({"config.json": '{"vocab_size": 4}'}, "model_type (missing) is not supported"),
        ({"config.json": '{"model_type": "llama"}'}, "add the model's own"),
        ({"tokenizer.json": None}, "holds no tokenizer; copy tokenizer.json"),
        ({"tokenizer.json": "{"}, "its tokenizer cannot be read"),
        ({"tokenizer.json": "[]"}, "its tokenizer cannot be read: not an object"),
        ({"tokenizer_config.json": "no"}, "its tokenizer cannot be read"),
        ({"tokenizer.json": None, "tokenizer.model": ""}, "which needs sentencepiece"),
        (
            {
                "tokenizer.json": None,
                "vocab.json": "{}",
                "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": []}}',
            },
            "code of its own, which is not executed",
        ),
    ],
)
def test_a_model_or_tokenizer_that_cannot_be_read(
    raw: dict[str, Any], files: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files alone show it, and so the first check of all takes a moment."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    for name, text in files.items():
        file = Path(raw["model"]["path"]) / name
        file.unlink() if text is None else file.write_text(text)
    assert said in mistake(raw).remedy


@pytest.mark.process
def test_it_takes_no_torch(raw: dict[str, Any]) -> None:
    """Torch and transformers take seconds to import; `owpo train` calls the check before them."""
    describe_model(Path(raw["model"]["path"]), model_type="gpt2")
    code = (
        "import json, sys\nfrom owpo_megatron.config import Config\n"
        "from owpo_megatron.launch.preflight import preflight\n"
        "try:\n    preflight(Config.build(json.loads(sys.argv[1])))\nexcept Exception as error:\n    print(error)\n"
        "print([name for name in ('torch', 'transformers', 'megatron', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(raw)], capture_output=True, text=True)
    assert "gpt2 is not supported" in done.stdout and done.stdout.endswith("[]\n"), done.stderr


def test_a_port_in_use(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the port's check: an engine of our own needs SGLang's environment."""
    monkeypatch.setattr(room, "check_environment", lambda *_: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert mistake(raw, engine={"urls": [], "port": port}).field == "engine.port"
    preflight(Config.build(raw))


def test_the_first_record_is_read(raw: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.touch()
    assert mistake(raw, data={"source": str(file)}).remedy == "holds no records"
    file.write_text('{"question": "1+1", "answer": "2"}\n')
    assert "lacks `problem`" in mistake(raw, data={"source": str(file)}).remedy


def test_a_run_name_stays_inside_runs_dir(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="plain folder name"):
        preflight(Config.build(raw | {"name": "../elsewhere"}))


def test_a_runs_dir_that_is_a_file(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="runs_dir"):
        preflight(Config.build(raw | {"runs_dir": str(tmp_path / "file")}))


@pytest.mark.parametrize(
    ("algorithm", "reference", "refused"),
    [
        ("opd", {}, True),
        ("mopd", {}, True),
        ("opd", {"refresh": "interval"}, True),  # nothing but its own past, and no rewards
        ("mopd", {"refresh": "interval"}, False),
        ("mopd", {"path": "model"}, False),
        ("opd", {"path": "model"}, False),
        ("owpo", {"refresh": "fixed"}, False),
        ("grpo", {}, False),
    ],
)
def test_distillation_needs_a_teacher(
    raw: dict[str, Any], algorithm: str, reference: dict[str, Any], refused: bool
) -> None:
    if "path" in reference:
        reference = {"path": raw["model"]["path"]}
    with_context(raw, max_position_embeddings=32768)
    raw |= {"algorithm": {"name": algorithm}, "reference": reference}
    if not refused:
        preflight(Config.build(raw))
        return
    error = mistake(raw)
    assert error.field == "teachers" and "own initial policy" in error.remedy and "reference.path" in error.remedy


def test_memory_in_turn_needs_engines_that_wait_and_cuda(raw: dict[str, Any]) -> None:
    raw["engine"] |= {"in_turn": True}
    error = mistake({**raw, "algorithm": {"tis_cap": 2.0}}, rollout={"max_response_tokens": 64, "max_staleness": 1})
    assert error.field == "engine.in_turn" and "set rollout.max_staleness 0" in error.remedy
    raw["rollout"]["max_response_tokens"] = 64
    preflight(Config.build(raw))
    error = mistake(raw, engine={"urls": [], "device": "cpu"})
    assert error.field == "engine.in_turn" and "leave it out on a CPU" in error.remedy
