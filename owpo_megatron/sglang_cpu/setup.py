"""Add the .pth file to the wheel; everything else is in pyproject.toml.

A .pth runs in every interpreter of the environment, which is necessary: SGLang's server and the processes that it
starts import triton and torchvision before any plug-in is loaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    def run(self) -> None:
        super().run()
        (Path(self.build_lib) / "owpo_sglang_cpu.pth").write_text("import owpo_sglang_cpu.shim\n")


# A build folder next to the sources would keep a deleted module and put it into the next wheel.
setup(cmdclass={"build_py": BuildWithPth}, options={"build": {"build_base": tempfile.mkdtemp()}})
