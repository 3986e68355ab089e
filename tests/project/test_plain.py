"""Forbidden content of files: paths of one machine, hosts of package registries, unfinished marks, long files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
MAX_LINES = 400

# Written in pieces, so that this file does not hold what it forbids.
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "fa" + "rm"]) + r")/\w")
REGISTRIES = ["py" + "pi.org", "python" + "hosted.org", "py" + "torch.org/whl", "ana" + "conda.org", "nv" + "cr.io",
              "gh" + "cr.io", "qu" + "ay.io", "npm" + "js.org"]  # fmt: skip
ONE_INDEX = re.compile(r"^TORCH_CPU_INDEX \?= https://\S+$", re.MULTILINE)
UNFINISHED = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error", "X" * 3]))


def files() -> list[Path]:
    """Every file that is in git or would be: what .gitignore names is left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    out = []
    for file in files():
        data = file.read_bytes()
        if b"\0" not in data:
            out.append((file.relative_to(ROOT), data.decode()))
    return out


def test_no_path_of_a_single_machine() -> None:
    found = [f"{name}: {match.group()}" for name, text in texts() for match in MACHINE_PATHS.finditer(text)]
    assert found == []


def test_no_registry_but_the_one_variable() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert len(ONE_INDEX.findall(makefile)) == 1
    found = []
    for name, text in texts():
        if name.name == "Makefile" and name.parent == Path("."):
            text = ONE_INDEX.sub("", text)
        found += [f"{name}: {host}" for host in REGISTRIES if host in text]
    assert found == []


def test_package_files_stay_readable() -> None:
    """One noun a file: a package file beyond 400 lines holds more than one."""
    lengths = {name: text.count("\n") for name, text in texts() if name.parts[0] == "owpo_megatron"}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_nothing_unfinished_in_the_package() -> None:
    shipped = ("owpo_megatron", "tools", "examples")
    found = [
        f"{name}: {match.group()}"
        for name, text in texts()
        if name.parts[0] in shipped and name.suffix in (".py", ".sh")
        for match in UNFINISHED.finditer(text)
    ]
    assert found == []


def test_no_large_file() -> None:
    assert [str(file) for file in files() if file.stat().st_size > 1 << 20] == []


def test_test_files_have_names_of_their_own() -> None:
    """There are no packages under tests/, so two files of one name would be one module; conftest is apart."""
    tests = [file for file in files() if file.parts[len(ROOT.parts)] == "tests" and file.suffix == ".py"]
    names = [file.name for file in tests if file.name != "conftest.py"]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
