"""The documents' programs run, page by page, as a reader would run them; and the site builds.

Not covered: blocks marked `not run`, each with its reason on the page; what a block prints.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from code_blocks import ALL, ROOT, Block
from recipe_models import SHAPES

pytestmark = [pytest.mark.docs, pytest.mark.process, pytest.mark.slow]

LINKED = (".venv", ".venv-engine", "examples", "tools", "owpo_megatron", "cache")
FOLDERS = {"qwen2.5-math-7b": "Qwen2.5-Math-7B", "qwen3-8b-base": "Qwen3-8B-Base"}
PROBLEMS = [("What is 17 + 25?", "42"), ("What is 6 times 9?", "54"), ("How many primes are below 20?", "8")]


def models(folder: Path) -> None:
    """config.json of the recipes' models: enough for plans and launches."""
    for name, shape in SHAPES.items():
        path = folder / "models" / FOLDERS[name]
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(shape))


def problems(folder: Path) -> None:
    lines = [json.dumps({"problem": problem, "answer": answer}) for problem, answer in PROBLEMS]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts a finished quickstart of two steps into a folder; it is made at the first call."""
    made = tmp_path_factory.mktemp("finished")

    def put(folder: Path) -> None:
        if not (made / "runs").exists():
            link(made)
            short = "optimizer.steps=2 eval.every=2 eval.limit=4 checkpoint.every=2 checkpoint.keep_best=true"
            execute(made, "bash", f"owpo quickstart {short}")
        shutil.copytree(made / "runs", folder / "runs", dirs_exist_ok=True, symlinks=True)

    return put


def link(folder: Path) -> None:
    """The parts of a clone that commands name."""
    (ROOT / "cache").mkdir(exist_ok=True)
    for name in LINKED:
        if (ROOT / name).exists() and not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)


def execute(folder: Path, language: str, text: str) -> None:
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    """One folder per page, made when its first block runs."""
    return {}


@pytest.mark.server
@pytest.mark.parametrize("block", [block for block in ALL if block.mark in ("run", "file")], ids=str)
def test_block(
    block: Block,
    folders: dict[str, Path],
    finished: Callable[[Path], None],
    engine_python: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A block alone (`-k`) may need the files of those before it: run the page, `-k docs/PAGE.md`."""
    if block.page not in folders:
        folders[block.page] = tmp_path_factory.mktemp("page")
        link(folders[block.page])
    folder = folders[block.page]
    if block.mark == "file":
        (folder / block.about).write_text(block.text)
        return
    makers = {"models": models, "problems": problems, "quickstart": finished}
    for need in filter(None, block.about.split(", ")):
        makers[need](folder)
    execute(folder, block.language, block.text)


def test_the_site_builds(tmp_path: Path) -> None:
    """Strict: a broken link or anchor stops it."""
    mkdocs = ROOT / ".venv-docs" / "bin" / "mkdocs"
    if not mkdocs.exists():
        pytest.skip("no .venv-docs; run `make docs`")
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [str(mkdocs), "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index.html", "configuration.html", "api.html", "tutorials/eight_gpus.html"):
        assert (tmp_path / "site" / page).stat().st_size > 5000
