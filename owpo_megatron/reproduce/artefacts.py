"""Tables and figures of the paper: the runs of each, its evaluation sets, its layout. Data, no code.

A run appears once in the runs folder whatever refers to it: Tables 2, 3, 5 and 6 and Figure 4 are one set of runs, two
rows of Table 4 are among them, and the references of all are checkpoints of their DAPO run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from owpo_megatron.errors import UserError

Place = Literal["best", "converged"]
Guide = Literal["none", "base", "best", "prior"]
"""Reference of a run: none; the base model; the best checkpoint of the DAPO run (section 5.1); or its first checkpoint
that reaches the suboptimal score (sections 5.3 and 5.4)."""
Cell = tuple[str, str, Place]
"""Evaluation set, metric, checkpoint."""


@dataclass(frozen=True)
class Entry:
    """A run of the paper; `stages` of iterative self-evolution, or None for one stage with a fixed reference.

    Example:
        Entry("mopd, alpha 0.5", "mopd", "best", {"algorithm.alpha": 0.5})
    """

    label: str
    method: str
    guide: Guide
    set: dict[str, Any] = field(default_factory=dict)
    stages: int | None = None


@dataclass(frozen=True)
class Artefact:
    """A table or figure.

    Args:
        kind: layout, see report/reproduction.py.
        columns: cells of each row, in order; "average" is over the other sets of its metric and checkpoint.
    """

    name: str
    kind: Literal["table", "curves", "stages", "bars", "dynamics", "reversals"]
    title: str
    entries: tuple[Entry, ...] = ()
    columns: tuple[Cell, ...] = ()

    @property
    def sets(self) -> list[str]:
        """Evaluation sets, each once."""
        return list(dict.fromkeys(name for name, _, _ in self.columns if name != AVERAGE))


AVERAGE = "average"
MATHS = ("aime24", "aime25", "amc")
VALIDATION = "aime24"  # chooses the checkpoints (section 5.1)

DAPO = Entry("dapo", "dapo", "none")
MAIN = (
    Entry("grpo", "grpo", "base"),
    DAPO,
    Entry("sym_dapo", "sym_dapo", "best"),
    Entry("mopd", "mopd", "best"),
    Entry("opd", "opd", "best", {"rollout.overlong_tokens": 0}),  # rewards play no part in it
    Entry("owpo", "owpo", "best"),
)
SENSITIVITY = (
    *(Entry(f"sym_dapo, beta {beta:g}", "sym_dapo", "best", {"algorithm.beta": beta}) for beta in (1e-3, 1e-2, 1e-1)),
    *(
        Entry(f"mopd, alpha {alpha:g}", "mopd", "best", {"algorithm.alpha": alpha})
        for alpha in (0.1, 0.5, 1.0, 5.0, 10.0, 50.0)
    ),
)
EVOLUTION = (Entry("mopd", "mopd", "prior", stages=6), Entry("owpo", "owpo", "prior", stages=4))
ABLATION = tuple(
    Entry(label, method, "prior")
    for label, method in (
        ("owpo", "owpo"),
        ("w/o Asym", "owpo_no_asym"),
        ("w/o Locking", "owpo_no_locking"),
        ("w/o Accel", "owpo_no_accel"),
    )
)


def _at_both() -> tuple[Cell, ...]:
    """Columns of Table 2."""
    return tuple((name, "pass@1", place) for name in (*MATHS, AVERAGE) for place in ("best", "converged"))


def _at_one(place: Place) -> tuple[Cell, ...]:
    """Columns of Tables 5 and 6."""
    return tuple((name, metric, place) for name in (*MATHS, AVERAGE) for metric in ("pass@1", "pass@16"))


ARTEFACTS: dict[str, Artefact] = {
    one.name: one
    for one in (
        Artefact("table2", "table", "Pass@1 at the best and the converged checkpoint", MAIN, _at_both()),
        Artefact(
            "table3",
            "table",
            "Mean accuracy on general science, best checkpoint",
            MAIN,
            (("gpqa", "pass@1", "best"), ("mmlu_pro", "pass@1", "best")),
        ),
        Artefact(
            "table4",
            "table",
            "Sensitivity to beta and alpha, best checkpoint",
            SENSITIVITY,
            ((VALIDATION, "pass@1", "best"), (VALIDATION, "pass@16", "best")),
        ),
        Artefact("table5", "table", "Pass@1 and Pass@16 at the best checkpoint", MAIN, _at_one("best")),
        Artefact("table6", "table", "Pass@1 and Pass@16 at the converged checkpoint", MAIN, _at_one("converged")),
        Artefact("figure3", "dynamics", "Effective progress g over the directional deviation"),
        Artefact(
            "figure4",
            "curves",
            "Pass@1 during training",
            (DAPO, *(one for one in MAIN if one.method in ("opd", "mopd", "owpo"))),
            ((VALIDATION, "pass@1", "best"), (VALIDATION, "pass@1", "converged")),
        ),
        Artefact(
            "figure5",
            "stages",
            "Iterative self-evolution from a suboptimal prior",
            EVOLUTION,
            ((VALIDATION, "pass@1", "best"),),
        ),
        Artefact(
            "figure6",
            "bars",
            "Ablation under the suboptimal reference",
            ABLATION,
            (("aime24", "pass@1", "best"), ("aime25", "pass@1", "best")),
        ),
        # Not in the paper: the evidence for its argument, from what every run logs.
        Artefact(
            "reversals",
            "reversals",
            "Force reversal in training",
            (*(one for one in SENSITIVITY if one.method == "sym_dapo"), *MAIN[3:]),
            ((VALIDATION, "pass@1", "best"),),
        ),
    )
}


def artefact(name: str) -> Artefact:
    """Return the table or figure of this name.

    Raises:
        UserError: the paper has none, or none that is made of runs.
    """
    if name not in ARTEFACTS:
        raise UserError("artefact", name, f"use one of {', '.join(ARTEFACTS)}")
    return ARTEFACTS[name]
