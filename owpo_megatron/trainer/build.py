"""The composition root: the only module that knows every room. Makes a run's parts out of its configuration."""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from owpo_megatron.config import HF_FILES, Config, hf_folder
from owpo_megatron.conversion import carry_files
from owpo_megatron.data import load_tokenizer, make_stream
from owpo_megatron.engine import Fleet
from owpo_megatron.families import check_context, check_parallel, expert_shape, hf_shapes, read_hf_config
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.topology import Topology, close_topology, init_topology
from owpo_megatron.methods import Method, check_coupling, make_method
from owpo_megatron.policy import MegatronPolicy, SlotReference
from owpo_megatron.run.best import BestWeights
from owpo_megatron.run.checkpoints import CheckpointFolder, began_on
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.run.state import RunState
from owpo_megatron.samples import SampleRecorder
from owpo_megatron.trainer.batches import BatchBuilder
from owpo_megatron.trainer.build_checks import KeptRollouts, build_checks
from owpo_megatron.trainer.build_data import RunData, load_run_data
from owpo_megatron.trainer.build_drawing import DrawingBuilder
from owpo_megatron.trainer.build_engine import EngineBuilder
from owpo_megatron.trainer.build_metrics import build_metrics, build_trackers
from owpo_megatron.trainer.build_plan import build_planning
from owpo_megatron.trainer.build_reference import ReferenceBuilder
from owpo_megatron.trainer.build_workers import build_workers, put_to_work
from owpo_megatron.trainer.checks import BadGradients, no_weights_are_lost
from owpo_megatron.trainer.console import RunConsole, headline
from owpo_megatron.trainer.exchange import Exchange
from owpo_megatron.trainer.given import NOTHING, Given
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.parts import Parts
from owpo_megatron.trainer.profile import StepProfiler
from owpo_megatron.trainer.record import RunRecord
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.trainer.schedule import Schedule
from owpo_megatron.trainer.stop import StopSignal
from owpo_megatron.trainer.supply import pushed_by_this_thread
from owpo_megatron.trainer.swap_check import CheckedSwaps
from owpo_megatron.trainer.turns import RolloutsInTurn
from owpo_megatron.trainer.watchdog import Watchdog, longest_limit
from owpo_megatron.types import Sink, Verifier
from owpo_megatron.verifiers import KnownVerdicts
from owpo_megatron.workers import WorkerPool


def parts(
    config: Config,
    stack: contextlib.ExitStack,
    given: Given = NOTHING,
    stop_file: Path | None = None,
    evaluation_only: bool = False,
    checkpoint: Path | None = None,
    logs: Path | None = None,
) -> Parts:
    """The parts of the run that the configuration describes, on this rank. Collective.

    Args:
        stack: what has to be closed is entered here.
        stop_file: once it exists, the run stops.
        evaluation_only: an engine is needed even where rollouts are replayed, and nothing is written but eval/.
        checkpoint: what is evaluated; None: the newest one.
        logs: for what this rank writes when it fails; None: logs/ of the run folder.

    Raises:
        UserError: model, data, parallel sizes or engine do not fit each other.
        EngineError: an engine does not start.
    """
    return _Builder(config, stack, given, stop_file, evaluation_only, checkpoint, logs).parts()


class _Builder:
    """Objects that several parts are built from, in the order in which they become available."""

    def __init__(
        self,
        config: Config,
        stack: contextlib.ExitStack,
        given: Given,
        stop_file: Path | None,
        evaluation_only: bool,
        checkpoint: Path | None,
        logs: Path | None,
    ):
        self.config, self.stack, self.given = config, stack, given
        self.stop_file, self.evaluation_only = stop_file, evaluation_only
        self.folder = RunFolder.of(config)
        self.model_files = hf_folder(config.model.path)
        self.hf = read_hf_config(self.model_files)
        check_parallel(self.hf, config.parallel)
        check_context(self.hf, config.data.max_prompt_tokens + config.rollout.max_response_tokens)
        if config.rollout.routing_replay:
            expert_shape(self.hf)
        self.topology: Topology = init_topology(
            config.parallel, config.seed, longest_limit(config.checks, config.engine)
        )
        stack.callback(close_topology)
        self.is_main = self.topology.is_main
        self.console = RunConsole(config.optimizer.steps) if self.is_main else None
        self.say: Callable[[str], None] = self.console.say if self.console else _say_nothing
        logs = logs or self.folder.logs
        self.watchdog = Watchdog(config.checks, config.engine, logs, self.topology.rank, self.topology.world_size)
        self.progress = self.watchdog.beating(self.console.working) if self.console else None
        keeps_samples = self.is_main and config.rollout.save and not evaluation_only
        self.recorder = SampleRecorder(self.folder.samples, config.rollout.save_tokens) if keeps_samples else None
        self.checkpoints = CheckpointFolder(self.folder.checkpoints, config.checkpoint.keep)
        # A template that prints the date prints the same after midnight: checkpoints keep the day.
        kept = began_on(checkpoint) if checkpoint else self.checkpoints.began_on()
        date = config.data.date or kept or datetime.date.today()
        self.kept_rollouts = KeptRollouts(self.folder, self.recorder, config.rollout.replay is not None)
        self.data = RunData(date)
        if self.is_main:
            self.data = load_run_data(config, self.model_files, date, evaluation_only, self.say)
        self.drawing = DrawingBuilder(config, self.data, self.progress, self.say, stack)
        self.episodes = self.drawing.episodes()

    def parts(self) -> Parts:
        config, topology = self.config, self.topology
        method = self.given.method or make_method(config.algorithm)
        check_coupling(method)
        references = self._references(method)
        engines = EngineBuilder(config, self.hf, self.model_files, self.evaluation_only, self.say, self.stack)
        engine_start = engines.start(self.given.engine) if self.is_main else None  # while the model is built
        workers = self._workers(engines)
        if engines.take_memory and not cpu.on_cpu():
            # SGLang takes a share of the memory that it finds free: no rank takes any of it before
            if engine_start:
                engine_start.result()
            topology.broadcast(None)
        self.say(headline(config, sum(math.prod(shape) for shape in hf_shapes(self.hf).values())))
        schedule = Schedule.of(config, references.keeps_reference)
        policy = self.given.policy or self._policy(references.keeps_reference)
        policy.on_bad_gradient = BadGradients(
            config.checks, self.folder, self.watchdog, self.kept_rollouts.save, self.say
        )
        no_weights_are_lost(config.model.path, policy.weights_are_finite())
        engine = engine_start.result() if engine_start else None
        fleet = engine if isinstance(engine, Fleet) else None
        if fleet and workers:
            put_to_work(workers, fleet, config)
        revive = fleet.revive if fleet else (lambda error: 0)
        planning = build_planning(config, method, self.data.tokenizer, self.data.date)
        checks = build_checks(config, fleet, workers, planning.method.draws_as_policy, self.say)
        senders = engines.senders(topology, policy)
        turns = engines.turns(policy, topology.barrier, fleet)
        sync = (self.given.sync or engines.sync(fleet, senders, turns)) if self.is_main else None
        waiting = self.watchdog.waiting
        exchange = Exchange(topology)
        policy.fetch = exchange.fetch
        main = MainRank(
            topology.broadcast, policy.named_weights, sync, revive, policy, waiting, senders, turns, exchange
        )
        if fleet:
            fleet.on_restart = pushed_by_this_thread(main.push_again)
            fleet.notify = self.watchdog.noting(fleet.notify)  # an engine that is restarted is no hang
            self.watchdog.abort_engines = fleet.abort
        check = engines.check(main, policy, fleet) if self.given.engine is None else None
        reference = references.build(policy, main, exchange)
        ratchet = None
        if isinstance(reference, SlotReference) and schedule.stages.every is not None:
            ratchet = CheckedSwaps(reference, reference, policy, self.hf.vocab_size)
        verifier = KnownVerdicts(self._verifier()) if self.is_main else None  # of episodes and rollout workers
        if self.episodes and engine:
            engine = self.episodes.over(engine)
        stream = (
            (self.given.stream or make_stream(config.data, self.data.prompts, config.seed)) if self.is_main else None
        )
        rules = RewardRules.of(config.rollout, config.verifier, config.reward)
        recover = partial(fleet.with_revival, main.push_again) if fleet else None
        rollouts = self.drawing.collector(
            main, rules, engine, verifier, stream, planning, self.kept_rollouts, checks.verdicts, recover, exchange
        )
        batches = BatchBuilder(
            config.algorithm,
            config.rollout.group_size,
            config.optimizer.updates_per_step,
            rules,
            schedule.stages,
            method,
            policy,
            reference,
            self.recorder.trained if self.recorder else None,
            decode=load_tokenizer(self.model_files).decode if method.needs_text else None,
            steps=config.optimizer.steps,
            replays_routing=config.rollout.routing_replay,
            exchange=exchange,
            recorded=config.rollout.save_tokens if config.rollout.save and not self.evaluation_only else 0,
        )
        evaluator = self.drawing.evaluator(self.folder, engine, verifier)
        stop = StopSignal(topology.any, self.stop_file if self.is_main else None)
        sinks: Sequence[Sink] = ()
        if self.console:
            trackers = [] if self.evaluation_only else build_trackers(config, self.say, self.stack)
            sinks = (self.console, *trackers, *self.given.sinks)
        metrics = build_metrics(config, self.hf, sinks, checks) if self.is_main else None
        profiler = StepProfiler(config.profile, self.folder.profile, topology.rank)
        checkpoints = self.checkpoints
        chooser = ratchet if schedule.stages.chooses_best else None
        keeps = config.checkpoint
        best = BestWeights(
            self.folder.path, topology, policy, self._carry, checkpoints, keeps.keep_best, chooser, keeps.keep_at_score
        )
        carry, steps = self._carry, schedule.steps
        state = RunState(
            topology, policy, reference, rollouts, batches, best, metrics, checkpoints, carry, self.say, steps
        )
        self.stack.callback(state.close)
        background, wait = keeps.asynchronous, self.kept_rollouts.wait
        return Parts(
            ranks=topology,
            schedule=schedule,
            method=method,
            model=self.hf,
            policy=policy,
            reference=reference,
            ratchet=ratchet,
            engine=engine,
            describe_engine=fleet.describe if fleet else dict,
            verifier=verifier,
            stream=stream,
            main=main,
            engines=check or main,
            rollouts=RolloutsInTurn(rollouts, turns) if turns else rollouts,
            batches=batches,
            evaluator=evaluator,
            record=RunRecord(
                main, state, best, metrics, evaluator, stop, sinks, self.watchdog, background, profiler, wait
            ),
            state=state,
            best=best,
            stop=stop,
            console=self.console,
            watchdog=self.watchdog,
        )

    # ------------------------------------------------------------------------------------------ policy and reference
    def _policy(self, keeps_reference: bool) -> MegatronPolicy:
        config = self.config
        policy = MegatronPolicy(
            config.model,
            config.parallel,
            config.optimizer,
            config.reference if keeps_reference else None,
            self.hf,
            self.topology,
            config.rollout.temperature,
            config.megatron,
        )
        if policy.fused_kernels:
            self.say(policy.fused_kernels)
        return policy

    def _references(self, method: Method) -> ReferenceBuilder:
        config = self.config
        needed = method.needs_reference != "none" and not (self.evaluation_only and config.teachers)
        return ReferenceBuilder(
            config.reference,
            config.teachers,
            config.engine,
            self.hf,
            needed,
            self.is_main,
            self.data.domains,
            self.progress,
            self.stack,
        )

    # ------------------------------------------------------------------------------------------ drawing and grading
    def _workers(self, engines: EngineBuilder) -> WorkerPool | None:
        """Rollout workers, where the run has engines of its own. Collective."""
        if engines.replays:
            return None
        order, needed = None, self.given.engine is None
        # turns of an episode are judged together, and an audit reads texts, which stay with the workers
        if self.given.verifier is None and self.config.environment is None and self.config.verifier.audit is None:
            order = self.drawing.grading_order(self.model_files)
        return build_workers(self.config, self.topology, needed, order, self.folder.logs, self.say, self.stack)

    def _verifier(self) -> Verifier:
        return self.given.verifier or self.drawing.verifier()

    # ------------------------------------------------------------------------------------------ files
    def _carry(self, folder: Path) -> None:
        """hf/ beside state/: the folder is then a converted megatron folder."""
        (folder / HF_FILES).mkdir()
        carry_files(self.model_files, folder / HF_FILES)


def _say_nothing(text: str) -> None:
    """Ranks other than global rank 0."""
