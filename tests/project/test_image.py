"""The container image, built from nothing by buildah and tried out: `make image-test`, some ten minutes.

Skipped where it cannot be built. Not covered: Docker, podman, the gpu target.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]


@pytest.mark.image
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.geteuid() != 0, reason="buildah's chroot isolation needs root")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt install buildah debootstrap)")
def test_the_image_is_built_and_trains() -> None:
    """`owpo doctor` and `owpo quickstart` in it, as its own user."""
    done = subprocess.run(["make", "image-test"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "[image-test] passed" in done.stdout
