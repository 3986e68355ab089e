"""Mistakes in a configuration file or an override: each is one line that names the field, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from owpo_megatron.config import Config, ModelConfig
from owpo_megatron.config.file import read_mapping
from owpo_megatron.errors import UserError
from owpo_megatron.experiments.lab import Lab

RUN = "model: {path: m}\ndata: {source: 'task:cipher'}\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: caf\xe9\n", ["config = ", "not valid YAML", "utf-8"]),
        (b"model:\n\tpath: m\n", ["config = ", "not valid YAML", "line 2"]),
        (b"optimizer: {lr: 1}\nname: a\noptimizer: {steps: 2}\n", ["optimizer appears twice"]),
        (b"include: [a, b]\n", ["include = ['a', 'b']", "name one file"]),
        (b"- a\n", ["must contain a mapping"]),
    ],
)
def test_a_file_that_is_none(content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_mapping(tmp_path / "run.yaml")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; give an existing YAML file"):
        read_mapping(tmp_path)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr=inf", "optimizer.lr = inf: input should be a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr = nan: input should be"),
        ("optimizer.lr=[1", "optimizer.lr = [1: is not a YAML value"),
        ("optimizer={lr: 1, lr: 2}", "optimizer = {lr: 1, lr: 2}: is not a YAML value"),
        ("rollout.temperature=.inf", "rollout.temperature = inf: input should be a finite number"),
        ("eval.pass_at=[]", "eval.pass_at = []: list should have at least 1 item"),
        ("eval.pass_at=[0]", "eval.pass_at.0 = 0: input should be greater than 0"),
        ("eval=", "eval = None: is a section: write its fields"),
        ("model=m", "model = m: is a section: write its fields"),
        ("verifier.rule=maths", "verifier.rule = maths: use one of auto, math, "),
        ("launch.time=soon", "launch.time = soon: write it as sbatch takes it: minutes, "),
        ("teachers=[{name: a, pth: b}]", "teachers.0.pth = b: unknown field; did you mean path?"),
    ],
)
def test_an_override(override: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(UserError) as caught:
        Config.load(tmp_path / "run.yaml", [override])
    assert str(caught.value).startswith(line)


def test_an_unknown_field_behind_a_name_of_ones_own(tmp_path: Path) -> None:
    """`regimes` is a mapping from names to sections, not a section."""
    (tmp_path / "lab.yaml").write_text("run: {}\nmethods: [owpo]\nregimes: {noisy: {sett: {}}}\n")
    with pytest.raises(UserError, match="regimes.noisy.sett = {}: unknown field; did you mean set"):
        Lab.load(tmp_path / "lab.yaml")


def test_the_former_name_of_the_head_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert ModelConfig(path=Path("x"), logprob="fp8_refined").head == "fp8_refined"  # type: ignore[call-arg]
    assert "model.logprob is now model.head" in caplog.text
