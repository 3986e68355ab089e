"""PROF: process rewards choose which siblings are trained on, and are no reward themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.plan import PlanView, first_groups, siblings
from owpo_megatron.methods.sampling.base import Sampled
from owpo_megatron.types import Group


@dataclass(frozen=True)
class Prof(Sampled):
    """Keep a share of n siblings: right answers with the highest mean process reward and wrong ones with the lowest,
    as many of each as there are. The process reward is a part that the verifier's rule returns (`part`), the mean over
    the response's steps. GRPO's advantages on what is left. Source: the authors' description (Chenluye99/PROF); the
    share is a setting of each of their runs, 1/2 here."""

    name = "prof"
    summary = "as GRPO's S; right siblings with high and wrong ones with low process rewards"
    paper = "arXiv:2509.03403"

    share: float = hyper(0.5, "Share of the siblings that is kept.", gt=0, le=1)
    part: str = hyper("process", "Name of the part that holds the mean process reward.")

    def keep(self, view: PlanView) -> Sequence[Group]:
        return [siblings(group, self.consistent(group)) for group in first_groups(view)]

    def consistent(self, group: Group) -> list[int]:
        """Places of the siblings to keep."""
        process = [(verdict.parts or {}).get(self.part, 0.0) for verdict in group.verdicts]
        right = sorted((at for at, one in enumerate(group.verdicts) if one.correct), key=lambda at: -process[at])
        wrong = sorted((at for at, one in enumerate(group.verdicts) if not one.correct), key=lambda at: process[at])
        kept = max(round(self.share * len(process)), 2)
        of_right = min(len(right), max(kept // 2, kept - len(wrong)))
        return sorted(right[:of_right] + wrong[: kept - of_right])
