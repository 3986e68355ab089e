"""Table of the evaluation sets: source, number of samples, verifier rule and metrics of each.

The sets that the paper uses are inferred from its figures: Pass@1 over n problems with k samples is a multiple of
1 / (n k). docs/evaluation.md has the arithmetic.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from owpo_megatron.config import EvalConfig, SetConfig
from owpo_megatron.config.evaluation import Estimator, Instruction
from owpo_megatron.data.files import SUFFIXES
from owpo_megatron.errors import UserError

VARIABLE = "OWPO_DATA"
HELD_OUT = "held_out"  # the name of a run's own set: the held-out problems of `data`


@dataclass(frozen=True)
class EvalSet:
    """An evaluation set.

    Example:
        EvalSet("aime24", "AIME24", samples=32, pass_at=(1, 16), rule="math", files=("aime24",), problems=30)
    """

    name: str
    title: str  # name in tables
    samples: int = 8  # k, per problem
    pass_at: tuple[int, ...] = (1,)  # (1,): mean accuracy
    temperature: float = 1.0
    top_p: float = 0.7
    rule: str = "auto"  # verifier rule; "auto": by the domain of each problem
    files: tuple[str, ...] = ()  # possible file names, without suffix, in a data folder
    hub: str | None = None  # location on the hub, in the syntax of `data.source`
    source: str | None = None  # a file or `task:NAME`, overriding the search
    limit: int | None = None  # only the first problems
    problems: int | None = None  # expected number of problems
    instruction: Instruction = "boxed"  # chat template: added to a problem that has none
    pass_estimator: Estimator = "unbiased"
    chain: str | None = None  # rule that judges the reasoning of right responses, for cot_pass@k
    confidential: bool = False  # its authors forbid storing its text: results contain hashes and verdicts only

    def metrics(self) -> dict[str, int]:
        """Return the metrics and their k, e.g. {"pass@1": 1, "pass@16": 16}; each with `cot_pass@k` where a rule judges
        the reasoning."""
        kinds = ("pass", "cot_pass") if self.chain else ("pass",)
        return {f"{kind}@{k}": k for k in self.pass_at for kind in kinds}


def _maths(name: str, title: str, problems: int, files: tuple[str, ...], hub: str | None) -> EvalSet:
    """Build a maths set as in the paper's appendix B.5: 32 samples, Pass@1 and Pass@16."""
    return EvalSet(name, title, 32, (1, 16), rule="math", files=files, hub=hub, problems=problems)


def _choices(name: str, title: str, problems: int, files: tuple[str, ...], hub: str, confidential: bool) -> EvalSet:
    """Build a multiple-choice set as in the paper's appendix B.5: 8 samples, mean accuracy."""
    rule = "multiple_choice"
    return EvalSet(name, title, 8, (1,), rule=rule, files=files, hub=hub, problems=problems, confidential=confidential)


SETS: dict[str, EvalSet] = {
    one.name: one
    for one in (
        _maths("aime24", "AIME24", 30, ("aime24",), "hub:HuggingFaceH4/aime_2024"),
        _maths("aime25", "AIME25", 30, ("aime25",), "hub:yentinglin/aime_2025"),
        _maths("amc", "AMC", 83, ("amc_aimo83", "amc"), "hub:AI-MO/aimo-validation-amc"),
        _maths("amc23", "AMC23", 40, ("amc23",), None),
        _choices(
            "gpqa",
            "GPQA",
            198,
            ("gpqa_diamond",),
            "hub:Idavidrein/gpqa@refs/convert/parquet:gpqa_diamond/train/*.parquet",
            confidential=True,
        ),
        _choices(
            "mmlu_pro",
            "MMLU-Pro",
            12_032,
            ("mmlu_pro",),
            "hub:TIGER-Lab/MMLU-Pro:data/test-*.parquet",
            confidential=False,
        ),
    )
}


def resolve(wanted: SetConfig, common: EvalConfig | None = None) -> EvalSet:
    """Return the set that a configuration names, with the fields that it overrides.

    Args:
        common: the section whose `instruction`, `pass_estimator` and `chain` hold where the set has none of its own.

    Raises:
        UserError: the name is unknown and has no source, or Pass@k needs more samples than are drawn.
    """
    known = SETS.get(wanted.name)
    if known is None and wanted.source is None:
        remedy = f"no such set; known: {', '.join(SETS)}; for your own, give its source: --set {wanted.name}=FILE"
        raise UserError("evaluation set", wanted.name, remedy)
    base = known or EvalSet(wanted.name, wanted.name)
    if common is not None:
        base = replace(base, instruction=common.instruction, pass_estimator=common.pass_estimator, chain=common.chain)
    fields = wanted.model_dump(exclude={"name", "pass_at"}, exclude_none=True)
    samples = fields.get("samples", base.samples)
    pass_at = tuple(wanted.pass_at or [k for k in base.pass_at if k <= samples])
    if max(pass_at) > samples:
        raise UserError(f"pass_at of {wanted.name}", list(pass_at), f"cannot exceed its samples = {samples}")
    return replace(base, **fields, pass_at=pass_at)


def sets_of_run(wants: EvalConfig, rule: str) -> list[EvalSet]:
    """Return the sets of a run, the primary one first; without any, its held-out problems.

    Args:
        rule: the verifier's, for the held-out problems.

    Raises:
        UserError: as `resolve`.
    """
    if wants.sets:
        primary = wants.primary or wants.sets[0].name
        return [resolve(one, wants) for one in sorted(wants.sets, key=lambda one: one.name != primary)]
    return [
        EvalSet(
            HELD_OUT,
            "held out",
            wants.samples,
            tuple(wants.pass_at),
            wants.temperature,
            wants.top_p,
            rule=rule,
            limit=wants.limit,
            instruction="none",
            pass_estimator=wants.pass_estimator,
            chain=wants.chain,
        )
    ]


def narrowed(one: EvalSet, samples: int | None, limit: int | None) -> EvalSet:
    """Override a set's samples and number of problems; None keeps its own. Pass@k with k > samples is dropped."""
    samples = samples or one.samples
    pass_at = tuple(k for k in one.pass_at if k <= samples) or (1,)
    return replace(one, samples=samples, limit=limit or one.limit, pass_at=pass_at)


def data_folder(given: Path | None) -> Path | None:
    """Return the folder with the files of known sets: the given one, else that of the variable OWPO_DATA.

    Raises:
        UserError: there is no such folder.
    """
    folder = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if folder is not None and not folder.is_dir():
        raise UserError("--data" if given else VARIABLE, folder, "no such folder")
    return folder


def source_of(wanted: EvalSet, folder: Path | None) -> str:
    """Return a set's location: its own source, else a file in the data folder under one of its names, else the hub.

    Raises:
        UserError: it is in none of them.
    """
    if wanted.source is not None:
        return wanted.source
    names = [name + suffix for name in wanted.files for suffix in SUFFIXES]
    found = [folder / name for name in names if (folder / name).is_file()] if folder else []
    if found:
        return str(found[0])
    if wanted.hub is not None:
        return wanted.hub
    looked = f"{folder} has none of {', '.join(names)}" if folder else "no data folder is given (--data DIR)"
    raise UserError("evaluation set", wanted.name, f"{looked}; name its file: --set {wanted.name}=FILE")


def check_sets(wants: EvalConfig) -> None:
    """Check, before a run starts, that its sets are known and their files exist. The hub is not contacted.

    Raises:
        UserError: a set is unknown or missing.
    """
    folder = data_folder(wants.data_dir)
    for spec in map(resolve, wants.sets):
        source = source_of(spec, folder)
        if not source.startswith(("task:", "hub:")) and not Path(source).is_file():
            raise UserError(f"source of {spec.name}", source, "no such file")
