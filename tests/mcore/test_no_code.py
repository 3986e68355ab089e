"""A folder that tries to run code is refused with one line, and the attempt does nothing.

Engines load Hugging Face folders with SGLang, whose reading is not covered; this project reads safetensors, and .bin
files with `weights_only` (tests/families). Real training checkpoints are read by tests/policy and tests/e2e.
"""

from __future__ import annotations

import ast
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

import owpo_megatron
from owpo_megatron.errors import UserError
from owpo_megatron.mcore import checkpoint, no_code
from owpo_megatron.mcore.sharded_files import PartFile, StoredState, finish_state

PACKAGE = Path(owpo_megatron.__file__).parent

# Who may unpickle, and why. Everything else fails `test_nobody_else_unpickles`.
UNPICKLERS = {
    "api/given.py": "objects of the notebook that starts the run, passed to its own ranks",
    "bench/client.py": "its own copies of what it times",
    "environments/catalogue.py": "the user's own class, passed from a notebook to the workers",
    "mcore/no_code.py": "the restricted unpickler itself",
    "verifiers/external.py": "the user's own function, passed from a notebook to the workers",
    "verifiers/guard.py": "the pool's own first frame: which rules a worker grades by",
    "verifiers/worker.py": "items from the pool",
    "workers/process.py": "the user's own function, passed from a notebook by rank 0, which has proved who it is",
}


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    with PartFile(folder, 0) as part:
        part.add("model.weight", (), (), torch.arange(12.0).view(4, 3))
    finish_state(folder, part.entries)
    return folder


def test_an_honest_table_is_read(state):
    assert torch.equal(StoredState(state).tensor("model.weight"), torch.arange(12.0).view(4, 3))
    assert FileSystemReader(state).read_metadata().state_dict_metadata.keys() == {"model.weight"}


def test_a_table_that_runs_code_is_refused(state, tmp_path):
    (state / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "PWNED")))
    for read in (lambda: StoredState(state), lambda: FileSystemReader(state).read_metadata()):
        with pytest.raises(UserError, match=r"\.metadata: names 'pathlib\.\w+.*do not use this folder") as refused:
            read()
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "PWNED").exists()
    pickle.loads((state / ".metadata").read_bytes())
    assert (tmp_path / "PWNED").exists(), "the attack works on an ordinary unpickler"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["os\nsystem", "builtins\neval", "torch\nload", "torch\nSize.mro"])
def test_no_other_name_is_found(state, name, protocol):
    code = b"\x80" + bytes([max(2, protocol)]) + b"c" + name.encode() + b"\n."
    (state / ".metadata").write_bytes(code)
    with pytest.raises(UserError, match="names '" + name.replace("\n", r"\.")):
        StoredState(state)


def test_a_table_of_an_early_python_is_read(state, monkeypatch):
    """Python 3.11.2, Debian 12's, pickles an enum's member as getattr(kind, name)."""
    read = FileSystemReader(state).read_metadata
    whole = read()
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self._name_)))
    (state / ".metadata").write_bytes(pickle.dumps(whole))
    assert b"getattr" in (state / ".metadata").read_bytes()
    assert read() == whole


@pytest.mark.parametrize(
    "given",
    [
        (Metadata, "__init__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (_MEM_FORMAT_ENCODING, ("TORCH_STRIDED",)),
        (torch.float32, "to_complex"),
        ("text", "format"),
    ],
)
def test_no_other_attribute_is_read(state, given):
    class Attribute:
        def __reduce__(self):
            return getattr, given

    (state / ".metadata").write_bytes(pickle.dumps(Attribute()))
    with pytest.raises(UserError, match="reads the attribute .*do not use this folder"):
        StoredState(state)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"not a pickle", b"\x80\x04K\x07.", b"cno_module\nx\n.", pickle.dumps({"a": 1})]
)
def test_a_damaged_table_is_one_line(state, content):
    (state / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata: (is damaged|names 'no_module)") as refused:
        StoredState(state)
    assert "\n" not in str(refused.value)


def test_every_cut_and_many_flips_of_a_table(state):
    """Nothing but a clean refusal or a right reading, whatever byte is gone or wrong."""
    whole = (state / ".metadata").read_bytes()
    for place in range(0, len(whole), 7):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]):
            (state / ".metadata").write_bytes(content)
            try:
                StoredState(state)
            except UserError as refused:
                assert "\n" not in str(refused)


def test_objects_of_a_checkpoint_run_no_code(tmp_path):
    """Objects that are no tensors, such as the extra state of a layer: torch's planner reads them unrestricted."""
    planner = DefaultLoadPlanner()
    planner.flatten_state_dict, planner.state_dict = False, {}
    item = type("Item", (), {"dest_index": type("Index", (), {"fqn": "x"})})

    def saved(value):
        stream = io.BytesIO()
        torch.save(value, stream)
        return io.BytesIO(stream.getvalue())

    planner.load_bytes(item, saved({"step": torch.tensor(3)}))
    assert planner.state_dict["x"] == {"step": torch.tensor(3)}
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        planner.load_bytes(item, saved(Evil(tmp_path / "PWNED")))
    assert not (tmp_path / "PWNED").exists()


def test_a_common_file_that_runs_code_is_refused(state, tmp_path):
    torch.save(Evil(tmp_path / "PWNED"), state / "common.pt")
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    with pytest.raises(pickle.UnpicklingError):
        load_common_state_dict(str(state))
    with pytest.raises(UserError, match=r"common\.pt: names code.*do not use this folder"):
        checkpoint._load(state, {})
    assert not (tmp_path / "PWNED").exists()


def test_nobody_else_unpickles():
    """Every call of pickle, marshal, shelve or torch.load in the package, and of eval and exec."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                bare = name in ("eval", "exec")
                loads = name.split(".")[0] in ("pickle", "cloudpickle", "marshal", "shelve", "dill") and "load" in name
                unsafe = name == "torch.load" and not any(
                    keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
                )
                if bare or loads or unsafe or name.endswith("Unpickler"):
                    found.setdefault(str(file.relative_to(PACKAGE)), set()).add(name)
            if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
                found.setdefault(str(file.relative_to(PACKAGE)), set()).add(node.name)
    assert found.keys() == UNPICKLERS.keys(), found


def test_installing_twice_changes_nothing():
    no_code.install()
    assert FileSystemReader.read_metadata is no_code._read_metadata
