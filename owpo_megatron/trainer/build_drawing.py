"""Builds what draws and grades responses: verifier, environments, the collector of a step's groups, evaluations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from owpo_megatron.carried import carried
from owpo_megatron.config import Config
from owpo_megatron.environments import EnvironmentBuilder, EpisodeEngine
from owpo_megatron.evaluation.chains import chain_verifier
from owpo_megatron.evaluation.draw import Answering
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.trainer.build_checks import KeptRollouts
from owpo_megatron.trainer.build_data import RunData
from owpo_megatron.trainer.build_plan import build_audit
from owpo_megatron.trainer.evaluate import Evaluator
from owpo_megatron.trainer.exchange import Exchange
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.mixture import Mixture
from owpo_megatron.trainer.noise import RewardNoise
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.trainer.rollout_facts import RolloutFacts
from owpo_megatron.trainer.rollouts import Planning, RolloutCollector
from owpo_megatron.types import Progress, PromptStream, RolloutEngine, Verdict, Verifier
from owpo_megatron.verifiers import make_verifier
from owpo_megatron.workers import GradingOrder


class DrawingBuilder:
    """Builds what global rank 0 draws with, and its empty counterpart on other ranks.

    Args:
        data: problems and tokenizer, of rank 0.
        progress: reports drawing and grading.
        stack: what has to be closed is entered here.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        progress: Progress | None,
        say: Callable[[str], None],
        stack: contextlib.ExitStack,
    ):
        self._config, self._data, self._stack = config, data, stack
        self._progress, self._say = progress, say

    def verifier(self) -> Verifier:
        verifier = make_verifier(self._config.verifier, self._data.domains, self._rules)
        self._stack.callback(verifier.close)
        return verifier

    def grading_order(self, model_files: Path) -> GradingOrder:
        """Return what rollout workers grade with, as `verifier` does."""
        domains = frozenset(self._data.domains)
        import cloudpickle

        objects = cloudpickle.dumps(found) if (found := carried()) else b""
        return GradingOrder(self._config.verifier, model_files.absolute(), domains, self._rules, objects)

    @property
    def _rules(self) -> dict[str, str]:
        """Rules of domains that are evaluation sets."""
        return {domain: rule for one in self._data.sets for domain, rule in one.rules.items()}

    def episodes(self) -> EnvironmentBuilder | None:
        """The environments, on global rank 0; None without, and for recorded responses."""
        config, data = self._config, self._data
        if config.environment is None or data.tokenizer is None or config.rollout.replay is not None:
            return None
        return EnvironmentBuilder(config, data.tokenizer, data.date, self._say, self._stack)

    def collector(
        self,
        main: MainRank,
        rules: RewardRules,
        engine: RolloutEngine | None,
        verifier: Verifier | None,
        stream: PromptStream | None,
        planning: Planning,
        kept_rollouts: KeptRollouts,
        check_verdicts: Callable[[Sequence[Verdict]], None],
        recover: Callable[[], None] | None,
        exchange: Exchange,
    ) -> RolloutCollector:
        config, data = self._config, self._data
        audit = build_audit(config, verifier, data.domains, self._stack)
        noise = RewardNoise(config.seed, config.verifier.flip)
        mixture = Mixture(config.data.source_names, data.domains)
        tools = engine.taken if isinstance(engine, EpisodeEngine) else None
        return RolloutCollector(
            config.rollout,
            config.seed,
            config.optimizer.steps,
            rules,
            noise,
            planning,
            main,
            engine,
            audit or verifier,
            stream,
            decode=data.tokenizer.decode if data.tokenizer else _nothing_to_decode,
            stop_token_ids=data.tokenizer.eos_ids if data.tokenizer else (),
            record=kept_rollouts.record,
            progress=self._progress,
            date=data.date,
            check_verdicts=check_verdicts,
            facts=RolloutFacts(rules, noise, mixture, audit.taken if audit else None, tools),
            recover=recover,
            exchange=exchange,
        )

    def evaluator(self, folder: RunFolder, engine: RolloutEngine | None, verifier: Verifier | None) -> Evaluator | None:
        data = self._data
        if not data.sets:
            return None
        assert data.tokenizer and engine and verifier
        rollout, seed, eos_ids = self._config.rollout, self._config.seed, data.tokenizer.eos_ids
        limit, stop = rollout.max_response_tokens, tuple(rollout.stop)
        if (chains := chain_verifier(self._config.verifier, data.sets)) is not None:
            self._stack.callback(chains.close)
        answering = Answering(engine, verifier, data.tokenizer.decode, eos_ids, limit, seed, stop, chains)
        return Evaluator(data.sets, answering, folder.evaluations, self._progress)


def _nothing_to_decode(ids: Sequence[int]) -> str:
    raise AssertionError("only global rank 0 decodes responses")
