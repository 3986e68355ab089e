"""The tutorial of docs/families.md, followed to the letter: a family of another package, found by its entry point.

Also: an unknown model_type is refused before torch or transformers are imported. Not covered: serving such a model.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
import renamed_llama
from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf
from owpo_megatron.errors import ProofError
from safetensors.torch import load_file

hf, out = Path(sys.argv[1]), Path(sys.argv[2])
config = renamed_llama.RenamedLlamaConfig(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=64,
)
renamed_llama.RenamedLlamaForCausalLM(config).save_pretrained(hf)
try:
    proof = hf_to_megatron(hf, out / "megatron").proof
except ProofError as error:
    sys.exit(str(error))
assert proof.ok and proof.largest_difference < 1e-5
megatron_to_hf(out / "megatron", out / "back")
before, after = load_file(hf / "model.safetensors"), load_file(out / "back" / "model.safetensors")
assert before.keys() == after.keys() and all((after[name] == tensor).all() for name, tensor in before.items())
assert "model.layers.1.mlp.fc_gate.weight" in after
"""


def package(folder: Path, change: tuple[str, str] = ("", "")) -> dict[str, str]:
    """Install the page's file and entry point into `folder`; the environment in which Python finds them."""
    page = (ROOT / "docs" / "families.md").read_text()
    (code,) = re.findall(r"```python\n(# renamed_llama.py\n.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r'entry-points."owpo.families"\]\n(.*?) = "(.*?)"\n', page)
    (folder / "renamed_llama.py").write_text(code.replace(*change) if change[0] else code)
    information = folder / "renamed_llama-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: renamed-llama\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[owpo.families]\n{entry[0]} = {entry[1]}\n")
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONWARNINGS": "ignore"}


def run(folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder / "hf"), str(folder / "out")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.process
def test_the_tutorial(tmp_path: Path) -> None:
    done = run(tmp_path, package(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.process
def test_the_tutorials_wrong_rule(tmp_path: Path) -> None:
    """The page's example of a wrong rule: gate and up exchanged."""
    done = run(tmp_path, package(tmp_path, ('("fc_gate", "fc_in")', '("fc_in", "fc_gate")')))
    assert done.returncode == 1
    assert "layer 0 is the first that computes something else" in done.stderr


@pytest.mark.process
def test_a_package_that_fails_is_named(tmp_path: Path) -> None:
    env = package(tmp_path, ("import torch\n", "import no_such_module\n"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "renamed_llama"}))
    code = f"from owpo_megatron.families import read_hf_config; read_hf_config({str(tmp_path / 'hf')!r})"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "comes from renamed-llama, which fails: No module named 'no_such_module'" in done.stderr


READING = "from owpo_megatron.families import read_hf_config\nread_hf_config({hf!r})"
COMMAND = (
    "from owpo_megatron.cli.main import app\n"
    "app(['convert', 'import', '--hf', {hf!r}, '--out', {hf!r} + '-out'], standalone_mode=False)"
)


@pytest.mark.process
@pytest.mark.parametrize("way", [READING, COMMAND], ids=["reading", "command"])
def test_an_unknown_model_type_is_refused_before_torch_is_imported(way: str, tmp_path: Path) -> None:
    """Two seconds of CPU time at most."""
    lines = way.format(hf=str(tmp_path)).replace("\n", "\n    ")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_bigcode"}))
    code = (
        "import sys, resource\n"
        "from owpo_megatron.errors import UserError\n"
        f"try:\n    {lines}\n"
        "except UserError as error:\n    print(error)\n"
        "assert not {'torch', 'transformers', 'megatron'} & sys.modules.keys()\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert usage.ru_utime + usage.ru_stime < 2\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "model_type gpt_bigcode is not supported; supported: llama, mistral, qwen2, " in done.stdout
    assert "docs/families.md" in done.stdout
