"""HF folder -> megatron folder -> HF folder, bit for bit; a run's checkpoint to HF; what is refused.

Not covered: models of many gigabytes (`owpo bench convert`), a machine that loses its power. What the proof finds:
test_proof.py. That a megatron folder loads at tp = 2: test_parity.py.
"""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf
from owpo_megatron.conversion.unfinished import Unfinished
from owpo_megatron.errors import UserError
from owpo_megatron.methods import make_method
from owpo_megatron.run.checkpoints import CheckpointFolder

TOOLS = Path(__file__).parents[2] / "tools"
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3"},
    "llama": {"family": "llama"},
    "odd_vocabulary": {"family": "qwen3", "vocab_size": 97},
    "experts": {"family": "qwen3_moe", "vocab_size": 97},
    "mistral_window": {"family": "mistral", "sliding_window": 64},
    "odd_vocabulary_tied": {"family": "llama", "vocab_size": 101, "tied": True},
}
BESIDE = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "chat_template.jinja": "{{ messages }}"}


def script(name: str, *arguments: str) -> int:
    """Run a script of tools/ in this process; its exit code."""
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(autouse=True)
def _visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts set it in the process that they run in."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = make_hf_model(tmp_path / "hf")
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    hf_to_megatron(hf, tmp_path / "megatron")
    return tmp_path / "megatron"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", list(MODELS))
def test_round_trip_is_bitwise(name: str, tmp_path: Path) -> None:
    """Through the scripts."""
    hf = make_hf_model(tmp_path / "hf", **MODELS[name])
    for file, text in BESIDE.items():
        (hf / file).write_text(text)
    megatron, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    assert script("convert_hf_to_megatron", "--hf", str(hf), "--out", megatron) == 0
    assert script("convert_megatron_to_hf", "--megatron", megatron, "--out", back) == 0
    assert_same(tensors_of(Path(back)), tensors_of(hf))
    assert json.loads((Path(back) / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    assert {file: (Path(back) / file).read_text() for file in BESIDE} == BESIDE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"], "nothing is left behind"


def test_bfloat16_weights_stay_bfloat16(hf: Path, tmp_path: Path) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(hf).items()}
    save_file(rounded, hf / "model.safetensors")
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), rounded)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtype_of_the_result(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf, tmp_path / "megatron", "bfloat16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), {n: t.bfloat16() for n, t in tensors_of(hf).items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_from_either_folder(dtype: str, hf: Path, megatron: Path) -> None:
    """The megatron folder has float32 weights; a bfloat16 run rounds them as it rounds those of the HF folder."""
    results = []
    for folder in (hf, megatron):
        config = make_config(folder, reference={"path": str(folder)}, model={"path": str(folder), "dtype": dtype})
        policy = build_policy(config)
        policy.update(random_samples(1), make_method("owpo"))
        results.append([tensor.clone() for _, tensor in policy.named_weights()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def saved_run(hf: Path, root: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(checkpoint folder of a run of one update, the policy's weights by HF name)."""
    config = make_config(hf, runs_dir=str(root / "runs"), name="test")
    config.save(config.run_dir / "config.yaml")
    policy = build_policy(config)
    policy.update(random_samples(1), make_method("owpo"))
    weights = {name: tensor.clone() for name, tensor in policy.named_weights()}
    checkpoints = CheckpointFolder(config.run_dir / "checkpoints", keep=1)
    policy.save(checkpoints.start(1))
    return checkpoints.finish(1, {"step": 1}), weights


@pytest.mark.process
def test_checkpoint_of_a_run(hf: Path, tmp_path: Path) -> None:
    """The policy, not the reference, which differs from it after an update; template from the run's config."""
    checkpoint, weights = saved_run(hf, tmp_path)
    megatron_to_hf(checkpoint, tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), weights)
    assert not torch.equal(weights["lm_head.weight"], tensors_of(hf)["lm_head.weight"])
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == BESIDE["chat_template.jinja"]
    (checkpoint.parents[1] / "config.yaml").unlink()
    with pytest.raises(UserError, match="--hf-template"):
        megatron_to_hf(checkpoint, tmp_path / "again")
    megatron_to_hf(checkpoint, tmp_path / "again", template=hf)
    assert_same(tensors_of(tmp_path / "again"), weights)


@pytest.mark.process
def test_damaged_checkpoint_of_a_run(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One flipped byte: sizes are right, the manifest's hash is not."""
    checkpoint, _ = saved_run(hf, tmp_path)
    file = next((checkpoint / "state").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    arguments = ["--megatron", str(checkpoint), "--out", str(tmp_path / "back")]
    assert script("convert_megatron_to_hf", *arguments) == 2
    assert "has another content than when it was written" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@pytest.mark.process
def test_checkpoint_that_was_never_finished(hf: Path, tmp_path: Path) -> None:
    checkpoint, _ = saved_run(hf, tmp_path)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match="writing was interrupted"):
        megatron_to_hf(checkpoint, tmp_path / "back", template=hf)


# ---------------------------------------------------------------------------------------------- half-written, wrong
def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:400])


def config_says(megatron: Path, **fields: Any) -> None:
    file = megatron / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: shutil.rmtree(m / "state"), "has no state/"),
        (lambda m: shutil.rmtree(m / "hf"), "writing was interrupted"),
        (lambda m: (m / "state" / "metadata.json").unlink(), "has no metadata.json"),
        (lambda m: (m / "state" / ".metadata").unlink(), "has no .metadata"),
        (lambda m: (m / "state" / "common.pt").unlink(), "has no common.pt"),
        (lambda m: cut(m / "state" / ".metadata"), "is damaged"),
        (lambda m: cut(next((m / "state").glob("*.distcp"))), "is missing or truncated"),
        (lambda m: next((m / "state").glob("*.distcp")).unlink(), "is missing or truncated"),
        (lambda m: config_says(m, hidden_size=64), r"embedding.* is \[96, 48\] instead of \[96, 64\]"),
        (lambda m: config_says(m, intermediate_size=96), r"linear_fc1.* is \[4, 160, 48\] instead of \[4, 192, 48\]"),
        (lambda m: config_says(m, num_key_value_heads=4), "linear_qkv.weight is .* instead of"),
        (lambda m: config_says(m, vocab_size=120), r"embedding.* is \[96, 48\] instead of \[120, 48\]"),
        (lambda m: config_says(m, tie_word_embeddings=True), "a separate output layer"),
        (lambda m: config_says(m, model_type="llama"), "q_layernorm.weight is unexpected"),
        (lambda m: config_says(m, model_type="qwen2"), "linear_qkv.bias is missing"),
        (lambda m: config_says(m, model_type="gpt2"), "model_type gpt2 is not supported"),
    ],
)
def test_half_or_wrong_megatron_folder(
    damage: Callable[[Path], Any], message: str, megatron: Path, tmp_path: Path
) -> None:
    damage(megatron)
    with pytest.raises(UserError, match=message):
        megatron_to_hf(megatron, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"], "nothing is made"


def test_training_refuses_a_cut_megatron_folder(megatron: Path) -> None:
    cut(next((megatron / "state").glob("*.distcp")))
    with pytest.raises(UserError, match="is missing or truncated"):
        build_policy(make_config(megatron))


class Interrupted(Exception):
    pass


def interrupt(done: int, total: int) -> None:
    if done >= total // 2:
        raise Interrupted


class MarksThree:
    """`Unfinished.mark` of a conversion that is interrupted after three parts, however fast its threads are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._monkeypatch, self._mark, self._left = monkeypatch, Unfinished.mark, 3

    def __call__(self, work: Unfinished, part: str, record: Any) -> None:
        if part != "plan":
            if not self._left:
                raise Interrupted
            self._left -= 1
        self._mark(work, part, record)

    def __enter__(self) -> None:
        self._monkeypatch.setattr(Unfinished, "mark", lambda *args: self(*args))

    def __exit__(self, *_: object) -> None:
        self._monkeypatch.setattr(Unfinished, "mark", self._mark)


def go_on(convert: Callable[..., Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a conversion in the middle, then run it again: what was done by then is not written again."""
    journal = out.with_name(f".{out.name}.partial") / ".journal"
    times: dict[str, int] = {}

    def watch(done: int, total: int) -> None:
        times.update({file.name: file.stat().st_mtime_ns for file in journal.glob("*.json")})

    with MarksThree(monkeypatch), pytest.raises(Interrupted):
        convert(out=out, jobs=1)
    assert not out.exists()
    before = {file.name: file.stat().st_mtime_ns for file in journal.glob("*.json")}
    assert len(before) == 4, "the plan and three parts"
    convert(out=out, stage=lambda stage: watch)
    assert len(times) > len(before) and {name: times[name] for name in before} == before


def test_an_interrupted_conversion_goes_on(
    hf: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the final name is there before the second attempt, and after it every bit is right."""
    monkeypatch.setattr("owpo_megatron.conversion.parts._PART_BYTES", 20_000)
    go_on(partial(hf_to_megatron, hf), tmp_path / "second", monkeypatch)
    go_on(partial(megatron_to_hf, megatron), tmp_path / "back", monkeypatch)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(hf))
    megatron_to_hf(tmp_path / "second", tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(hf))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "back", "hf", "megatron", "second"]


def test_an_attempt_at_something_else_starts_over(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        hf_to_megatron(hf, tmp_path / "out", "bfloat16", lambda stage: interrupt)
    hf_to_megatron(hf, tmp_path / "out", "float32")
    megatron_to_hf(tmp_path / "out", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_existing_folder_is_never_touched(hf: Path, megatron: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for convert in (
        lambda: hf_to_megatron(hf, tmp_path / "there"),
        lambda: megatron_to_hf(megatron, tmp_path / "there"),
    ):
        with pytest.raises(UserError, match="exists already"):
            convert()
    assert list((tmp_path / "there").iterdir()) == []


def test_weights_of_another_dtype_need_a_choice(hf: Path, tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in tensors_of(hf).items()}, hf / "model.safetensors")
    with pytest.raises(UserError, match="dtype = float16 .*give --dtype"):
        hf_to_megatron(hf, tmp_path / "megatron")
    hf_to_megatron(hf, tmp_path / "megatron", "float32")


@pytest.mark.process
def test_script_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    """The tool as a user runs it: exit code 2, nothing but the line on stderr."""
    command = [sys.executable, str(TOOLS / "convert_hf_to_megatron.py"), "--hf", "nowhere", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --hf = nowhere: no such folder") and done.stderr.count("\n") == 1
