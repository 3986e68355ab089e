"""Fixtures of several rooms; what starts a server skips, with a reason, where SGLang's environment is absent."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_pool import Ranks
from tiny import make_hf_model

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import Fleet, start_fleet

pytest_plugins = ["tiers"]
ENGINE_PYTHON = Path(__file__).resolve().parents[1] / ".venv-engine" / "bin" / "python"

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One process makes hundreds of gloo groups, several open files each: Debian's soft limit of 1024 is too low for that.
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The interpreter of SGLang's environment."""
    if not ENGINE_PYTHON.exists():
        pytest.skip(f"no {ENGINE_PYTHON}; run `make setup`")
    return ENGINE_PYTHON


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Processes over gloo, forked job by job from one that has imported everything: ranks.run(2, function, ...)."""
    from tiers import WATCH  # imported above, it would be imported before pytest registers it

    WATCH.expect_processes()
    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder of a random Qwen3 with 96 tokens, of which 2 ends a response."""
    return make_hf_model(tmp_path_factory.mktemp("models") / "qwen3", eos_token_id=2)


@pytest.fixture(scope="session")
def engine(engine_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One real SGLang server on the CPU, serving `tiny_model`'s architecture, for the whole session.

    Tests push weights to it (model.state_dict() of a model of the same shape): push yours before you compare.
    """
    config = EngineConfig(python=engine_python, device="cpu", max_restarts=10)
    with start_fleet(config, tiny_model, "float32", {}, tmp_path_factory.mktemp("engine")) as fleet:
        yield fleet
