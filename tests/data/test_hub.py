"""Hub names, through huggingface_hub and a local server that answers as the hub does. The real hub is not asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from owpo_megatron.data import check_source, load_problems
from owpo_megatron.data.hub import HubName, hub_files
from owpo_megatron.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/problems"


class Hub(BaseHTTPRequestHandler):
    """One data set at one commit: what snapshot_download asks for, and nothing else."""

    files: dict[str, bytes] = {}

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/datasets/{REPOSITORY}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
            known = path.endswith(("/main", COMMIT))
            return self._send(
                200 if known else 404, content, body, {} if known else {"X-Error-Code": "RevisionNotFound"}
            )
        if path.startswith(f"/api/datasets/{REPOSITORY}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return self._send(200, json.dumps(tree).encode(), body)
        name = path.removeprefix(f"/datasets/{REPOSITORY}/resolve/{COMMIT}/")
        if name in self.files:
            data = self.files[name]
            return self._send(200, data, body, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        return self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """The files that the hub serves; the cache is empty at the start."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    Hub.files = {}
    yield Hub.files
    server.shutdown()
    server.server_close()


def parquet(tmp_path: Path, *records: dict) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


def record(number: int) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"What is {number} + {number}?", "role": "user"}],
        "reward_model": {"ground_truth": str(2 * number), "style": "rule"},
        "extra_info": {"index": f"uuid-{number}"},
    }


def test_a_set_of_the_hub_is_downloaded_once_and_read(hub: dict[str, bytes], tmp_path: Path) -> None:
    hub["README.md"] = b"# not data"
    hub["data/train-00000.parquet"] = parquet(tmp_path, record(1), record(2), record(1))
    hub["data/train-00001.parquet"] = parquet(tmp_path, record(3))
    hub["data/test-00000.parquet"] = parquet(tmp_path, record(4))
    problems, report = load_problems(f"hub:{REPOSITORY}")
    assert [(p.id, p.answer) for p in problems] == [("uuid-1", "2"), ("uuid-2", "4"), ("uuid-3", "6")]
    assert (report.read, report.repeated, report.source) == (4, 1, f"hub:{REPOSITORY}")
    test, _ = load_problems(f"hub:{REPOSITORY}:data/test-*.parquet")
    assert [p.id for p in test] == ["uuid-4"]
    assert [p.id for p in load_problems(f"hub:{REPOSITORY}@{COMMIT}:data/test-*")[0]] == ["uuid-4"]


def test_the_cache_serves_without_a_hub(hub: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub["problems.jsonl"] = b'{"problem": "1+1?", "answer": "2"}\n'
    (first,) = hub_files(f"hub:{REPOSITORY}")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert hub_files(f"hub:{REPOSITORY}") == [first]
    with pytest.raises(UserError, match=r"data.source = hub:other/set: http://127.0.0.1:9 cannot be reached .* HF_"):
        check_source("hub:other/set")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:problems", "write hub:OWNER/NAME, hub:OWNER/NAME@REVISION or hub:OWNER/NAME:FILES"),
        ("hub:nobody/nothing", "no such data set at http://127.0.0.1"),
        (f"hub:{REPOSITORY}@v2", "has no revision v2"),
        (f"hub:{REPOSITORY}:*.csv", r"no file matches \*.csv"),
        (f"hub:{REPOSITORY}", "it has no .parquet or .jsonl file"),
    ],
)
def test_a_mistake_names_the_remedy(hub: dict[str, bytes], source: str, message: str) -> None:
    hub["README.md"] = b"# not data"
    with pytest.raises(UserError, match=f"data.source = {source.replace('*', '.')}: {message}"):
        check_source(source)


def test_names() -> None:
    assert HubName.parse("hub:a/b", "x") == HubName("a/b", None, None)
    name = HubName.parse("hub:Idavidrein/gpqa@refs/convert/parquet:gpqa_diamond/train/*.parquet", "x")
    assert name == HubName("Idavidrein/gpqa", "refs/convert/parquet", "gpqa_diamond/train/*.parquet")
