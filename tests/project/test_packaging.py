"""setup.py, requirements/ and the Makefile agree with each other and with what is installed. Builds nothing."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from owpo_megatron import __version__

ROOT = Path(__file__).parents[2]


def pins(file: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements" / file).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_requirement_is_pinned_within_its_bounds(python: str) -> None:
    env = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    chosen = {}
    for pin in pins("trainer-cpu.txt"):
        if pin.marker is None or pin.marker.evaluate(env):
            assert pin.name.lower() not in chosen, f"{pin.name} is pinned twice for Python {python}"
            chosen[pin.name.lower()] = str(pin.specifier).removeprefix("==")
    for text in metadata.requires("owpo_megatron") or []:
        wanted = Requirement(text)
        extra = wanted.marker is not None and not wanted.marker.evaluate({**env, "extra": "dev"})
        if extra or wanted.name == "torch":  # torch: its CPU build, by the Makefile
            continue
        assert wanted.specifier.contains(chosen[wanted.name.lower()]), wanted


def test_installed_packages_are_the_pinned_ones() -> None:
    wrong = {}
    for pin in pins("trainer-cpu.txt"):
        if pin.marker is None or pin.marker.evaluate():
            have = metadata.version(pin.name)
            if not pin.specifier.contains(have, prereleases=True):
                wrong[pin.name] = have
    assert wrong == {}


def test_torch_is_a_cpu_build_of_the_pinned_version() -> None:
    """Only the version counts on a machine with the CUDA build, where the tests run too."""
    import torch

    wanted = re.search(r'"torch==([\d.]+)"', (ROOT / "setup.py").read_text())
    assert wanted is not None
    assert torch.__version__.partition("+")[0] == wanted.group(1)
    if not torch.cuda.is_available():
        assert torch.version.cuda is None


@pytest.mark.process
def test_make_alone_lists_its_targets() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    listed = re.findall(r"^  ([\w-]+) +\S", shown, re.MULTILINE)
    assert listed == [
        *("help", "setup", "setup-gpu", "setup-gpu-kernels", "quickstart", "test-fast", "test", "test-extra"),
        *(
            "test-all",
            "matrix",
            "faults",
            "nemo",
            "sinks",
            "peers",
            "agents",
            "slurm",
            "check",
            "docs",
            "image",
            "image-gpu",
            "image-test",
            "clean",
        ),
    ]


@pytest.mark.process
def test_make_env_refuses_what_it_does_not_know() -> None:
    done = subprocess.run([str(ROOT / "tools" / "make_env.sh"), "other"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


@pytest.mark.parametrize(("version", "name", "said"), [
    ("3.11", "trainer-gpu", "resolved for Python 3.12, not 3.11"),
    ("3.12", "trainer-kernels", ".venv is no GPU environment: make setup-gpu first"),
])  # fmt: skip
@pytest.mark.process
def test_gpu_environments_are_refused_before_anything_is_made(
    tmp_path: Path, version: str, name: str, said: str
) -> None:
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools" / "make_env.sh"
    script.write_bytes((ROOT / "tools" / "make_env.sh").read_bytes())
    (tmp_path / "requirements").symlink_to(ROOT / "requirements")
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    done = subprocess.run(["bash", str(script), name], env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_image_gets_nothing_that_git_ignores() -> None:
    """Files of a working tree besides its sources (environments, runs) are large, private, or of another machine."""
    words = {
        name: {line.rstrip("/") for line in (ROOT / name).read_text().splitlines()}
        for name in (".gitignore", ".dockerignore")
    }
    # git looks for a name in every folder, a builder only where the pattern points: `**/` where it may be anywhere
    missing = {word for word in words[".gitignore"] if not words[".dockerignore"] & {word, f"**/{word}"}}
    assert missing == set()
    assert ".git" in words[".dockerignore"]


def test_the_version_is_the_same_everywhere() -> None:
    """setup.py and the images read __init__.py; these two are written by hand."""
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_both_environments_pin_the_same_torch() -> None:
    wanted = re.search(r'"torch==([\d.]+)"', (ROOT / "setup.py").read_text())
    assert wanted is not None
    assert str(next(pin.specifier for pin in pins("engine-cpu.txt") if pin.name == "torch")) == f"=={wanted.group(1)}"
