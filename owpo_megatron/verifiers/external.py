"""Rules that are not ours: a Python function of the user's, or an HTTP endpoint. Both run in the pool's workers."""

from __future__ import annotations

import json
import pickle
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, get_args

from owpo_megatron.carried import PREFIX, find_object, is_carried
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, VerdictReason

_REASONS = frozenset(get_args(VerdictReason))
MAX_REPLY = 65536  # bytes of an endpoint's reply
RETRIES = (0.1, 0.5)  # seconds before a lost connection is tried again
# Endpoints are inside the cluster, where http_proxy does not lead.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class PythonRule:
    """`python:module:function`: called with (response, answer), returns a bool, or a reason code.

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

    def __call__(self, item: GradingItem) -> VerdictReason:
        return _reason(_load(self.module, self.function)(item.response, item.answer), f"{self.module}:{self.function}")


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

    def __call__(self, item: GradingItem) -> VerdictReason:
        return _reason(self._loaded()(item.response, item.answer), f"{self.module}:{self.function}")

    def _loaded(self) -> Callable[[str, str], Any]:
        return _unpickled(self.pickled)


@lru_cache(maxsize=16)
def _unpickled(pickled: bytes) -> Callable[[str, str], Any]:
    return pickle.loads(pickled)


@dataclass(frozen=True)
class HttpRule:
    """POSTs the item as JSON {response, answer, domain, truncated, form, prompt} to a URL.

    Expects {"correct": bool} back, and optionally "reason". A refusal or an unreadable reply is `crashed`: masked and
    counted, not scored 0.

    Args:
        timeout: seconds of one request; the pool's deadline holds anyway.
        proxy: go through the proxy of the environment (http_proxy, https_proxy).
    """

    url: str
    timeout: float = 30.0
    proxy: bool = False

    def __call__(self, item: GradingItem) -> VerdictReason:
        try:
            answer = json.loads(self._reply(json.dumps(asdict(item)).encode()))
        except TimeoutError:
            return "timeout"
        except (urllib.error.URLError, ValueError, OSError) as error:
            raise RuntimeError(f"{self.url}: {error}") from error
        if not isinstance(answer, dict):
            raise TypeError(f"{self.url} replied {answer!r}, not an object with the field `correct`")
        return _reason(answer.get("reason") or answer.get("correct"), self.url)

    def _reply(self, body: bytes) -> bytes:
        """The reply's body; a connection that is refused or lost is tried again, a reply with an error is not."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
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


def _reason(value: Any, source: str) -> VerdictReason:
    if isinstance(value, str) and value in _REASONS:
        return value  # type: ignore[return-value]
    if not isinstance(value, str) and value is not None and value in (0, 1):  # bools, numbers, numpy's of both
        return "ok" if value else "wrong"
    raise TypeError(f"{source} returned {value!r}; a rule returns True, False, 1, 0 or one of {sorted(_REASONS)}")


def _load(module: str, function: str) -> Callable[[str, str], Any]:
    try:
        found = find_object(module, function)
    except (ImportError, AttributeError) as error:
        raise UserError("verifier.rule", f"python:{module}:{function}", f"make it importable ({error})") from error
    if not callable(found):
        raise UserError("verifier.rule", f"python:{module}:{function}", "name a function of (response, answer)")
    return found
