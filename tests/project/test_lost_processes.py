"""A test process that crashes or hangs below Python ends the run with its name, under the Makefile's own options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]
MAKEFILE = Path(__file__).parents[2] / "Makefile"
CRASH = "os.abort()"
STUCK = "ctypes.PyDLL(None).sem_wait(ctypes.create_string_buffer(64))"  # holds the interpreter's lock
SUITE = """
import ctypes, os, signal, pytest

@pytest.mark.parametrize("number", range(4))
def test_of_a_file(number):
    if number == 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        {lost}
"""


@pytest.mark.parametrize(("lost", "said"), [(CRASH, "Aborted"), (STUCK, "Timeout")], ids=["crash", "stuck"])
def test_run_ends(lost: str, said: str, tmp_path: Path) -> None:
    options = re.search(r"^TWO := ((?:.*\\\n)*.*)$", MAKEFILE.read_text(), re.MULTILINE)
    assert options is not None
    two = options[1].replace("\\\n", " ").replace("faulthandler_timeout=1000", "faulthandler_timeout=2").split()
    assert "faulthandler_timeout=2" in two
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_lost.py").write_text(SUITE.format(lost=lost))
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *two]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"FAILED test_lost.py::test_of_a_file\[1\] - worker 'gw\d' crashed", done.stdout)
    assert said in done.stdout + done.stderr
