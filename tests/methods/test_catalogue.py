"""The catalogue: discovery, methods from outside, refusals, and the configuration that reads it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from owpo_megatron.config import AlgorithmConfig, Config
from owpo_megatron.errors import UserError
from owpo_megatron.methods import Dapo, Grpo, Method, Terms, catalogue, hyper, hyper_parameters, make_method, register
from owpo_megatron.methods.catalogue import COMMON, _registered, check_declaration, find_method


@pytest.fixture(autouse=True)
def _nothing_stays_registered() -> Iterator[None]:
    yield
    _registered.clear()


def reinforce(name: str = "reinforce") -> type[Method]:
    """A method of one's own, made anew as a notebook's cell does."""

    @dataclass(frozen=True)
    class Reinforce(Method):
        summary = "A log pi"
        needs_old = False
        scale: float = hyper(1.0, "Factor of the value.", gt=0, le=2)

        def terms(self, logp_C, batch):
            return Terms(self.scale * batch.advantage_C * logp_C)

    Reinforce.name = name
    return Reinforce


def config_of(**algorithm: object) -> Config:
    return Config.build({"model": {"path": "m"}, "data": {"source": "task:cipher"}, "algorithm": algorithm})


@pytest.mark.process
def test_the_nine_are_found_and_nothing_imports_torch() -> None:
    code = """
import sys
from owpo_megatron.config import Config
from owpo_megatron.methods import catalogue
print(*catalogue(), "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    nine = ["dapo", "grpo", "mopd", "opd", "owpo", "owpo_no_accel", "owpo_no_asym", "owpo_no_locking", "sym_dapo"]
    assert [name for name in found if name in nine] == nine and found[-1] == "False"


@pytest.mark.parametrize("name", list(catalogue()))
def test_each_declares_itself_and_can_be_configured(name: str) -> None:
    """Every default is within its own bounds and comes back from the configuration; null means the default."""
    method = catalogue()[name]
    check_declaration(method)
    assert method.paper, "where it comes from"
    known = hyper_parameters(method)
    assert all(one.help.endswith(".") for one in known.values())
    defaults = {field: one.default for field, one in known.items()}
    config = config_of(name=name, **defaults)
    assert make_method(config.algorithm) == method()
    nulls = config_of(name=name, **dict.fromkeys(defaults))
    assert make_method(nulls.algorithm) == method()
    assert config.reference.refresh == method.refresh


def test_fields_that_every_method_has_are_the_configurations() -> None:
    assert set(COMMON) == set(AlgorithmConfig.model_fields)
    assert {field.name for field in fields(Method)} == set(COMMON) - {"name", "curriculum", "active_by"}


def test_common_settings_reach_the_method() -> None:
    method = make_method(config_of(name="grpo", tis_cap=2, entropy_coef=0.01, advantage_std="population").algorithm)
    assert (method.tis_cap, method.entropy_coef, method.advantage_std) == (2.0, 0.01, "population")
    assert make_method("grpo", tis_cap=3.0).tis_cap == 3.0


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"name": "grppo"}, r"algorithm.name = grppo: did you mean grpo\? use one of .*, grpo, .*, or python:MODULE"),
        ({"name": "dapo", "beta": 0.1}, "algorithm.beta = 0.1: dapo has no beta; .* use one of .*grpo, .*sym_dapo"),
        ({"clip_hihg": 0.1}, r"algorithm.clip_hihg = 0.1: unknown field; did you mean clip_high\?"),
        ({"curiculum": False}, r"algorithm.curiculum = False: unknown field; did you mean curriculum\?"),
        ({"clip_low": 1.0}, "algorithm.clip_low = 1.0: must be greater than 0 and less than 1"),
        ({"clip_low": "low"}, "algorithm.clip_low = low: must be of type float, e.g. 0.2"),
        ({"weight_high": float("inf")}, "algorithm.weight_high = inf: "),
        ({"nothing": None}, "algorithm.nothing = None: unknown field"),
        ({"name": "python:nowhere:Mine"}, "algorithm.name = python:nowhere:Mine: cannot be imported: No module named"),
        ({"name": "python:math"}, "algorithm.name = python:math: write it as python:MODULE:CLASS"),
    ],
)
def test_mistakes_in_the_configuration(algorithm: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(**algorithm)


def test_a_resolved_file_loads_again(tmp_path: Path) -> None:
    """An older one too, with the other methods' fields as null."""
    config = config_of(name="grpo", beta=0.5)
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml") == config
    raw = yaml.safe_load((tmp_path / "config.yaml").read_text())
    raw["algorithm"] |= {"weight_low": None, "alpha": None, "clip_low": None}
    assert Config.build(raw).algorithm == config.algorithm


def test_the_refresh_of_the_reference_is_the_methods_unless_set() -> None:
    assert config_of(name="owpo").reference.refresh == "interval"
    assert config_of(name="grpo").reference.refresh == "fixed"
    swapped = {"model": {"path": "m"}, "data": {"source": "task:cipher"}, "reference": {"refresh": "interval"}}
    assert Config.build(swapped | {"algorithm": {"name": "grpo"}}).reference.refresh == "interval"


# ------------------------------------------------------------------------------------------------- from outside
def test_a_registered_method_is_one_of_the_catalogue() -> None:
    method = register(reinforce())
    assert catalogue()["reinforce"] is method and find_method("reinforce") is method
    assert make_method(config_of(name="reinforce", scale=2).algorithm) == method(scale=2.0)
    with pytest.raises(UserError, match="algorithm.scale = 3.0: must be greater than 0 and at most 2"):
        config_of(name="reinforce", scale=3)
    with pytest.raises(UserError, match="algorithm.clip_low = 0.1: reinforce has no clip_low; leave it out, or use"):
        config_of(name="reinforce", clip_low=0.1)
    again = register(reinforce())
    assert again is not method and find_method("reinforce") is again, "a notebook's cell may run twice"


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(UserError, match="method = dapo: owpo_megatron.methods.token.dapo.Dapo has this name; give"):
        register(reinforce("dapo"))


def test_a_class_of_a_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
from dataclasses import dataclass
from owpo_megatron.methods import Method, Terms, hyper

@dataclass(frozen=True)
class Mine(Method):
    name = "mine"
    summary = "A log pi"
    scale: float = hyper(1.0, "Factor.", gt=0)

    def terms(self, logp_C, batch):
        return Terms(self.scale * batch.advantage_C * logp_C)
"""
    (tmp_path / "a_package_of_ones_own.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    method = make_method(config_of(name="python:a_package_of_ones_own:Mine", scale=0.5).algorithm)
    assert (method.name, method.scale) == ("mine", 0.5)  # type: ignore[attr-defined]
    # the same as an installed package: its metadata beside it
    info = tmp_path / "ones_own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ones-own\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[owpo.methods]\nmine = a_package_of_ones_own:Mine\n")
    sys.modules.pop("a_package_of_ones_own")
    assert find_method("dapo") is Dapo and "a_package_of_ones_own" not in sys.modules, "not before it is asked for"
    assert catalogue()["mine"].__module__ == "a_package_of_ones_own"
    assert config_of(name="mine", scale=2).algorithm.settings()["scale"] == 2.0
    (info / "entry_points.txt").write_text("[owpo.methods]\ndapo = a_package_of_ones_own:Mine\n")
    with pytest.raises(UserError, match="its class is named mine; the two names must be equal"):
        find_method("dapo")
    (info / "entry_points.txt").write_text("[owpo.methods]\nmine = a_package_of_ones_own:Missing\n")
    with pytest.raises(UserError, match="entry point mine of owpo.methods = .*:Missing: cannot be imported"):
        catalogue()


def test_ill_declared_classes_are_refused() -> None:
    def refused(message: str, **changed: object) -> None:
        method = reinforce()
        for name, value in changed.items():
            setattr(method, name, value)
        with pytest.raises(UserError, match=message):
            register(method)

    refused("give it a `name` of lower-case letters", name="Reinforce It")
    refused("give it a `summary` of one line", summary="")
    refused("`coupling` must be one of token, sample, group, minibatch", coupling="batch")
    refused("`divisor` must be one of tokens, samples, sample_sums", divisor="none")
    refused("`prepare` and a `coupling` other than token go together", coupling="group")
    refused("`prepare` and a `coupling` other than token go together", prepare=lambda self, samples: [])
    refused("write `terms", terms=Method.terms)
    with pytest.raises(UserError, match="must be a subclass of owpo_megatron.Method"):
        register(dict)  # type: ignore[type-var]

    class Bare(Grpo):
        name = "bare"

    with pytest.raises(UserError, match=r"decorate it with @dataclass\(frozen=True\)"):
        register(Bare)

    @dataclass(frozen=True)
    class Unnamed(Grpo):
        pass

    with pytest.raises(UserError, match="give it a `name`"):
        register(Unnamed)

    @dataclass(frozen=True)
    class Plain(Grpo):
        name = "plain"
        delta: float = 0.1

    with pytest.raises(UserError, match="declare the field delta with hyper"):
        register(Plain)

    @dataclass(frozen=True)
    class Outside(Grpo):
        name = "outside"
        delta: float = hyper(0.1, "Width.", gt=1)

    with pytest.raises(UserError, match="outside.delta = 0.1: must be greater than 1"):
        register(Outside)

    @dataclass(frozen=True)
    class Shadow(Grpo):
        name = "shadow"
        curriculum: float = hyper(0.1, "Width.")

    with pytest.raises(UserError, match="rename the field curriculum"):
        register(Shadow)
    assert not _registered
