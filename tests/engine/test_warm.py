"""A warm engine is found by runs that would start the same server, by one at a time, and only while it answers."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from test_rendezvous import KEY, server  # noqa: F401 - a fixture

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import Announcement, announce
from owpo_megatron.engine.warm import take_warm_engine, warm_folder, warm_process

HERE = socket.gethostname()
NO_PROCESS = 2**22 + 1  # Linux has no higher ids than 2**22
ENGINE = EngineConfig(device="cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_one_run_at_a_time_uses_it(server: str, tmp_path: Path) -> None:  # noqa: F811
    assert take_warm_engine(tmp_path, ENGINE) is None and warm_process(tmp_path) is None
    announce(tmp_path, 0, Announcement(server, KEY, HERE, os.getpid()))
    assert warm_process(tmp_path) == os.getpid()
    first = take_warm_engine(tmp_path, ENGINE)
    assert first is not None and first.client.url == server and first.client.shares_memory
    assert take_warm_engine(tmp_path, ENGINE) is None
    first.close()
    again = take_warm_engine(tmp_path, ENGINE)
    assert again is not None
    again.close()


@pytest.mark.parametrize("fault", ["another key", "another machine", "killed", "does not answer"])
def test_what_cannot_be_used_is_not_waited_for(fault: str, server: str, tmp_path: Path) -> None:  # noqa: F811
    told = {
        "another key": Announcement(server, "another", HERE, os.getpid()),
        "another machine": Announcement(server, KEY, "elsewhere", os.getpid()),
        "killed": Announcement(server, KEY, HERE, NO_PROCESS),
        "does not answer": Announcement("http://127.0.0.1:9", KEY, HERE, os.getpid()),
    }
    announce(tmp_path, 0, told[fault])
    for _ in range(2):  # a lock would stay with the first
        assert take_warm_engine(tmp_path, ENGINE) is None


def test_a_folder_for_every_server_that_does_something_else(model: Path, tmp_path: Path) -> None:
    def folder(config: EngineConfig = ENGINE, dtype: str = "float32", variant: str = "1", **raw: Any) -> Path:
        variables = {"OWPO_BATCH_INVARIANT": variant}
        return warm_folder(tmp_path / "runs", config, model, dtype, raw, variables)

    same = [folder(), folder(EngineConfig(device="cpu", port=4000, request_timeout=5))]
    others = [
        folder(dtype="bfloat16"),
        folder(variant="0"),
        folder(max_total_tokens=99),
        folder(EngineConfig(device="cpu", concurrency=7)),
        folder(EngineConfig(device="cpu", python=tmp_path / "python")),
    ]
    (model / "config.json").write_text('{"hidden_size": 8}')
    others.append(folder())
    assert same[0] == same[1] and same[0].parent == tmp_path / "runs" / ".engines"
    assert len({same[0], *others}) == 1 + len(others)
