"""Every file under examples/ loads, and the recipes fit the machines they name; no weights, no data, no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_models import SHAPES

from owpo_megatron.config import Config
from owpo_megatron.config.file import read_mapping
from owpo_megatron.errors import UserError
from owpo_megatron.experiments.compare import plan as plan_of
from owpo_megatron.experiments.compare import specs_of
from owpo_megatron.experiments.lab import Lab, load_section
from owpo_megatron.experiments.pool import with_needs
from owpo_megatron.experiments.protocols import SelfEvolution, TwoStage
from owpo_megatron.launch.job import Job
from owpo_megatron.methods import catalogue
from owpo_megatron.plan import Plan, make_plan

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(file for file in EXAMPLES.glob("*/*.yaml") if "apiVersion:" not in file.read_text())  # not Kubernetes'
GIB = 2**30
# what the README adds for a method besides algorithm.name
ALONE = {"opd": ["rollout.overlong_tokens=0"], "grpo": ["reference.refresh=fixed"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders with the true config.json and nothing else."""
    out = {}
    for name, shape in SHAPES.items():
        out[name] = tmp_path_factory.mktemp("models") / name
        out[name].mkdir()
        (out[name] / "config.json").write_text(json.dumps(shape))
    return out


def plan(folders: dict[str, Path], recipe: str, file: str, *overrides: str) -> Plan:
    config = Config.load(EXAMPLES / recipe / file, [f"model.path={folders[recipe]}", *overrides])
    return make_plan(config, 80 * GIB)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_example_loads(file: Path) -> None:
    raw = read_mapping(file)
    if "first" in raw:
        load_section(TwoStage, file).lab().base_run()
    elif "prior" in raw:
        load_section(SelfEvolution, file).lab().base_run()
    elif "methods" in raw:
        Lab.load(file).base_run()
    else:
        raw = raw.get("run", raw)
        raw["data"].setdefault("source", "task:cipher")  # one example asks for it on the command line
        Config.build(raw)


@pytest.mark.parametrize(
    ("file", "runs", "guided"),
    [
        ("two_stage.yaml", 6, "best"),
        ("ablation.yaml", 5, "reached"),
        ("sensitivity.yaml", 10, "best"),
        ("self_evolve.yaml", 3, "reached"),
    ],
)
@pytest.mark.parametrize("recipe", SHAPES)
def test_the_papers_experiments_are_these_runs(
    folders: dict[str, Path], recipe: str, file: str, runs: int, guided: str
) -> None:
    """DAPO once, as row and as reference; Figure 6 and self-evolution with the suboptimal reference (5.3, 5.4)."""
    path, overrides = EXAMPLES / recipe / file, [f"run.model.path={folders[recipe]}"]
    if file == "two_stage.yaml":
        lab = load_section(TwoStage, path, overrides).lab()
    elif file == "self_evolve.yaml":
        lab = load_section(SelfEvolution, path, overrides).lab()
    else:
        lab = Lab.load(path, overrides)
    cells = plan_of(lab)
    assert len(with_needs(specs_of(cells))) == runs
    assert {cell.run.weights for cell in cells if cell.run.reference} == {guided}
    assert {cell.run.config.optimizer.beta2 for cell in cells} == {0.999}
    if file == "self_evolve.yaml":
        assert [cell.run.config.optimizer.steps for cell in cells] == [320, 480]


@pytest.mark.parametrize("file", ["config.yaml", "four_nodes.yaml"])
@pytest.mark.parametrize("recipe", SHAPES)
def test_a_recipe_fits_with_every_method(folders: dict[str, Path], recipe: str, file: str) -> None:
    for name in catalogue():
        overrides = [f"algorithm.name={name}", *ALONE.get(name, [])]
        made = plan(folders, recipe, file, *overrides)
        assert made.problem is None, f"{name}: {made.problem}"
        assert made.free > 4 * GIB, "some room for what an estimate misses"
    config = Config.load(EXAMPLES / recipe / file)
    job = Job(config, Path.cwd())
    assert job.world_size == config.parallel.world_size
    assert job.total_nodes == (1 if file == "config.yaml" else 4)
    assert config.rollout.prompts_per_step == 512 and config.rollout.group_size == 16
    assert config.optimizer.updates_per_step * 32 == 512 and config.optimizer.lr == 1e-6
    # ten rollout steps: DAPO's framework moves the schedule once per rollout step
    assert (config.optimizer.warmup_steps, config.optimizer.beta2) == (10 * 16, 0.999)


@pytest.mark.parametrize("recipe", SHAPES)
def test_the_page_of_a_recipe_has_the_plans_figures(folders: dict[str, Path], recipe: str) -> None:
    """Its table of memory, row by row: layout, trainer, engine, used, tokens in an engine's cache."""
    page = (EXAMPLES / recipe / "README.md").read_text()
    for file, label in (("config.yaml", "one node"), ("four_nodes.yaml", "four nodes")):
        for method in ("owpo", "dapo"):
            made = plan(folders, recipe, file, f"algorithm.name={method}")
            assert made.engine is not None
            sizes = (made.trainer_total, made.engine.static, made.used)
            row = f"| {label} | {method} | " + " | ".join(f"{size / GIB:.1f}" for size in sizes)
            assert f"{row} | {made.engine.tokens:,} |" in page


def test_the_page_says_how_to_have_the_published_set() -> None:
    """Not `data.leave_out=[]`, which loads every copy of a problem that the published file has."""
    assert "data.leave_out=[repeated]" in (EXAMPLES / "qwen2.5-math-7b" / "README.md").read_text()


# --------------------------------------------------------------------------------------------- includes
def write(path: Path, **content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_file_builds_on_another(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", name="base", model={"path": "m"}, data={"source": "task:cipher"}, parallel={"tp": 2})
    write(tmp_path / "sub" / "middle.yaml", include="../base.yaml", parallel={"dp": 4}, eval={"pass_at": [1]})
    top = write(tmp_path / "top.yaml", include="sub/middle.yaml", name="top", parallel={"tp": 1})
    config = Config.load(top, ["parallel.pp=2"])
    assert (config.name, config.parallel.tp, config.parallel.dp, config.parallel.pp) == ("top", 1, 4, 2)
    assert config.eval.pass_at == [1] and str(config.model.path) == "m"
    lab = write(tmp_path / "lab.yaml", name="lab", run={"include": "top.yaml", "seed": 7}, methods=["dapo"])
    run = read_mapping(lab)["run"]
    assert (run["name"], run["seed"], run["parallel"]) == ("top", 7, {"tp": 1, "dp": 4})


def test_includes_that_cannot_work(tmp_path: Path) -> None:
    missing = write(tmp_path / "a.yaml", include="nowhere.yaml")
    with pytest.raises(UserError, match=r"include = .*nowhere.yaml: no such file"):
        Config.load(missing)
    write(tmp_path / "b.yaml", include="c.yaml")
    with pytest.raises(UserError, match=r"include = .*b.yaml: .*c.yaml includes it again"):
        Config.load(write(tmp_path / "c.yaml", include="b.yaml").with_name("b.yaml"))
