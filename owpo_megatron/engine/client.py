"""HTTP client of one SGLang server: generation, control and weight endpoints (SGLang 0.5.21).

Legend: L tokens of one response.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import httpx

from owpo_megatron.engine.answers import BadAnswer, Expected, read_answers, shown, version_name, version_of
from owpo_megatron.engine.generate_body import generate_body
from owpo_megatron.engine.parsing import parse_answer
from owpo_megatron.engine.tensor_body import TensorBody
from owpo_megatron.errors import EngineError
from owpo_megatron.types import ExpertShape, Rollout, SampleRequest, Sampling

# uvicorn closes a connection after 5 s of idleness: drop it earlier, or a request may hit a closing socket.
KEEPALIVE_SECONDS = 2.0
CONTROL_SECONDS = 120.0
MIRROR_SECONDS = 1800.0  # all weights of a large model, through a slow file system
BUSY = (429, 503)
BACK_OFF = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before a busy server is asked again


class EngineGone(EngineError):
    """The engine at `url` does not answer: it died, hangs or is unreachable. It needs a restart before a retry."""

    def __init__(self, url: str, what: str):
        super().__init__(f"engine {url}{what}")
        self.url = url


class EngineWrong(EngineGone):
    """The engine at `url` answers, but not what it was asked for. It is treated as lost: restart, weights, retry."""


class EngineClient:
    """Client of one server. Thread-safe.

    Every method raises EngineGone when the server is dead or silent, and EngineError with the server's message when it
    refuses.

    Args:
        url: http://host:port of the server.
        request_timeout: seconds without an answer after which a generation counts as hung.
        key: the server's API key, if it has one.
    """

    def __init__(self, url: str, request_timeout: float = 600.0, key: str | None = None):
        self.url = url.rstrip("/")
        self.incarnation = 0
        """Incremented by every `connect`: a process group created with an earlier incarnation is void."""
        self.shares_memory = False
        """Whether this process started the server, so that both see the same shared memory."""
        self.mirror: str | None = None
        """http://host:port of the program next to the server that keeps a copy of its weights (sync/delta)."""
        self.vocab_size: int | None = None
        """Token ids of samples are below; None: not checked."""
        self.owner = ""
        """Whose weights are expected, as part of their version's name; "": anybody's."""
        self.experts: ExpertShape | None = None
        """Mixtures of the model, for samples with the experts that they were routed to; None: none are asked for."""
        self._request_timeout = request_timeout
        self._info: dict[str, Any] | None = None
        self._headers = _headers(key)
        # Ignore proxy variables: engines are on this machine or in this cluster.
        self._http = httpx.Client(
            timeout=httpx.Timeout(CONTROL_SECONDS, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
            trust_env=False,
        )

    def connect(self, url: str, key: str | None = None, mirror: str | None = None) -> None:
        """Switch to another process after a restart of the engine. Arguments left out keep their values."""
        self.url = url.rstrip("/")
        self.mirror = mirror or self.mirror
        if key is not None:
            self._headers = _headers(key)
        self.incarnation += 1
        self._info = None

    def close(self) -> None:
        self._http.close()

    # ------------------------------------------------------------------------------------------ samples
    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        version: int | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Rollout]:
        """Draw one response per request in a single POST, in order; each has its own seed and ends independently.

        Args:
            version: that of the weights that must draw them; None: any.
            names: one for each sample, for `cut`; None: none is cut.

        Raises:
            EngineWrong: an answer that cannot be right (answers.py).
        """
        answers = self._post("/generate", generate_body(requests, sampling, names), self._request_timeout)
        try:
            expected = Expected(self.vocab_size, version, self.owner, names is not None, self.experts)
            return read_answers(answers, requests, sampling, expected)
        except BadAnswer as bad:
            raise EngineWrong(self.url, f"/generate answered {bad}") from bad

    def cut(self, name: str) -> None:
        """End the sample of this name, which is answered with the tokens that it has; no other is touched."""
        self._post("/abort_request", {"rid": name})

    # ------------------------------------------------------------------------------------------ control
    def pause(self) -> None:
        """Stop generating. Requests in flight are kept and, at `resume`, continue from their tokens so far."""
        self._post("/pause_generation", {"mode": "retract"})

    def resume(self) -> None:
        self._post("/continue_generation", {})

    def flush(self) -> None:
        """Drop the key-value cache; refused while requests run, allowed while they are paused."""
        self._post("/flush_cache", {})

    def freeze_gc(self) -> None:
        """Exclude the server's long-lived objects from garbage collection."""
        self._post("/freeze_gc", {})

    def model_info(self, timeout: float = CONTROL_SECONDS) -> dict[str, Any]:
        return self._request("GET", "/model_info", None, timeout)

    def weight_version(self) -> int:
        """Return the version of the loaded weights; UNKNOWN_VERSION if the server has none."""
        return version_of(self._field("/model_info", self.model_info(), "weight_version"), self.owner)

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks of the server."""
        return int(self._field("/server_info", self._server_info(), "tp_size"))

    @property
    def quantization(self) -> str | None:
        """Quantisation of the server's weights, by SGLang's name."""
        found = self._server_info().get("quantization")
        return None if found is None else str(found)

    @property
    def returns_experts(self) -> bool:
        """Whether the server was started with `--enable-return-routed-experts`."""
        return bool(self._server_info().get("enable_return_routed_experts"))

    def server_version(self) -> str:
        """Return SGLang's version."""
        return str(self._field("/server_info", self._server_info(), "version"))

    def _server_info(self) -> dict[str, Any]:
        """Return /server_info, cached: it does not change while the server runs."""
        if self._info is None:
            self._info = self._request("GET", "/server_info", None, CONTROL_SECONDS)
        return self._info

    # ------------------------------------------------------------------------------------------ weights
    def begin_update(self) -> None:
        """Open a weight-update session, after closing one that an interrupted update left open."""
        try:
            self._post("/begin_weight_update", {"selector": "all"})
        except EngineGone:
            raise
        except EngineError as error:
            if "already open" not in str(error):
                raise
            self.end_update()
            self._post("/begin_weight_update", {"selector": "all"})

    def end_update(self) -> None:
        self._post("/end_weight_update", {})

    def checksums(self) -> list[dict[str, str]]:
        """Return, for every tensor-parallel rank, its parameters' checksums by SGLang's names."""
        path = "/weights_checker"
        ranks = self._field(path, self._post(path, {"action": "checksum"}), "ranks")
        ordered = sorted(ranks, key=lambda rank: int(rank["parallelism_info"][0]["tp_rank"]))
        return [dict(rank["checksums"]) for rank in ordered]

    def workers(self) -> list[str]:
        """Return the URLs of a router's healthy engines."""
        found = self._field("/workers", self._request("GET", "/workers", None, CONTROL_SECONDS), "workers")
        return sorted(str(worker["url"]) for worker in found if worker["is_healthy"])

    def set_version(self, version: int) -> None:
        """Set the version of the loaded weights; responses carry it from now on."""
        self._post(
            "/update_weight_version", {"new_version": version_name(version, self.owner), "abort_all_requests": False}
        )

    def update_from_tensor(self, payloads: Sequence[bytes]) -> None:
        """Load pickled (name, full tensor) pairs, one pickle per tensor-parallel rank."""
        self._request("POST", "/update_weights_from_tensor", TensorBody(payloads), CONTROL_SECONDS)

    def update_from_bucket(self, payloads: Sequence[bytes]) -> None:
        """Load one flat tensor whose parts are described beside it, one pickle per tensor-parallel rank."""
        body = TensorBody(payloads, "flattened_bucket")
        self._request("POST", "/update_weights_from_tensor", body, CONTROL_SECONDS)

    def update_from_disk(self, path: str) -> None:
        """Load the safetensors files of a folder that the server sees under the same path."""
        # without an explicit format, a server started with dummy weights would generate dummy weights again
        body = {"model_path": path, "load_format": "auto"}
        self._post("/update_weights_from_disk", {**body, **NO_FLUSH})

    def call_mirror(self, what: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST /what to the mirror next to the server; see sync/delta/replica.py for the answers."""
        if self.mirror is None:
            raise EngineError(f"engine {self.url} has no mirror; start it with owpo serve --rendezvous")
        return dict(self._request("POST", f"/{what}", body, MIRROR_SECONDS, self.mirror))

    def update_from_distributed(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str
    ) -> None:
        """Receive one flat broadcast of these tensors from rank 0 of the group; returns when they are loaded."""
        body = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group_name}
        self._post("/update_weights_from_distributed", {**body, "load_format": "flattened_bucket", **NO_FLUSH})

    def join_group(
        self, host: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """Join a process group as ranks rank_offset .. rank_offset + tp_size - 1; returns when it is complete."""
        body = {"master_address": host, "master_port": port, "rank_offset": rank_offset, "world_size": world_size}
        self._post("/init_weights_update_group", {**body, "group_name": group_name, "backend": backend})

    def leave_group(self, group_name: str) -> None:
        self._post("/destroy_weights_update_group", {"group_name": group_name})

    # ------------------------------------------------------------------------------------------ transport
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


# The cache is flushed once, before an update, while the engine is paused.
NO_FLUSH = {"flush_cache": False}


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
