"""An HTTP server with SGLang's control and weight routes, which notes what it is asked for and what it is sent.

No engine: it draws nothing and has no model. Weights arrive as they do at an engine: pickled, by value or by the name
of shared memory. Tests with a real one prove that SGLang takes the same requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


def digest(tensor: torch.Tensor) -> str:
    """The tensor's dtype, shape and bits."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


class RecordingServer:
    """Listens on a port of its own until `close`.

    Attributes:
        calls: what was asked for, in order: "pause_generation", "update_weight_version -1", ... A mark
            (EngineClient.mark) is "mark".
        updates: for each update that was begun, the (name, digest) pairs that it brought.
        saves_memory: whether it was started with enable_memory_saver.
        refuse: route -> [HTTP status, ...]: answers to its next requests; 0 lets one pass.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.updates: list[list[tuple[str, str]]] = []
        self.refuse: dict[str, list[int]] = {}
        self.version = "default"
        self.saves_memory = True
        self._lock = threading.Lock()
        record = self._answer

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(b"{}")

            def do_POST(self) -> None:
                self._reply(self.rfile.read(int(self.headers["content-length"])))

            def _reply(self, body: bytes) -> None:
                status, found = record(self.path.removeprefix("/"), json.loads(body or b"{}"))
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, route: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            statuses = self.refuse.get(route)
            status = statuses.pop(0) if statuses else 0
            if status:
                self.calls.append(f"{route} {status}")
                return status, {"message": f"no {route} today"}
            if route == "model_info":
                return 200, {"weight_version": self.version}
            if route == "server_info":
                return 200, {
                    "tp_size": 1,
                    "version": "recording",
                    "quantization": None,
                    "enable_memory_saver": self.saves_memory,
                }
            self._take(route, body)
            return 200, {"success": True}

    def _take(self, route: str, body: dict[str, Any]) -> None:
        note = route
        if route == "update_weight_version":
            self.version = body["new_version"]
            note = "mark" if self.version.startswith("-1-") else f"{route} {self.version}"
        elif route == "begin_weight_update":
            self.updates.append([])
        elif route == "update_weights_from_tensor":
            pairs = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
            self.updates[-1] += [(name, digest(tensor)) for name, tensor in pairs]
        elif body.get("tags"):
            note = f"{route} {' '.join(body['tags'])}"
        self.calls.append(note)
