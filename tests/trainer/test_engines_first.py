"""Engines have their memory before any rank on a GPU: SGLang takes a share of what it finds free.

Not covered: a GPU; how large the share is (tests/plan).
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_config, make_hf_model

from owpo_megatron.config import Config
from owpo_megatron.data.small_tokenizers import make_character_tokenizer
from owpo_megatron.data.tasks import get_task
from owpo_megatron.trainer import build
from owpo_megatron.trainer.build_engine import EngineBuilder


class ModelBuilt(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_hf_model(tmp_path_factory.mktemp("first") / "model")
    make_character_tokenizer(get_task("cipher").alphabet).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_model_is_built_after_the_engines(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool
) -> None:
    """Both go on at the same time on a CPU, where tokens bound an engine's memory."""
    happened: list[str] = []
    built = threading.Event()
    pool = ThreadPoolExecutor(1)

    def start(self: EngineBuilder, given: Any) -> Future[Any]:
        def engine() -> None:
            built.wait(0.2 if not on_cpu else 60)
            happened.append("engine")

        return pool.submit(engine)

    def policy(self: Any, keeps_reference: bool) -> Any:
        happened.append("model")
        built.set()
        raise ModelBuilt

    monkeypatch.setattr(EngineBuilder, "start", start)
    monkeypatch.setattr(build._Builder, "_policy", policy)
    monkeypatch.setattr(build, "cpu", SimpleNamespace(on_cpu=lambda: on_cpu))
    with contextlib.ExitStack() as stack, pytest.raises(ModelBuilt):
        build.parts(make_config(model, runs_dir=str(tmp_path / "runs")), stack)
    pool.shutdown()
    assert happened == (["model", "engine"] if on_cpu else ["engine", "model"])


@pytest.mark.parametrize(
    ("sections", "shared"),
    [
        ({}, True),
        ({"engine": {"rendezvous": "there", "announced": 8}}, True),
        ({"engine": {"rendezvous": "there", "announced": 8}, "launch": {"engine_nodes": 1}}, False),
        ({"engine": {"urls": ["http://127.0.0.1:30000"]}}, False),
        ({"engine": {"device": "cpu"}}, False),
        ({"rollout": {"replay": "rollouts"}}, False),
    ],
)
def test_engines_that_may_share_the_gpus(model: Path, sections: dict[str, Any], shared: bool) -> None:
    assert engines(make_config(model, **sections)).take_memory == shared


def engines(config: Config) -> EngineBuilder:
    unused: Any = None
    return EngineBuilder(config, unused, unused, False, unused, unused)
