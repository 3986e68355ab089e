"""Models by their name on the hub, wherever a folder is expected; the hub runs here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import Hub
from tiny import make_hf_model
from typer.testing import CliRunner

from owpo_megatron.cli import compare
from owpo_megatron.cli.main import app
from owpo_megatron.cli.options import load_config
from owpo_megatron.errors import UserError
from owpo_megatron.experiments.lab import Lab, load_section
from owpo_megatron.experiments.protocols import SelfEvolution, TwoStage
from owpo_megatron.hub import download_command, model_folder


def test_a_hub_name_becomes_a_local_folder(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub.models["team/tiny"] = {"config.json": b'{"hidden_size": 8}', "model.safetensors": b"w" * 10, "logo.png": b"no"}
    found = model_folder(Path("team/tiny"), "model.path", print)
    assert (found / "config.json").read_bytes() == b'{"hidden_size": 8}'
    assert (found / "model.safetensors").is_file() and not (found / "logo.png").exists()
    Path("run.yaml").write_text("model: {path: 'team/tiny'}\ndata: {source: 'task:cipher'}\n")
    assert load_config(Path("run.yaml"), []).model.path == found
    with pytest.raises(UserError, match="neither a folder here nor a model at"):
        model_folder(Path("team/other"), "model.path", print)
    Path("team/tiny").mkdir(parents=True)
    # a folder of that name comes first
    assert model_folder(Path("team/tiny"), "model.path", print) == Path("team/tiny")


def test_without_a_hub_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(UserError, match="hf download team/tiny --local-dir models/tiny"):
        model_folder(Path("team/tiny"), "model.path", print)
    assert model_folder(Path("no/such/folder"), "model.path", print) == Path("no/such/folder")


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "ftp://127.0.0.1:9", "127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_named(proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that httpx does not support here; a proxy where nobody listens is an ordinary error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UserError, match="model.path = team/tiny: .*hf download team/tiny") as error:
        model_folder(Path("team/tiny"), "model.path", print)
    assert ("of the proxy in the environment (ALL_PROXY" in str(error.value)) is ("://" in proxy)


def test_weights_that_the_cache_lacks_are_not_taken_for_a_model(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.models["team/tiny"] = {"config.json": b"{}", "model.safetensors": b"w"}
    small = model_folder(Path("team/tiny"), "model.path", print, weights=False)
    here = os.environ["HF_ENDPOINT"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert model_folder(Path("team/tiny"), "model.path", print, weights=False) == small
    with pytest.raises(UserError, match="hf download team/tiny --local-dir models/tiny"):
        model_folder(Path("team/tiny"), "model.path", print)
    monkeypatch.setenv("HF_ENDPOINT", here)
    hub.models["team/bare"] = {"config.json": b"{}"}
    with pytest.raises(UserError, match="has no weights"):
        model_folder(Path("team/bare"), "model.path", print)


def test_every_model_of_a_configuration_is_found(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.models = {f"team/{name}": {"config.json": b"{}", "model.safetensors": b"w"} for name in "abc"}
    common = "model: {path: team/a}\ndata: {source: 'task:cipher'}\n"
    Path("reference.yaml").write_text(common + "reference: {path: team/b}\n")
    Path("teacher.yaml").write_text(common + "algorithm: {name: mopd}\nteachers: [{name: t, path: team/c}]\n")
    reference = load_config(Path("reference.yaml"), []).reference.path
    loaded = load_config(Path("teacher.yaml"), [])
    for folder in (loaded.model.path, reference, loaded.teachers[0].path):
        assert folder is not None and (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", [Lab, TwoStage, SelfEvolution])
def test_comparisons_and_protocols_download_once_for_all_runs(
    kind: Any, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.models["team/tiny"] = {"config.json": b"{}", "model.safetensors": b"w"}
    run = {"model": {"path": "team/tiny"}, "data": {"source": "task:cipher"}, "eval": {"every": 5}}
    Path("lab.yaml").write_text(yaml.safe_dump({"run": run | {"optimizer": {"steps": 5}}, "methods": ["owpo"]}))
    section = compare.with_local_run(load_section(kind, Path("lab.yaml")), weights=True)
    lab = section if isinstance(section, Lab) else section.lab()
    assert (lab.base_run().model.path / "model.safetensors").is_file()
    assert lab.base_run().eval.every == 5 and section.run["eval"] == {"every": 5}
    assert compare.with_local_run(section, weights=True) is section


def test_serve_takes_a_name(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub.models["team/tiny"] = {"config.json": b"{}", "model.safetensors": b"w"}
    given: list[Path] = []

    def server(engine: Any, files: Path, *rest: Any) -> None:
        given.append(files)
        raise UserError("engine", "", "not started here")

    monkeypatch.setattr("owpo_megatron.engine.Server", server)
    Path("run.yaml").write_text("model: {path: team/tiny}\ndata: {source: 'task:cipher'}\n")
    for arguments in (["team/tiny"], ["-c", "run.yaml"]):
        assert "not started here" in str(CliRunner().invoke(app, ["serve", *arguments]).exception)
    assert given[0] == given[1] and (given[0] / "model.safetensors").is_file()


def test_an_evaluation_through_the_ranks_takes_a_name(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.models["team/tiny"] = {"config.json": b"{}", "model.safetensors": b"w"}
    Path("run.yaml").write_text("model: {path: team/tiny}\ndata: {source: 'task:cipher'}\n")
    given: list[Any] = []
    monkeypatch.setattr("owpo_megatron.cli.evaluate.run_trainer", lambda config, *rest, **more: given.append(config))
    result = CliRunner().invoke(app, ["eval", "-c", "run.yaml"])
    assert result.exception is None, result.exception
    assert (given[0].model.path / "model.safetensors").is_file()


@pytest.fixture
def job(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a job for two nodes, with a model that only the hub has."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    made = make_hf_model(tmp_path / "made")
    hub.models["team/tiny"] = {file.name: file.read_bytes() for file in made.iterdir() if file.is_file()}
    raw = {
        "name": "j", "model": {"path": "team/tiny"}, "data": {"source": "task:cipher"}, "parallel": {"dp": 2},
        "rollout": {"max_response_tokens": 8}, "engine": {"python": sys.executable},
        "launch": {"nodes": 2, "gpus_per_node": 0},
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "work" / "run.yaml"


@pytest.mark.slow
def test_a_job_downloads_where_it_is_submitted(job: Path) -> None:
    result = CliRunner().invoke(app, ["launch", "-c", str(job), "--dry-run"])
    assert result.exit_code == 0, (result.output, result.exception)
    (snapshot,) = (job.parents[1] / "hub_cache").glob("models--team--tiny/snapshots/*")
    assert (snapshot / "config.json").is_file() and not list(snapshot.glob("*.safetensors"))
    kubernetes = ["launch", "-c", str(job), "--with", "kubernetes", "launch.container=me/image:1"]
    refusal = CliRunner().invoke(app, kubernetes).exception
    assert "does not see" in str(refusal) and "hf download team/tiny --local-dir models/tiny" in str(refusal)
    cache = job.parents[1] / "hub_cache"
    mounted = f"launch.mounts=['{cache}:{cache}']"
    result = CliRunner().invoke(app, [*kubernetes, mounted])
    assert result.exit_code == 0, (result.output, result.exception)
    assert list(snapshot.glob("*.safetensors")) and str(snapshot) in "".join(
        file.read_text() for file in (job.parent / "runs" / "j").rglob("*.yaml")
    )


def test_the_named_command_downloads_the_same_revision() -> None:
    assert download_command("hub:a/b") == "hf download a/b --local-dir models/b"
