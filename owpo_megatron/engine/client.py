"""HTTP client of one SGLang server: generation, control and weight endpoints (SGLang 0.5.21).

Legend: L tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from owpo_megatron.engine.answers import BadAnswer, Expected, read_answers, version_name, version_of
from owpo_megatron.engine.connection import CONTROL_SECONDS, Connection
from owpo_megatron.engine.generate_body import generate_body
from owpo_megatron.engine.replies import EngineGone, EngineWrong
from owpo_megatron.engine.tensor_body import TensorBody
from owpo_megatron.errors import EngineError
from owpo_megatron.types import ExpertShape, Rollout, SampleRequest, Sampling

MIRROR_SECONDS = 1800.0  # all weights of a large model, through a slow file system
# The cache is flushed once, before an update, while the engine is paused.
NO_FLUSH = {"flush_cache": False}


class EngineClient(Connection):
    """Client of one server. Thread-safe.

    Every method raises as Connection does.

    Args:
        url: http://host:port of the server.
        request_timeout: seconds without an answer after which a generation counts as hung.
        key: the server's API key, if it has one.
    """

    def __init__(self, url: str, request_timeout: float = 600.0, key: str | None = None):
        super().__init__(url, key)
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
        self.request_timeout = request_timeout
        self._info: dict[str, Any] | None = None
        self._released: set[str] = set()

    def connect(self, url: str, key: str | None = None, mirror: str | None = None) -> None:
        """Switch to another process after a restart of the engine. Arguments left out keep their values."""
        self._lead_to(url, key)
        self.mirror = mirror or self.mirror
        self.incarnation += 1
        self._info = None
        self._released.clear()

    # ------------------------------------------------------------------------------------------ samples
    def submit(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        version: int | None = None,
        names: Sequence[str] | None = None,
    ) -> Future[list[Rollout]]:
        """Implements Sampler: ask for one response per request in a single POST, without waiting.

        The rollouts come in order; each has its own seed and ends independently.

        Args:
            version: that of the weights that must draw them; None: any.
            names: one for each sample, for `cut`; None: none is cut.

        Errors of the future:
            EngineWrong: an answer that cannot be right (answers.py).
            EngineGone, EngineError: as Connection raises them.
        """
        url = self.url
        expected = Expected(self.vocab_size, version, self.owner, names is not None, self.experts)

        def read(answers: Any) -> list[Rollout]:
            try:
                return read_answers(answers, requests, sampling, expected)
            except BadAnswer as bad:
                raise EngineWrong(url, f"/generate answered {bad}") from bad

        return self._submit("/generate", generate_body(requests, sampling, names), self.request_timeout, read)

    def generate(
        self, requests: Sequence[SampleRequest], sampling: Sampling, version: int | None = None
    ) -> list[Rollout]:
        """`submit`, and wait."""
        return self.submit(requests, sampling, version).result()

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

    def release_memory(self, *tags: str) -> None:
        """Give the memory of these tags back to the GPU: "weights", "kv_cache". The server must be paused or idle.

        It keeps the addresses, and loses what was there.
        """
        if new := [tag for tag in tags if tag not in self._released]:
            self._post("/release_memory_occupation", {"tags": new})
            self._released.update(new)

    def resume_memory(self, *tags: str) -> None:
        """Take released memory again. SGLang ends where it is asked for memory that it has."""
        if gone := [tag for tag in tags if tag in self._released]:
            self._post("/resume_memory_occupation", {"tags": gone})
            self._released.difference_update(gone)

    @property
    def saves_memory(self) -> bool:
        """Whether the server was started so that it can release memory."""
        return bool(self._server_info().get("enable_memory_saver"))

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

    def mark(self, name: str) -> None:
        """Name the loaded weights so that they have no version, but a name that no other server has."""
        self._post("/update_weight_version", {"new_version": f"-1-{name}", "abort_all_requests": False})

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
