"""The doctor where nothing is broken, and its parts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from rank_pool import Ranks
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.config import Config
from owpo_megatron.doctor import CHECKS, Finding, Scope, examine, probe
from owpo_megatron.errors import UserError


@pytest.mark.ranks
@pytest.mark.server
def test_the_whole_round_of_this_machine(engine_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real ranks and a real SGLang server. Memory, disk and host name depend on the machine: they may warn."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "--json", "told.json"])
    written = json.loads(Path("told.json").read_text())
    found = {finding["what"]: finding for finding in written["findings"]}
    assert result.exit_code == 0, result.output
    assert found["megatron-core"]["detail"] == "0.16.1"
    assert found["torch"]["status"] == found["engine"]["status"] == "ok"
    assert found["nodes"]["status"] != "fail"
    assert "GB/s" in found["all-reduce"]["detail"]  # a wrong sum has no bandwidth; a busy machine may have little
    assert "GB/s" in found["all-gather"]["detail"]
    assert "drew 4 tokens" in found["engine start"]["detail"]
    assert all(finding["remedy"] for finding in found.values() if finding["status"] != "ok")
    assert written["machine"]["cores"] >= 1
    assert list(tmp_path.iterdir()) == [tmp_path / "told.json"]  # nothing else is left behind


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from owpo_megatron.doctor import network

    monkeypatch.setattr(network.socket, "gethostname", lambda: 1 / 0)
    (finding,) = examine(Scope(), only=["hosts"])
    assert (finding.what, finding.status) == ("hosts", "fail")
    assert "ZeroDivisionError" in finding.detail


def test_what_is_asked_for_is_looked_at() -> None:
    assert {finding.what for finding in examine(Scope(), only=["hosts", "ports"])} == {"host name", "ports"}
    with pytest.raises(UserError, match="use one of packages"):
        list(examine(Scope(), only=["prots"]))
    with pytest.raises(UserError, match="give its configuration"):
        list(examine(Scope(), only=["model"]))


def test_a_run_without_an_engine_of_its_own_needs_no_port(tmp_path: Path) -> None:
    raw = {"model": {"path": str(tmp_path)}, "data": {"source": "task:cipher"}}
    config = Config.build(raw | {"rollout": {"prompts_per_step": 16, "replay": str(tmp_path)}})
    (ports,) = examine(Scope(config), only=["ports", "engine", "start"])
    assert ports.status == "ok"
    assert "none needed" in ports.detail


def test_nodes_are_merged_by_check() -> None:
    """Two nodes of two ranks: what is well everywhere is one row, what is not carries its node's name."""
    well = Finding("torch", "ok", "2.13.0")
    told = [
        (0, [well, Finding("disk", "ok", "9 GB")]),
        (1, []),
        (0, [well, Finding("disk", "fail", "0 GB", "free some")]),
        (1, []),
    ]
    assert probe._merged(told, ["a", "a", "b", "b"]) == [well, Finding("disk on b", "fail", "0 GB", "free some")]


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "12001"},
            probe.Place(rank=3, world=4, local_rank=1, address="n0", port=12001),
        ),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "17", "MASTER_ADDR": "n0"},
            probe.Place(rank=1, world=2, local_rank=0, address="n0", port=12017),
        ),
    ],
)
def test_a_rank_finds_its_place(env: dict[str, str], wanted: probe.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert probe.find_place() == wanted


def skews() -> tuple[float, float]:
    """Clocks of two ranks that agree, and one that is 3 s ahead."""
    import torch.distributed as dist

    from owpo_megatron.doctor.collectives import clock_skew

    dist.init_process_group("gloo")
    ahead = 3.0 * dist.get_rank()
    return clock_skew(dist.group.WORLD), clock_skew(dist.group.WORLD, clock=lambda: time.time() + ahead)


def test_a_clock_that_is_off_is_measured(ranks: Ranks) -> None:
    (agreeing, off), _ = ranks.run(2, skews)
    assert agreeing < 0.2
    assert abs(off - 3.0) < 0.2


def test_every_check_can_be_found() -> None:
    from importlib import import_module

    for check in CHECKS.values():
        assert callable(getattr(import_module(f"owpo_megatron.doctor.{check.module}"), check.function))
