"""Copy of the weights next to an engine that is far from the trainer, updated over HTTP.

    POST /state {}                      -> {"state": "9f2c..."}, null while it has no complete weights
        POST /fill  {"folder": UPDATE}      -> {"folder": COPY}, all weights copied and verified
        POST /patch {"folder": UPDATE}      -> {"folder": COPY}, its changes applied and verified

UPDATE and COPY are folders in the format of weight_folder.py. Every request carries the engine's key. A refused request
gets status 409 with {"message": ...}; /state then returns what is left.
"""

from __future__ import annotations

import hmac
import http.server
import json
import socketserver
import threading
from pathlib import Path
from typing import Any

from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.sync.delta.weight_folder import WeightFolder

POLL_SECONDS = 0.05  # between checks for shutdown


class Mirror:
    """Serves on a free port from its own thread until `close`, which removes the copy.

    Args:
        host: address to listen on.
        key: bearer token that requests must carry.
        copies: parent folder of the copy, which is made at the first update and is as large as the model.
    """

    def __init__(self, host: str, key: str, copies: Path):
        self._key, self._copies = key, copies.absolute()
        self._folder: WeightFolder | None = None
        self._one_at_a_time = threading.Lock()
        self._actions = {"/state": self._state, "/fill": self._fill, "/patch": self._patch}
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                status, answer = mirror.answer(self.path, self.headers.get("authorization", ""), self._body())
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("content-length", 0)))

            def log_message(self, *_: object) -> None:
                pass

        # not ThreadingHTTPServer, which resolves the name of its own address and may block on that
        self._http = socketserver.ThreadingTCPServer((host, 0), Handler)
        self._http.daemon_threads = True
        self.port: int = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(POLL_SECONDS,), daemon=True, name="mirror").start()

    def answer(self, path: str, authorization: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and content for a request."""
        if not hmac.compare_digest(authorization.encode(), f"Bearer {self._key}".encode()):
            return 401, {"message": "wrong key"}
        action = self._actions.get(path)
        if action is None:
            return 404, {"message": f"no {path}"}
        with self._one_at_a_time:
            try:
                return 200, action(json.loads(body))
            except (EngineError, UserError) as error:
                return 409, {"message": str(error)}
            except FileNotFoundError as error:
                return 409, {"message": f"{error}: sync.folder must be visible from here under the same path"}
            except (OSError, ValueError, KeyError) as error:
                return 409, {"message": f"{type(error).__name__}: {error}"}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        with self._one_at_a_time:
            self._drop()

    # ------------------------------------------------------------------------------------------ actions
    def _state(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"state": None if self._folder is None else self._folder.state}

    def _fill(self, body: dict[str, Any]) -> dict[str, Any]:
        self._drop()  # first: there may be no room for two copies
        self._folder = WeightFolder(self._copies)
        self._folder.fill(Path(body["folder"]))
        return {"folder": str(self._folder.path)}

    def _patch(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._folder is None:
            raise EngineError("there are no weights here to patch")
        self._folder.patch(Path(body["folder"]))
        return {"folder": str(self._folder.path)}

    def _drop(self) -> None:
        if self._folder is not None:
            self._folder.close()
            self._folder = None
