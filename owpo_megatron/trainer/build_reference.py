"""Builds what the policy is compared with: its reference, or teachers in the reference's place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from owpo_megatron.config import EngineConfig, ReferenceConfig, TeacherConfig
from owpo_megatron.engine import Scorer
from owpo_megatron.families import HFModel
from owpo_megatron.policy import MegatronPolicy, SlotReference, SlotTeacher, check_same_model
from owpo_megatron.trainer.exchange import Exchange
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.teachers import EngineTeacher, Routing, Teachers
from owpo_megatron.types import LogprobSource, Progress


class ReferenceBuilder:
    """Looks at everything that is named before anything is started, and builds when policy and engines are there.

    Args:
        engine: time-outs of the teachers' servers.
        needed: the method has a reference or teachers, and this run will use them.
        is_main: global rank 0, which talks to teachers' servers.
        domains: domains of the training prompts, on rank 0.
        progress: reports the scoring by teachers' servers.
        stack: receives everything that must be closed.

    Raises:
        UserError: a folder holds another model, a domain has no teacher, or a teacher's server does not answer.
    """

    def __init__(
        self,
        reference: ReferenceConfig,
        teachers: Sequence[TeacherConfig],
        engine: EngineConfig,
        hf: HFModel,
        needed: bool,
        is_main: bool,
        domains: Iterable[str],
        progress: Progress | None,
        stack: contextlib.ExitStack,
    ):
        self._reference = reference
        self._teachers = teachers if needed else []
        self.keeps_reference = needed and not self._teachers
        """The policy needs a slot for a reference that is swapped or saved."""
        self._routing = Routing(self._teachers)
        self._scorers: dict[str, Scorer] = {}
        if self.keeps_reference and reference.path is not None:
            check_same_model("reference.path", reference.path, hf)
        for teacher in self._teachers:
            if teacher.path is not None:
                check_same_model(f"teachers ({teacher.name}) path", teacher.path, hf)
        if is_main and self._teachers:
            self._routing.check(domains)
            for teacher in self._teachers:
                if teacher.urls:
                    scorer = Scorer(teacher.urls, engine, f"teachers ({teacher.name}) urls", progress)
                    stack.callback(scorer.close)
                    self._scorers[teacher.name] = scorer

    def build(self, policy: MegatronPolicy, main: MainRank, exchange: Exchange) -> SlotReference | Teachers:
        if not self._teachers:
            loaded = self.keeps_reference and self._reference.path is not None
            return SlotReference(policy, loaded=loaded)
        return Teachers(self._routing, {one.name: self._teacher(one, policy, main, exchange) for one in self._teachers})

    def _teacher(
        self, teacher: TeacherConfig, policy: MegatronPolicy, main: MainRank, exchange: Exchange
    ) -> LogprobSource:
        if teacher.path is not None:
            return SlotTeacher(policy, teacher.name, teacher.path, resident=teacher.placement == "resident")
        scorer = self._scorers.get(teacher.name)
        return EngineTeacher(main, scorer.score if scorer else None, scorer.serves if scorer else None, exchange)
