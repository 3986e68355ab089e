"""A hub on this machine: the few routes of its API that uploads and downloads use."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler
from typing import Any


class Hub(BaseHTTPRequestHandler):
    """Keeps what it was sent, and the models that it has: {OWNER/NAME: {file: content}}."""

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
