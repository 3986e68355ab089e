"""Requests to one server: time-outs, a busy server asked again, and answers or errors in words."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from owpo_megatron.engine.answers import shown
from owpo_megatron.engine.parsing import parse_answer
from owpo_megatron.engine.tensor_body import TensorBody
from owpo_megatron.errors import EngineError

# uvicorn closes a connection after 5 s of idleness: drop it earlier, or a request may hit a closing socket.
KEEPALIVE_SECONDS = 2.0
CONTROL_SECONDS = 120.0
BUSY = (429, 503)
BACK_OFF = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before a busy server is asked again


class EngineGone(EngineError):
    """The engine at `url` does not answer: it died, hangs or is unreachable. It needs a restart before a retry."""

    def __init__(self, url: str, what: str):
        super().__init__(f"engine {url}{what}")
        self.url = url


class EngineWrong(EngineGone):
    """The engine at `url` answers, but not what it was asked for. It is treated as lost: restart, weights, retry."""


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
            timeout=httpx.Timeout(CONTROL_SECONDS, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def _lead_to(self, url: str, key: str | None) -> None:
        """Go on with another process; without a key, with the present one."""
        self.url = url.rstrip("/")
        if key is not None:
            self.key, self._headers = key, _headers(key)

    def _field(self, path: str, answer: Any, name: str) -> Any:
        if not isinstance(answer, dict) or name not in answer:
            raise EngineWrong(self.url, f"{path} answered without {name}: {shown(answer)}")
        return answer[name]

    def _post(self, path: str, body: dict[str, Any], timeout: float = CONTROL_SECONDS) -> Any:
        return self._request("POST", path, body, timeout)

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
        limits = httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None)

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
            raise EngineGone(url, f"{what} did not answer within {timeout:g} s") from error
        except httpx.TransportError as error:
            raise EngineGone(url, f"{what} is not reachable: {error or type(error).__name__}") from error
        if response.status_code >= 500 or response.status_code in BUSY:
            raise EngineGone(url, f"{what} failed with {response.status_code}: {_message(response)}")
        if response.status_code >= 400:
            raise EngineError(f"engine {url}{what} refused with {response.status_code}: {_message(response)}")
        try:
            return parse_answer(response.content)
        except ValueError:
            return {"message": response.text}


def _headers(key: str | None) -> dict[str, str]:
    return {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})


def _message(response: httpx.Response) -> str:
    """Extract the server's error message from any of the formats it uses."""
    try:
        content = response.json()
    except ValueError:
        return response.text[:500].strip() or "no message"
    if isinstance(content, dict):
        content = content.get("error", content.get("message", content))
    if isinstance(content, dict):
        content = content.get("message", content)
    return str(content)[:500]
