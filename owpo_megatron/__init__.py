"""owpo_megatron: One-Way Policy Optimization on Megatron and SGLang.

    from owpo_megatron import Config, Method, Terms, evaluate, load_run, register, train

    run = train("my-run.yaml", ["optimizer.lr=2e-6"], method="owpo")     # as `owpo train`; a notebook will do
    run.metrics["reward_mean"].plot()
    evaluate(run, samples=32)                                            # as `owpo eval`
    load_run("runs/my-run").rollouts(step=10)

Names are imported when they are first used: `import owpo_megatron` loads neither torch nor pandas. docs/library.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owpo_megatron.api.callbacks import Callback
    from owpo_megatron.api.evaluate import EvaluationResult, evaluate
    from owpo_megatron.api.result import RunResult, load_run
    from owpo_megatron.api.train import train
    from owpo_megatron.config import Config
    from owpo_megatron.errors import CallbackError, EngineError, RunError, UserError
    from owpo_megatron.methods import Method, Terms, hyper, num_active, register, token_weights, top_active

__version__ = "0.1.0"

_HOMES = {
    "Callback": "api.callbacks",
    "CallbackError": "errors",
    "Config": "config",
    "EngineError": "errors",
    "EvaluationResult": "api.evaluate",
    "Method": "methods",
    "RunError": "errors",
    "RunResult": "api.result",
    "Terms": "methods",
    "UserError": "errors",
    "evaluate": "api.evaluate",
    "hyper": "methods",
    "load_run": "api.result",
    "num_active": "methods",
    "register": "methods",
    "token_weights": "methods",
    "top_active": "methods",
    "train": "api.train",
}

__all__ = [
    "Callback",
    "CallbackError",
    "Config",
    "EngineError",
    "EvaluationResult",
    "Method",
    "RunError",
    "RunResult",
    "Terms",
    "UserError",
    "evaluate",
    "hyper",
    "load_run",
    "num_active",
    "register",
    "token_weights",
    "top_active",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
