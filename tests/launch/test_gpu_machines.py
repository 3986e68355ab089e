"""Machines of 0, 1, 2 and 8 GPUs as nvidia-smi and /dev show them, with CPU and CUDA builds of torch.

Not covered: a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.config import Config, EngineConfig
from owpo_megatron.engine import command
from owpo_megatron.engine.command import built_for_cuda, find_device
from owpo_megatron.errors import UserError
from owpo_megatron.launch import preflight as room
from owpo_megatron.launch.local import rank_command, rank_environment
from owpo_megatron.launch.machine import gpu_names, usable_gpus

pytestmark = pytest.mark.process


@pytest.fixture(params=[0, 1, 2, 8])
def gpus(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pretend to have that many GPUs: an nvidia-smi in front of the PATH and device files in a folder of their own."""
    count: int = request.param
    program, devices = tmp_path / "bin" / "nvidia-smi", tmp_path / "dev"
    program.parent.mkdir()
    devices.mkdir()
    lines = "\n".join(f"GPU {index}: NVIDIA H200 (UUID: GPU-{index})" for index in range(count))
    (tmp_path / "listing").write_text(lines + "\n")
    program.write_text(f"#!/bin/sh\n{f'cat {tmp_path}/listing' if count else 'echo no devices >&2; exit 9'}\n")
    program.chmod(0o755)
    for index in range(count):
        (devices / f"nvidia{index}").touch()
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(command, "DEVICES", devices)
    return count


@pytest.fixture(params=[False, True], ids=["cpu build", "cuda build"])
def cuda_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(command, "built_for_cuda", lambda python: request.param)
    build: bool = request.param
    return build


def test_a_gpu_counts_where_torch_can_use_it(gpus: int, cuda_build: bool) -> None:
    assert len(gpu_names()) == gpus
    assert len(usable_gpus()) == (gpus if cuda_build else 0)
    assert find_device(EngineConfig()) == ("cuda" if gpus and cuda_build else "cpu")
    assert find_device(EngineConfig(device="cuda")) == "cuda"
    environment = rank_environment(2)
    assert ("CUDA_DEVICE_MAX_CONNECTIONS" in environment) == bool(gpus and cuda_build)
    launcher = "torchrun" if gpus and cuda_build else "forked"  # no fork where ranks have CUDA contexts
    assert f"owpo_megatron.launch.{launcher}" in rank_command(2, Path("logs"), "owpo_megatron.trainer.main", [])
    assert environment.get("NCCL_CUMEM_ENABLE") == ("0" if gpus and cuda_build else None)


@pytest.mark.parametrize("shown", ["", " ", "-1", "-1,0", "NoDevFiles", "none"])
def test_hidden_gpus_do_not_count(gpus: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "built_for_cuda", lambda python: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert find_device(EngineConfig()) == "cpu" and not usable_gpus()


@pytest.mark.parametrize(("shown", "count"), [("0", 1), ("1, 0", 2), ("0,9,1", 1), ("0,-1,1", 1), ("GPU-0,GPU-1", 2)])
def test_devices_behind_one_that_is_none_do_not_count(
    gpus: int, shown: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA reads CUDA_VISIBLE_DEVICES so."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert len(gpu_names()) == (count if gpus >= 2 else min(count, gpus) if gpus and shown[:1] != "1" else 0)


@pytest.mark.parametrize("line", ["cuda: Optional[str] = '13.0'", 'cuda = "12.8"'])
def test_a_build_is_read_from_torchs_own_file(line: str, tmp_path: Path) -> None:
    """Tried on this environment's torch, a CPU build, and on interpreters that find another one."""
    assert not built_for_cuda(Path(sys.executable))
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    assert built_for_cuda(python)
    (package / "version.py").unlink()
    built_for_cuda.cache_clear()
    assert not built_for_cuda(python)


def settings(tmp_path: Path, **sections: Any) -> Config:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({}))
    return Config.build(
        {"model": {"path": str(model), "dtype": "bfloat16"}, "data": {"source": "task:cipher"}} | sections
    )


def test_what_a_gpu_would_fail_on_is_refused_before(gpus: int, cuda_build: bool, tmp_path: Path) -> None:
    """Float32 and an engine without a share of the memory are fine on a CPU, and refused by name on a GPU."""
    single = settings(tmp_path, model={"path": str(tmp_path / "model"), "dtype": "float32"})
    unbounded = settings(tmp_path)
    bounded = settings(tmp_path, sglang={"mem_fraction_static": 0.3})
    if not (gpus and cuda_build):
        for config in (single, unbounded, bounded):
            room._devices(config)
        return
    with pytest.raises(UserError, match="model.dtype = float32.*bfloat16"):
        room._devices(single)
    with pytest.raises(UserError, match="mem_fraction_static"):
        room._devices(unbounded)
    room._devices(bounded)
    room._devices(settings(tmp_path, sglang={"max_total_tokens": 200000}))
    broadcast = {"sglang": {"mem_fraction_static": 0.3}, "sync": {"transport": "distributed"}}
    with pytest.raises(UserError, match="sync.transport = distributed.*takes a GPU into a group once"):
        room._sync(settings(tmp_path, **broadcast))
    room._sync(settings(tmp_path, **broadcast, engine={"urls": ["http://127.0.0.1:30000"]}))
    room._sync(settings(tmp_path, sync={"transport": "ipc"}))
