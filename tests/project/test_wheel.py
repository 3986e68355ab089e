"""The wheel, installed and used outside the repository. Not covered: how pip resolves its dependencies (1 GB)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from recipe_models import SHAPES

from owpo_megatron import __version__

ROOT = Path(__file__).parents[2]
# Without the checkout on the path, which pip and the command would find first.
ELSEWHERE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
pytestmark = [pytest.mark.process, pytest.mark.slow]


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel and, by a path file, the packages of the one that runs the tests."""

    environment: Path
    folder: Path  # where commands run: neither the repository nor the environment

    def run(self, *command: str, code: int = 0) -> str:
        """stdout and stderr of a command of the environment, e.g. run("owpo", "--help")."""
        env = ELSEWHERE | {"PATH": f"{self.environment / 'bin'}:{ELSEWHERE['PATH']}", "COLUMNS": "120"}
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)]
    subprocess.run(pip, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("elsewhere")
    environment = home / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    install = [*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, env=ELSEWHERE, check=True, capture_output=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Path files of that folder are not read, so the editable installation in it stays invisible.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (home / "work").mkdir()
    return Installed(environment, home / "work")


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "owpo_megatron"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    ours = {name for name in listed.stdout.split() if (ROOT / name).is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        shipped = {name.removeprefix("owpo_megatron/shipped/") for name in names if "/shipped/" in name}
        assert {name for name in names if "/shipped/" not in name} == ours
        for name in shipped:
            assert archive.read(f"owpo_megatron/shipped/{name}") == (ROOT / name).read_bytes()
    assert {"Makefile", "tools/make_env.sh", "requirements/engine-cpu.txt"} <= shipped
    assert {"examples/quickstart/base_model.py", "examples/quickstart/config.yaml"} <= shipped


def test_metadata(installed: Installed) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps(m.metadata('owpo_megatron').json))"
    metadata = json.loads(installed.run("python", "-c", code))
    assert metadata["version"] == __version__
    assert metadata["license_expression"] == "Apache-2.0"
    assert metadata["license_file"] == "LICENSE"
    assert "Typing :: Typed" in metadata["classifier"]
    assert "# owpo_megatron" in metadata["description"]


def test_the_library_is_the_installed_one(installed: Installed) -> None:
    where = Path(installed.run("python", "-c", "import owpo_megatron; print(owpo_megatron.__file__)").strip())
    assert where.is_relative_to(installed.environment)
    assert (where.parent / "py.typed").is_file()


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["methods"], ["quickstart", "--help"], ["train", "--help"]]
)
def test_the_command_runs(installed: Installed, command: list[str]) -> None:
    assert installed.run("owpo", *command)


def test_reproduce_finds_its_data(installed: Installed) -> None:
    """The recipe of the paper's model, the presets and the published numbers are in the wheel; nothing is trained."""
    model = installed.folder / "Qwen2.5-Math-7B"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPES["qwen2.5-math-7b"]))
    said = installed.run("owpo", "reproduce", "table2", "--model", str(model), "--beside", "paper", "--dry-run")
    assert "6 runs, 6 to train: 2,400 steps" in said and "GPU hours" in said
    code = "from owpo_megatron.report.published import published, errata; print(len(published()), len(errata()))"
    numbers, errata = installed.run("python", "-c", code).split()
    assert int(numbers) > 200 and int(errata) == 6
    small = installed.run("owpo", "reproduce", "table3", "--scale", "cpu", "--model", str(model), "--dry-run")
    assert "6 runs, 6 to train: 120 steps" in small and "CIPHER-D at 6 checkpoints" in small


def test_without_an_engine_the_quickstart_names_the_command_that_installs_one(installed: Installed) -> None:
    """The refusal comes at once: no base model is made in vain."""
    said = installed.run("owpo", "quickstart", code=2)
    home = f"{installed.environment}-engine"
    assert f"run `owpo setup-engine`, which makes {home}" in said
    assert not (installed.folder / "cache").exists()


def test_setup_engine_refuses_an_unknown_python_early(installed: Installed) -> None:
    said = installed.run("owpo", "setup-engine", "--device", "cpu", "--python", "no-such-python", code=1)
    assert "no-such-python: no such command" in said
    assert not Path(f"{installed.environment}-engine").exists()


@pytest.mark.server
def test_the_quickstart_runs_from_the_wheel(installed: Installed, engine_python: Path) -> None:
    """All of it with a real engine, but for two steps and few problems."""
    short = [
        "optimizer.steps=2",
        "eval.limit=4",
        "eval.samples=8",
        "eval.every=2",
        "parallel.tp=1",
        "checkpoint.every=2",
    ]
    said = installed.run("owpo", "quickstart", f"engine.python={engine_python}", *short)
    assert "seconds in all" in said
    summary = json.loads((installed.folder / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert (installed.folder / "runs" / "quickstart" / "hf" / "config.json").is_file()


@pytest.mark.extra
def test_setup_engine_makes_the_environment(installed: Installed) -> None:
    """Downloads SGLang's CPU subset, 1.6 GB with torch; about a minute where an index is near."""
    target = installed.environment.with_name("engine")
    said = installed.run("owpo", "setup-engine", "--device", "cpu", "--dir", str(target))
    assert f"Set engine.python={target / 'bin' / 'python'} in the configuration." in said
    code = "from importlib.metadata import version as v; print(v('sglang'), v('owpo-sglang-cpu'))"
    assert installed.run(str(target / "bin" / "python"), "-c", code).split()[0] == "0.5.21"
    shutil.rmtree(target)
