"""`owpo push` and hub names of models, against a hub that runs here: what is sent, what is asked, what is refused."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.cli.options import load_config
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.hub import model_folder


class Hub(BaseHTTPRequestHandler):
    """The few routes of the hub's API that an upload and a download use."""

    created: list[dict[str, Any]]
    uploaded: dict[str, bytes]
    models: dict[str, dict[str, bytes]]
    refuses: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.refuses:
            self._answer(403, {"error": "this token may not write"})
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self._answer(200, {"url": f"http://{self.headers['Host']}/me/{json.loads(body)['name']}"})
        elif self.path.endswith("/preupload/main"):
            wanted = [one["path"] for one in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]
            self._answer(200, {"files": files})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.uploaded[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(
                200,
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1",
                    "commitOid": "1" * 40,
                    "success": True,
                },
            )
        else:
            self._answer(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = "/".join(self.path.split("/")[3:5]) if self.path.startswith("/api/models/") else ""
        if self.path == "/":
            self._answer(200, {})
        elif name in self.models and "/tree/" in self.path:
            files = self.models[name].items()
            self._answer(
                200, [{"type": "file", "path": path, "size": len(data), "oid": "3" * 40} for path, data in files]
            )
        elif name in self.models:
            files = [{"rfilename": file} for file in self.models[name]]
            self._answer(200, {"id": name, "sha": "2" * 40, "siblings": files, "private": False, "tags": []})
        elif "/resolve/" in self.path:
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            data = self.models[repo][rest.partition("/")[2]]
            self.send_response(200)
            for header, value in {
                "ETag": f'"{len(data)}"', "X-Repo-Commit": "2" * 40, "Content-Length": str(len(data))
            }.items():  # fmt: skip
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    def _answer(self, code: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    import huggingface_hub.constants as constants

    kind = type("ThisHub", (Hub,), {"created": [], "uploaded": {}, "models": {}, "refuses": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield kind
    server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with an evaluation and a result."""
    raw = {"name": "a", "runs_dir": str(tmp_path), "model": {"path": "base"}, "data": {"source": "task:cipher"}}
    config = Config.build(raw | {"optimizer": {"steps": 2}, "checkpoint": {"push_to_hub": "me/from-config"}})
    folder = config.run_dir
    config.save(folder / "config.yaml")
    scores = {"pass@1": 0.75, "problems": 40, "samples": 8}
    lines = [
        {"step": 1, "reward_mean": 0.5, "seconds": {"total": 1.0}},
        {"step": 2, "reward_mean": 0.6, "seconds": {"total": 1.0}},
        {"step": 2, "eval": scores},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"name": "a", "parallel": {"tp": 2}}))
    (folder / "eval").mkdir()
    held = {"set": "held_out", "title": "held out", "problems": 40, "samples": 8}
    held["metrics"] = {"pass@1": {"value": 0.75, "low": 0.7, "high": 0.8}}
    (folder / "eval" / "step_000002.json").write_text(json.dumps(held))
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps({"_name_or_path": "Qwen/Qwen3-0.6B"}))
    (folder / "hf" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_result_arrives_with_a_card_of_its_numbers(hub: type[Hub], run: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(run), "--repo", "me/mine", "--private"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert hub.created[0]["name"] == "mine" and hub.created[0]["organization"] == "me"
    assert set(hub.uploaded) == {"README.md", "config.json", "model.safetensors"}
    assert hub.uploaded["model.safetensors"] == b"weights"
    card = hub.uploaded["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen3-0.6B" and "owpo" in front["tags"]
    (found,) = front["model-index"][0]["results"]
    assert found["metrics"] == [{"type": "pass@1", "name": "Pass@1", "value": 75.0}]
    assert "| held out | Pass@1 | 75.0 % | 70.0 - 80.0 % | 40 x 8 |" in card
    assert "steps: 2" in card and str(run.parent) not in card


def test_a_card_alone_and_a_repository_from_the_configuration(run: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(run), "--card-only"])
    assert result.exit_code == 0 and "# from-config" in (run / "hf" / "README.md").read_text()


def test_a_refusal_is_one_line(hub: type[Hub], run: Path) -> None:
    hub.refuses = True
    result = CliRunner().invoke(app, ["push", str(run), "--repo", "me/mine"])
    assert isinstance(result.exception, UserError) and "check the token" in str(result.exception)
    assert "\n" not in str(result.exception)


def test_what_cannot_be_pushed(run: Path) -> None:
    assert "write OWNER/NAME" in str(CliRunner().invoke(app, ["push", str(run), "--repo", "mine"]).exception)
    (run / "hf" / "config.json").unlink()
    assert "has no hf/" in str(CliRunner().invoke(app, ["push", str(run), "--repo", "me/mine"]).exception)


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
