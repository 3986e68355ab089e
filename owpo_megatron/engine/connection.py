"""Requests to one server: those for control, which their thread waits for, and those for samples, on the event loop.

Both have time-outs, ask a busy server again, and end with an answer or an error in words (replies.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from owpo_megatron.engine.answers import shown
from owpo_megatron.engine.loop import KEEPALIVE_SECONDS, Channel
from owpo_megatron.engine.replies import BACK_OFF, BUSY, EngineWrong, answer_of, silent, unreachable
from owpo_megatron.engine.tensor_body import TensorBody

T = TypeVar("T")
CONTROL_SECONDS = 120.0
CONNECT_SECONDS = 10.0


class Connection:
    """One server, by its current URL. Thread-safe.

    Every request raises EngineGone when the server is dead or silent, and EngineError with the server's message when it
    refuses.

    Args:
        url: http://host:port of the server.
        key: the server's API key, if it has one.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url = url.rstrip("/")
        self.key = key
        self._headers = _headers(key)
        # Ignore proxy variables: engines are on this machine or in this cluster.
        self._http = httpx.Client(
            timeout=httpx.Timeout(CONTROL_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
            trust_env=False,
        )
        self._channel = Channel()

    def close(self) -> None:
        """Drop the connections. Requests in flight on the event loop end with EngineGone."""
        self._channel.close()
        self._http.close()

    def _lead_to(self, url: str, key: str | None) -> None:
        """Go on with another process; without a key, with the present one."""
        if key is not None:  # before the URL, which is read first: no other thread asks the new process by the old key
            self.key, self._headers = key, _headers(key)
        self.url = url.rstrip("/")

    def _field(self, path: str, answer: Any, name: str) -> Any:
        if not isinstance(answer, dict) or name not in answer:
            raise EngineWrong(self.url, f"{path} answered without {name}: {shown(answer)}")
        return answer[name]

    def _post(self, path: str, body: dict[str, Any], timeout: float = CONTROL_SECONDS) -> Any:
        return self._request("POST", path, body, timeout)

    def _submit(self, path: str, body: dict[str, Any], timeout: float, read: Callable[[Any], T]) -> Future[T]:
        """POST on the event loop, without waiting; `read` makes the result of the answer, in the loop's thread."""
        return self._channel.post(self.url, path, json.dumps(body).encode(), self._headers, timeout, read)

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | TensorBody | None,
        timeout: float,
        mirror: str | None = None,
    ) -> Any:
        url, headers = self.url, self._headers
        what = path if mirror is None else f"'s mirror {mirror}{path}"  # for messages, follows the engine's url
        if isinstance(body, TensorBody):
            headers = headers | {"content-length": str(len(body))}
        content = json.dumps(body) if isinstance(body, dict) else body
        limits = httpx.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS), pool=None)

        def send() -> httpx.Response:
            return self._http.request(method, (mirror or url) + path, content=content, headers=headers, timeout=limits)

        try:
            response = send()
            for pause in BACK_OFF if method == "POST" else ():
                if response.status_code not in BUSY:
                    break
                time.sleep(pause)
                response = send()
        except httpx.TimeoutException as error:
            raise silent(url, what, timeout) from error
        except httpx.TransportError as error:
            raise unreachable(url, what, error) from error
        return answer_of(url, what, response.status_code, response.content)


def _headers(key: str | None) -> dict[str, str]:
    return {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
