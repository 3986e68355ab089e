"""Changes of weights, mirrors that keep up with them over HTTP, and what each failure leaves; without SGLang.

The engines here read the folder that they are given, as SGLang does. test_delta_served.py has real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from owpo_megatron.config import SyncConfig
from owpo_megatron.engine import EngineClient
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.sync import make_sync
from owpo_megatron.sync.bucket import in_buckets
from owpo_megatron.sync.delta.encoding import bits_of
from owpo_megatron.sync.delta.private_folder import PrivateFolder
from owpo_megatron.sync.delta.replica import Mirror
from owpo_megatron.sync.delta.transport import DeltaTransport, mirrored

KEY = "the-key"
Weights = dict[str, torch.Tensor]


class ReadingEngine(EngineClient):
    """Loads what is in the folder, as it is then."""

    refuses = False

    def update_from_disk(self, path: str) -> None:
        if self.refuses:
            raise EngineError(f"{self.url} refuses")
        self.has = {
            name: tensor for file in Path(path).glob("*.safetensors") for name, tensor in load_file(file).items()
        }


class Far:
    """An engine with a mirror that can be started again."""

    def __init__(self, number: int, copies: Path):
        self.engine = ReadingEngine(f"http://far-{number}", key=KEY)
        self._copies = copies
        self.start()

    def start(self) -> None:
        self.mirror = Mirror("127.0.0.1", KEY, self._copies)
        self.engine.mirror = f"http://127.0.0.1:{self.mirror.port}"

    def restart(self) -> None:
        self.mirror.close()
        self.start()

    def close(self) -> None:
        self.mirror.close()
        self.engine.close()


@pytest.fixture
def fars(tmp_path: Path) -> Iterator[list[Far]]:
    made = [Far(number, tmp_path / "copies") for number in range(2)]
    yield made
    for far in made:
        far.close()


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[DeltaTransport]:
    with closing(DeltaTransport(tmp_path / "shared", tmp_path / "copies")) as made:
        yield made


def model() -> Weights:
    """Every kind of tensor: scalars, empty ones, FP8, NaNs."""
    generator = torch.Generator().manual_seed(3)
    bfloat16 = {f"layer.{i}": torch.randn(97, 131, generator=generator).bfloat16() for i in range(4)}
    others = {
        "norm": torch.ones(97),
        "values": torch.randn(64, 33, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 5, dtype=torch.bfloat16),
    }
    bits_of(bfloat16["layer.0"])[:5] = [0x7FC1, 0xFFFF, 0x8000, 0x7F81, 0x0001]
    return bfloat16 | others


def change(weights: Weights, seed: int, share: float = 0.01) -> None:
    """Other bits in some of the elements of every tensor."""
    rng = np.random.default_rng(seed)
    for tensor in weights.values():
        bits = bits_of(tensor)
        where = rng.random(bits.size) < share
        bits[where] ^= rng.integers(1, 255, int(where.sum())).astype(bits.dtype)


def push(transport: DeltaTransport, fars: list[Far], weights: Weights, version: int) -> int:
    """One update; returns the bytes that travelled."""
    with transport.session([far.engine for far in fars], version) as send:
        for bucket in in_buckets(weights.items(), 40_000):
            send(bucket)
    return transport.written_bytes


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and bytes(bits_of(left[name]).data) == bytes(bits_of(right[name]).data)
        for name in right
    )


def size(weights: Weights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def test_changes_travel_and_arrive_bit_for_bit(fars: list[Far], transport: DeltaTransport, tmp_path: Path) -> None:
    """All weights first, then 1 % of the elements at 3.1 bytes and the update's own names and hashes; a mirror that was
    restarted gets all weights, beside one that gets changes; nothing changed, nothing travels; nothing is left."""
    weights = model()
    assert push(transport, fars, weights, 1) > size(weights)
    for version in range(2, 6):
        change(weights, seed=version)
        assert push(transport, fars, weights, version) < 0.05 * size(weights) + 2_000
        assert all(same(far.engine.has, weights) for far in fars)
    fars[0].restart()
    change(weights, seed=6)
    assert push(transport, fars, weights, 6) > size(weights)
    assert all(same(far.engine.has, weights) for far in fars)
    assert push(transport, fars, weights, 7) < 500
    assert all(same(far.engine.has, weights) for far in fars)
    change(weights, seed=8, share=1.0)
    assert push(transport, fars, weights, 8) < 1.3 * size(weights)
    assert all(same(far.engine.has, weights) for far in fars)
    assert list((tmp_path / "shared").iterdir()) == []


def test_engines_of_this_machine_read_the_trainers_copy(
    fars: list[Far], transport: DeltaTransport, tmp_path: Path
) -> None:
    """Nothing travels for them; they and far ones get the same in one update."""
    near = fars[1]
    near.engine.shares_memory = True
    weights = model()
    for version in (1, 2):
        change(weights, seed=version)
        assert push(transport, [near], weights, version) == 0
        assert same(near.engine.has, weights)
    assert push(transport, fars, weights, 3) > size(weights)
    change(weights, seed=4)
    assert 0 < push(transport, fars, weights, 4) < 0.1 * size(weights)
    assert all(same(far.engine.has, weights) for far in fars)


def test_an_update_that_breaks_off_is_made_up_for_in_full(
    fars: list[Far], transport: DeltaTransport, tmp_path: Path
) -> None:
    weights = model()
    push(transport, fars, weights, 1)
    change(weights, seed=2)
    with pytest.raises(RuntimeError, match="lost a rank"), transport.session([far.engine for far in fars], 2) as send:
        send([("layer.1", weights["layer.1"])])
        raise RuntimeError("lost a rank")
    assert list((tmp_path / "shared").iterdir()) == []
    change(weights, seed=3)
    assert push(transport, fars, weights, 3) > size(weights)
    assert all(same(far.engine.has, weights) for far in fars)


def test_an_engine_that_refuses_has_its_mirror_still(fars: list[Far], transport: DeltaTransport) -> None:
    """Its mirror took the changes: the push that comes again sends none of them a second time."""
    weights = model()
    push(transport, fars, weights, 1)
    change(weights, seed=2)
    fars[0].engine.refuses = True
    with pytest.raises(EngineError, match="far-0 refuses"):
        push(transport, fars, weights, 2)
    fars[0].engine.refuses = False
    assert push(transport, fars, weights, 2) < 500
    assert all(same(far.engine.has, weights) for far in fars)


def test_other_tensors_than_before_are_refused_and_then_sent_in_full(
    fars: list[Far], transport: DeltaTransport
) -> None:
    weights = model()
    push(transport, fars, weights, 1)
    weights["norm"] = torch.ones(96)
    with pytest.raises(EngineError, match="norm differs in shape or dtype"):
        push(transport, fars, weights, 2)
    push(transport, fars, weights, 2)
    assert all(same(far.engine.has, weights) for far in fars)


def kept_update(transport: DeltaTransport, far: Far, weights: Weights, to: Path) -> None:
    """Push a change, and keep the folder that travelled."""
    ask = far.engine.call_mirror

    def keep(what: str, body: dict[str, str]) -> dict[str, str]:
        if what == "patch":
            shutil.copytree(body["folder"], to)
        return ask(what, body)

    far.engine.call_mirror = keep  # type: ignore[method-assign]
    push(transport, [far], weights, 9)
    far.engine.call_mirror = ask  # type: ignore[method-assign]


def test_a_patch_is_for_one_state_alone(fars: list[Far], transport: DeltaTransport, tmp_path: Path) -> None:
    """Applied a second time, or to a mirror that has nothing, it is refused and changes nothing."""
    weights = model()
    push(transport, fars[:1], weights, 1)
    weights["layer.2"][3, 4] += 1
    kept_update(transport, fars[0], weights, tmp_path / "kept")
    before, state = dict(fars[0].engine.has), mirrored(fars[0].engine)
    with pytest.raises(EngineError, match=r"patch refused with 409: .*patches state \w{12}, but .* holds state \w{12}"):
        fars[0].engine.call_mirror("patch", {"folder": str(tmp_path / "kept")})
    with pytest.raises(EngineError, match="there are no weights here to patch"):
        fars[1].engine.call_mirror("patch", {"folder": str(tmp_path / "kept")})
    assert mirrored(fars[0].engine) == state and mirrored(fars[1].engine) is None
    assert push(transport, fars[:1], weights, 2) < 500
    assert same(fars[0].engine.has, before)


@pytest.mark.parametrize("fault", ["bits", "length", "missing", "copy"])
def test_what_does_not_prove_right_has_no_state(
    fault: str, fars: list[Far], transport: DeltaTransport, tmp_path: Path
) -> None:
    """A bit turned on the way, too few values, a lost file, a copy that somebody wrote to: refused, with the name of a
    tensor, and the next update brings all weights."""
    far, weights = fars[0], model()
    push(transport, fars[:1], weights, 1)
    change(weights, seed=2)
    ask = far.engine.call_mirror

    def faulty(what: str, body: dict[str, str]) -> dict[str, str]:
        if what == "patch":
            (first, *_) = sorted(Path(body["folder"]).glob("changes-*"))
            content = bytearray(first.read_bytes())
            if fault == "bits":
                content[-1] ^= 1
                first.write_bytes(content)
            elif fault == "length":
                manifest = Path(body["folder"]) / "update.json"
                forms = json.loads(manifest.read_text())
                forms["forms"] = dict.fromkeys(forms["forms"], "whole")
                manifest.write_text(json.dumps(forms))
            elif fault == "missing":
                first.unlink()
            else:
                assert far.mirror._folder is not None
                (file, *_) = sorted(far.mirror._folder.path.glob("model-*"))
                with file.open("r+b") as opened:
                    opened.seek(-1, os.SEEK_END)
                    opened.write(bytes([content[-1] ^ 255]))
        return ask(what, body)

    far.engine.call_mirror = faulty  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"409: .*(differ from what was sent: \w|does not fit \w)"):
        push(transport, fars[:1], weights, 2)
    far.engine.call_mirror = ask  # type: ignore[method-assign]
    assert mirrored(far.engine) is None
    assert push(transport, fars[:1], weights, 2) > size(weights)
    assert same(far.engine.has, weights)


def test_a_mirror_wants_the_key_and_says_what_it_cannot_see(fars: list[Far], tmp_path: Path) -> None:
    stranger = EngineClient("http://far", key="another")
    stranger.mirror = fars[0].engine.mirror
    with pytest.raises(EngineError, match="state refused with 401: wrong key"):
        mirrored(stranger)
    with pytest.raises(EngineError, match="409: .*must be visible from here under the same path"):
        fars[0].engine.call_mirror("fill", {"folder": str(tmp_path / "elsewhere")})
    stranger.close()


def test_a_copy_needs_room(fars: list[Far], transport: DeltaTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 << 20, 64 << 20, 1000))
    with pytest.raises(UserError, match="sync.mirror = .*copies: has 0 MB free.*name a folder on a local disk"):
        push(transport, fars, model(), 1)
    with pytest.raises(UserError, match="sync.mirror = /proc/none: cannot hold a copy"):
        push(DeltaTransport(Path("unused"), Path("/proc/none")), fars, model(), 1)


@pytest.mark.process
def test_copies_of_killed_processes_are_cleared_away(tmp_path: Path) -> None:
    """Not those of living ones."""
    child = os.fork()
    if child == 0:
        PrivateFolder(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (abandoned,) = tmp_path.iterdir()
    first, second = PrivateFolder(tmp_path), PrivateFolder(tmp_path)
    assert set(tmp_path.iterdir()) == {first.path, second.path} and abandoned not in (first.path, second.path)
    first.close(), second.close()
    assert list(tmp_path.iterdir()) == []


def test_engines_without_a_mirror_are_refused_at_the_start(tmp_path: Path) -> None:
    engine = ReadingEngine("http://far")
    engine._info = {"tp_size": 1}
    with pytest.raises(UserError, match="sync.delta = True: engine http://far has no mirror.*owpo serve --rendezvous"):
        make_sync(SyncConfig(transport="disk", delta=True), [engine], tmp_path)
    engine.close()
