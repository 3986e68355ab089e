"""Rules that are not ours: a Python function of the user's, or an HTTP endpoint. Both run in the pool's workers."""

from __future__ import annotations

import inspect
import json
import math
import pickle
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, get_args

from owpo_megatron.carried import PREFIX, find_object, is_carried
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, Judgement, VerdictReason

_REASONS = frozenset(get_args(VerdictReason))
MAX_REPLY = 65536  # bytes of an endpoint's reply
RETRIES = (0.1, 0.5)  # seconds before a lost connection is tried again
# Endpoints are inside the cluster, where http_proxy does not lead.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class PythonRule:
    """`python:module:function`: called with (response, answer), and with `prompt=` where it has such a parameter.
    Returns a bool, a reason code, a graded reward, or a mapping as HttpRule expects it.

    Raises:
        UserError: (check) there is no such module or function.
    """

    module: str
    function: str

    def __reduce__(self) -> tuple[Any, ...]:
        if not is_carried(f"{PREFIX}{self.module}:{self.function}"):
            return PythonRule, (self.module, self.function)
        import cloudpickle

        return CarriedRule, (self.module, self.function, cloudpickle.dumps(_load(self.module, self.function)))

    def check(self) -> PythonRule:
        _load(self.module, self.function)
        return self

    def warm(self) -> None:
        _load(self.module, self.function)

    def __call__(self, item: GradingItem) -> VerdictReason | Judgement:
        return _result(_asked(_load(self.module, self.function), item), f"{self.module}:{self.function}")


@dataclass(frozen=True)
class CarriedRule:
    """A PythonRule in a worker process, where its function is not importable: it comes by value.

    Args:
        pickled: the function, as cloudpickle writes it.
    """

    module: str
    function: str
    pickled: bytes

    def warm(self) -> None:
        self._loaded()

    def __call__(self, item: GradingItem) -> VerdictReason | Judgement:
        return _result(_asked(self._loaded(), item), f"{self.module}:{self.function}")

    def _loaded(self) -> Callable[..., Any]:
        return _unpickled(self.pickled)


@lru_cache(maxsize=16)
def _unpickled(pickled: bytes) -> Callable[..., Any]:
    return pickle.loads(pickled)


@dataclass(frozen=True)
class HttpRule:
    """POSTs the item as JSON {response, answer, domain, truncated, form, prompt} to a URL.

    Expects {"correct": bool} back, and optionally "reason", "score" (a graded reward; alone: correct from 1 on) and
    "parts" (further rewards by name). A refusal or an unreadable reply is `crashed`: masked and
    counted, not scored 0.

    Args:
        timeout: seconds of one request; the pool's deadline holds anyway.
        proxy: go through the proxy of the environment (http_proxy, https_proxy).
        headers: further headers of every request.
    """

    url: str
    timeout: float = 30.0
    proxy: bool = False
    headers: tuple[tuple[str, str], ...] = ()

    def __call__(self, item: GradingItem) -> VerdictReason | Judgement:
        try:
            plain = {name: value for name, value in asdict(item).items() if name != "verdict"}  # a rule makes one
            answer = json.loads(self.post(json.dumps(plain).encode()))
        except TimeoutError:
            return "timeout"
        except (urllib.error.URLError, ValueError, OSError) as error:
            raise RuntimeError(f"{self.url}: {error}") from error
        if not isinstance(answer, dict):
            raise TypeError(f"{self.url} replied {answer!r}, not an object with the field `correct`")
        return _result(answer, self.url)

    def post(self, body: bytes) -> bytes:
        """The reply's body; a connection that is refused or lost is tried again, a reply with an error is not."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", **dict(self.headers)})
        opener = urllib.request.build_opener() if self.proxy else _DIRECT
        for pause in (*RETRIES, None):
            try:
                with opener.open(request, timeout=self.timeout) as reply:
                    return bytes(reply.read(MAX_REPLY))
            except urllib.error.HTTPError:
                raise
            except (urllib.error.URLError, ConnectionError) as error:
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    raise TimeoutError from error
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _asked(function: Callable[..., Any], item: GradingItem) -> Any:
    try:
        takes_prompt = "prompt" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, without a signature
        takes_prompt = False
    further = {"prompt": item.prompt} if takes_prompt else {}
    return function(item.response, item.answer, **further)


def _result(value: Any, source: str) -> VerdictReason | Judgement:
    """Turn what a rule returned into the verifier's own.

    Raises:
        TypeError: it is nothing that a rule may return.
    """
    if isinstance(value, Mapping):
        return _judgement(value, source)
    if isinstance(value, str) and value in _REASONS:
        return value  # type: ignore[return-value]
    if not isinstance(value, str) and value is not None and value in (0, 1):  # bools, numbers, numpy's of both
        return "ok" if value else "wrong"
    score = _number(value)
    if score is not None:
        return Judgement("ok" if score >= 1 else "wrong", score)
    options = f"True, False, a finite number, one of {sorted(_REASONS)}, or a mapping with correct, score and parts"
    raise TypeError(f"{source} returned {value!r}; a rule returns {options}")


def _judgement(reply: Mapping[str, Any], source: str) -> VerdictReason | Judgement:
    score, parts = reply.get("score"), reply.get("parts") or {}
    told = next((reply[name] for name in ("reason", "correct", "score") if reply.get(name) is not None), None)
    found = _result(told, source)
    reason = found.reason if isinstance(found, Judgement) else found
    if score is None and not parts:
        return reason
    if score is not None and _number(score) is None:
        raise TypeError(f"{source}: score is {score!r}; give a finite number")
    if not isinstance(parts, Mapping) or any(_number(value) is None for value in parts.values()):
        raise TypeError(f"{source}: parts are {parts!r}; give finite numbers by name")
    return Judgement(reason, _number(score), {str(name): float(value) for name, value in parts.items()} or None)


def _number(value: Any) -> float | None:
    """A finite number, numpy's included, as a float; None for anything else."""
    try:
        number = None if value is None or isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def _load(module: str, function: str) -> Callable[..., Any]:
    try:
        found = find_object(module, function)
    except (ImportError, AttributeError) as error:
        raise UserError("verifier.rule", f"python:{module}:{function}", f"make it importable ({error})") from error
    if not callable(found):
        raise UserError("verifier.rule", f"python:{module}:{function}", "name a function of (response, answer)")
    return found
