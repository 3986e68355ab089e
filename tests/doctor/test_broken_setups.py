"""The doctor on set-ups that are really broken: it names the cause, and fails.

What cannot be broken for one process is broken in a namespace of its own (util-linux's unshare): a full disk, a host
name, a folder that only one rank sees. Not covered: a GPU whose driver is too old, a broken network between machines.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import make_hf_model
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.data.small_tokenizers import make_character_tokenizer, padded_vocab_size
from owpo_megatron.data.tasks import get_task
from owpo_megatron.launch.local import free_port

pytestmark = pytest.mark.process

UNSHARE = ["unshare"] if os.geteuid() == 0 else ["unshare", "--map-root-user"]


def can_unshare() -> bool:
    try:
        return subprocess.run([*UNSHARE, "--mount", "--uts", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_namespaces = pytest.mark.skipif(not can_unshare(), reason="no right to make namespaces (unshare) here")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, as the quickstart makes it, but random."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    tokenizer = make_character_tokenizer(get_task("cipher").alphabet)
    make_hf_model(folder, vocab_size=padded_vocab_size(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def raw(model: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration with nothing wrong."""
    return {
        "runs_dir": str(tmp_path / "runs"),
        "model": {"path": str(model)},
        "data": {"source": "task:cipher", "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 16, "max_response_tokens": 8},
        "engine": {"device": "cpu"},
    }


def write(raw: dict[str, Any], tmp_path: Path, **changes: dict[str, Any]) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw | {name: raw.get(name, {}) | value for name, value in changes.items()}))
    return str(file)


def examined(tmp_path: Path, *arguments: str) -> dict[str, dict[str, str]]:
    """Findings by name, of a doctor that must fail."""
    result = CliRunner().invoke(app, ["doctor", *arguments, "--json", str(tmp_path / "told.json")])
    assert result.exit_code == 1, result.output
    return told(tmp_path / "told.json")


def told(file: Path) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(file.read_text())["findings"]}


def in_a_process(
    tmp_path: Path, *arguments: str, python: str = sys.executable, env: dict[str, str] | None = None, shell: str = ""
) -> dict[str, dict[str, str]]:
    """The same, by a process in a changed environment, or in namespaces where `shell` runs first."""
    command = [python, "-m", "owpo_megatron.cli.main", "doctor", *arguments, "--json", str(tmp_path / "told.json")]
    if shell:
        command = [*UNSHARE, "--mount", "--uts", "sh", "-ec", f'{shell}\nexec "$@"', "sh", *command]
    done = subprocess.run(
        command, env={**os.environ, **(env or {})}, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return told(tmp_path / "told.json")


def assert_failed(finding: dict[str, str], *words: str) -> None:
    assert finding["status"] == "fail", finding
    assert finding["remedy"]
    for word in words:
        assert word in finding["detail"] + finding["remedy"], finding


# --------------------------------------------------------------------------------------------- environments
def test_a_wrong_torch(tmp_path: Path) -> None:
    """An older torch comes before ours on PYTHONPATH; the other checks go on."""
    found = in_a_process(tmp_path, "--quick", env={"PYTHONPATH": str(older_torch(tmp_path))})
    assert_failed(found["torch"], "2.4.0", "2.13.0 is needed")
    assert found["disk"]["status"] == "ok"


def test_a_rank_with_a_wrong_torch(tmp_path: Path) -> None:
    """A rank that cannot join the others reports why itself; a job's script stops by its exit code."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = {**os.environ, **place, "PYTHONPATH": str(older_torch(tmp_path))}
    command = [sys.executable, "-m", "owpo_megatron.doctor.probe"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert "fail  torch: 2.4.0; 2.13.0 is needed" in done.stdout


def older_torch(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that holds one."""
    shadow = tmp_path / "shadow"
    (shadow / "torch").mkdir(parents=True)
    (shadow / "torch" / "__init__.py").write_text('__version__ = "2.4.0"\n')
    (shadow / "torch-2.4.0.dist-info").mkdir()
    (shadow / "torch-2.4.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.0\n")
    return shadow


def test_a_torch_that_hides_the_installed_one(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text('__version__ = "0.1"\n')  # a file of the user, in the working directory
    found = in_a_process(tmp_path, "--only", "packages")
    assert_failed(found["torch"], "0.1 is imported", str(tmp_path / "torch.py"), "PYTHONPATH")


@pytest.mark.slow
def test_no_psutil(tmp_path: Path) -> None:
    """An environment that has everything but that: links to ours."""
    venv.create(tmp_path / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("psutil"):
            (site / entry.name).symlink_to(entry)
    found = in_a_process(tmp_path, "--quick", python=str(tmp_path / "venv" / "bin" / "python"))
    assert_failed(found["psutil"], "not installed", "pip install")
    assert found["torch"]["status"] == "ok"
    assert_failed(found["memory"], "No module named 'psutil'")
    assert found["disk"]["status"] == "ok"
    assert found["host name"]["status"] != "fail"  # found without psutil; in a bare container it may not resolve


# ------------------------------------------------------------------------------------------------- machine
def test_a_port_that_is_taken(raw: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = examined(tmp_path, "--only", "ports", "-c", write(raw, tmp_path, engine={"port": port}))
    assert_failed(found["ports"], f"127.0.0.1:{port} is taken", f"process {os.getpid()}", "engine.port")


def test_a_run_folder_that_cannot_be_written(raw: dict[str, Any], tmp_path: Path) -> None:
    """Under /proc, where nobody can make a file: root may write wherever mere rights forbid it."""
    found = examined(tmp_path, "--only", "disk", "-c", write(raw | {"runs_dir": "/proc/runs"}, tmp_path))
    assert_failed(found["disk"], "no file can be written in /proc", "runs_dir")


@pytest.mark.slow
@needs_namespaces
def test_a_disk_that_is_too_small(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    shell = f"mount -t tmpfs -o size=3m owpo '{tmp_path}/runs'"
    found = in_a_process(
        tmp_path, "--only", "disk", "-c", write(raw, tmp_path, rollout={"max_response_tokens": 64}), shell=shell
    )
    assert_failed(found["disk"], "3 MB free", "checkpoint.keep")


@needs_namespaces
def test_a_host_name_that_does_not_resolve(tmp_path: Path) -> None:
    shell = "hostname nobody-knows-me"
    found = in_a_process(tmp_path, "--only", "hosts", "--nodes", "2", shell=shell)
    assert_failed(found["host name"], "nobody-knows-me does not resolve", "/etc/hosts")


@pytest.mark.slow
def test_nccl_without_cuda(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    found = examined(tmp_path, "--only", "devices", "--backend", "nccl")
    assert_failed(found["nccl"], "NCCL is asked for", "CPU build", "--backend gloo")


# ---------------------------------------------------------------------------------------------------- run
def test_more_memory_than_there_is(raw: dict[str, Any], tmp_path: Path) -> None:
    """Activations of a billion tokens at a time, as `owpo plan` reckons them."""
    config = write(raw, tmp_path, optimizer={"tokens_per_microbatch": 10**9}, rollout={"max_response_tokens": 64})
    found = examined(tmp_path, "--only", "memory", "-c", config)
    assert_failed(found["memory"], "1 rank and an engine take about", "tokens_per_microbatch", "owpo plan")


def test_a_model_without_a_tokenizer(raw: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    found = examined(tmp_path, "--only", "model", "-c", write(raw, tmp_path, model={"path": str(tiny_model)}))
    assert_failed(found["tokenizer"], str(tiny_model), "holds no tokenizer")
    assert found["layout"]["status"] == found["weights"]["status"] == "ok"


def test_tp_that_does_not_divide_the_heads(raw: dict[str, Any], tmp_path: Path) -> None:
    found = examined(tmp_path, "--only", "model", "-c", write(raw, tmp_path, parallel={"tp": 3}))
    assert_failed(found["layout"], "parallel.tp = 3", "4 attention heads", "use one of")


def test_an_engine_environment_that_is_missing(raw: dict[str, Any], tmp_path: Path) -> None:
    config = write(raw, tmp_path, engine={"python": "/no/such/python"})
    found = examined(tmp_path, "--only", "engine", "-c", config)
    assert_failed(found["engine"], "SGLang's environment is missing: no /no/such/python", "make setup")
    config = write(raw, tmp_path, engine={"python": sys.executable})
    found = examined(tmp_path, "--only", "engine", "--only", "start", "-c", config)
    assert_failed(found["engine"], "has no sglang")
    assert_failed(found["engine start"], "engine.python")


def test_engines_that_do_not_answer(raw: dict[str, Any], tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    found = examined(tmp_path, "--only", "engine", "-c", write(raw, tmp_path, engine={"urls": [url]}))
    assert_failed(found["engine"], url, "owpo serve")


# ------------------------------------------------------------------------------------------ between nodes
@pytest.mark.ranks
def test_a_job_whose_run_folder_cannot_be_written(raw: dict[str, Any], tmp_path: Path) -> None:
    """The call of a job's script, on one node: a table, and an exit code that stops the script."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    config = write(raw | {"runs_dir": "/proc/runs"}, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "owpo_megatron.doctor.probe", "--config", config],
        env={**os.environ, **place, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"fail  disk on {socket.gethostname()}: no file can be written in /proc" in done.stdout
    assert "fail  run folder: no file can be written for /proc/runs/run" in done.stdout
    assert "ok    torch: 2.13.0" in done.stdout
    assert "ok    collectives: gloo starts" in done.stdout


@needs_namespaces
@pytest.mark.ranks
def test_two_nodes_that_do_not_belong_together(raw: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 has another host name, which nobody knows, and another file system where the run folder should be."""
    runs, port = tmp_path / "runs", free_port()
    runs.mkdir()
    probe = [sys.executable, "-m", "owpo_megatron.doctor.probe", "--between-only", "--json"]
    probe += ["--config", write(raw, tmp_path)]
    shell = f"hostname stranger-node\nmount -t tmpfs owpo '{runs}'\nexec \"$@\""
    ranks = []
    for rank, command in enumerate((probe, [*UNSHARE, "--mount", "--uts", "sh", "-ec", shell, "sh", *probe])):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1], said
    found = {finding["what"]: finding for finding in json.loads(said[0][0].strip().splitlines()[-1])}
    assert_failed(found["nodes"], f"{socket.gethostname()} does not know stranger-node")
    assert_failed(found["run folder"], "is not what ranks [1] see", "runs_dir")
    for what in ("all-reduce", "all-gather"):  # right, if slow on a busy machine
        assert "GB/s" in found[what]["detail"], found[what]
