"""An HTTP server of the OpenAI chat protocol, on the standard library; who answers is given."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from owpo_megatron.environments.chat import ChatError, models, streamed

MAX_BODY = 64 * 2**20  # bytes of a request
Answerer = Callable[[str, Mapping[str, str], Any], Mapping[str, Any]]
"""(path, headers in small letters, the body's JSON) -> the answer's JSON. Raises ChatError."""


class ChatEndpoint:
    """Serves until it is closed, each request in a thread of its own.

    Args:
        answer: answers a POST.
        model: name of the one model.
        host, port: where to listen; port 0: a free one.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, answer: Answerer, model: str, host: str = "127.0.0.1", port: int = 0):
        self._server = ThreadingHTTPServer((host, port), _handler(answer, model))
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="chat", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(answer: Answerer, model: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            known = self.path.rstrip("/").endswith("/models")
            self._send(200, models(model)) if known else self._send(404, ChatError(404, "no such path").body())

        def do_POST(self) -> None:
            body: Any = None
            try:
                length = int(self.headers.get("content-length") or -1)
                if not 0 <= length <= MAX_BODY:
                    self.close_connection = True
                    raise ChatError(413, f"a request has a length, of at most {MAX_BODY} bytes")
                try:
                    body = json.loads(self.rfile.read(length))
                except (ValueError, RecursionError):
                    raise ChatError(400, "the request is no JSON") from None
                headers = {name.lower(): value for name, value in self.headers.items()}
                found = answer(self.path, headers, body)
            except ChatError as refused:
                self._send(refused.status, refused.body())
                return
            if isinstance(body, Mapping) and body.get("stream") and "choices" in found:
                self._stream(found)
            else:
                self._send(200, found)

        def _send(self, status: int, found: Mapping[str, Any]) -> None:
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status != 200:
                self.send_header("x-should-retry", "false")  # the official clients would ask again
            self.end_headers()
            self.wfile.write(content)

        def _stream(self, found: Mapping[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for event in streamed(found):
                self.wfile.write(event)
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: an agent's requests are in its episode."""

    return Handler
