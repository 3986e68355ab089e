"""The composition root: the only place that knows every room. Builds a run's parts and gives them to the loop."""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from owpo_megatron.config import HF_FILES, Config, hf_folder
from owpo_megatron.conversion import HFWriter, carry_files
from owpo_megatron.data import load_prompts, load_tokenizer, make_stream, notes_on
from owpo_megatron.engine import Fleet, RecordedEngine, rollouts_path, save_rollouts, start_fleet
from owpo_megatron.engine.command import server_raw
from owpo_megatron.engine.context import check_context_length
from owpo_megatron.evaluation.draw import Answering
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.families import EngineLayout, check_context, check_parallel, hf_shapes, read_hf_config
from owpo_megatron.mcore.topology import close_topology, init_topology
from owpo_megatron.methods import make_method
from owpo_megatron.policy import MegatronPolicy, SlotReference
from owpo_megatron.run.best import BestWeights
from owpo_megatron.run.checkpoints import CheckpointFolder, began_on
from owpo_megatron.run.metrics import MetricsFile, silent_step
from owpo_megatron.run.state import RunState
from owpo_megatron.run.summary import write_summary
from owpo_megatron.sync import fp8_engine_arguments, make_sync
from owpo_megatron.trainer.batches import BatchBuilder
from owpo_megatron.trainer.build_reference import ReferenceBuilder
from owpo_megatron.trainer.console import RunConsole, headline
from owpo_megatron.trainer.evaluate import Evaluator, prepare_sets
from owpo_megatron.trainer.loop import Loop
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.rollouts import RolloutCollector
from owpo_megatron.trainer.stage import StagePlan, due_every
from owpo_megatron.trainer.stop import StopSignal
from owpo_megatron.trainer.sync_check import LogprobCheck
from owpo_megatron.types import Prompt, Rollout, Verifier, WeightSync
from owpo_megatron.verifiers import make_verifier, refuse_failed_grading


def train_run(config: Config, stop_file: Path | None = None) -> None:
    """Train (or go on training) the run that the configuration describes, until its end or until `stop_file` exists."""
    with contextlib.ExitStack() as stack:
        run = Run(config, stack)
        stop = StopSignal(run.topology.any, stop_file if run.topology.is_main else None)
        loop = run.loop(stop)
        with run.console.live() if run.console else contextlib.nullcontext():
            steps = loop.run()
        if steps == config.optimizer.steps:
            run.finish()


def evaluate_run(config: Config, checkpoint: Path | None = None) -> None:
    """Evaluate a checkpoint (default: the run's newest, else the model); scores go to eval/ and the screen."""
    with contextlib.ExitStack() as stack:
        run = Run(config, stack, evaluation_only=True, checkpoint=checkpoint)
        step = run.state.restore(checkpoint, to_evaluate=True)
        run.main.push(step)
        scores = run.main.run(lambda: run.scores(f"step_{step:06d}_eval"))
        if run.console:
            run.console.evaluation(step, scores)
            run.console.say(f"scores with intervals, and responses: {config.run_dir / 'eval'}")


class Run:
    """The parts of a run on this rank. Engine, verifier and files are global rank 0's alone.

    Args:
        stack: what has to be closed is entered here.
        checkpoint: what is evaluated; None: the newest one.
        evaluation_only: an engine is needed even where rollouts are replayed, and nothing is written but eval/.
    """

    def __init__(
        self,
        config: Config,
        stack: contextlib.ExitStack,
        evaluation_only: bool = False,
        checkpoint: Path | None = None,
    ):
        self.config = config
        self.evaluation_only = evaluation_only
        self.model_files = hf_folder(config.model.path)
        hf = read_hf_config(self.model_files)
        check_parallel(hf, config.parallel)
        check_context(hf, config.data.max_prompt_tokens + config.rollout.max_response_tokens)
        self.topology = topology = init_topology(config.parallel, config.seed)
        stack.callback(close_topology)
        self.console = RunConsole(config.optimizer.steps) if topology.is_main else None
        self.tokenizer = load_tokenizer(self.model_files) if topology.is_main else None
        self.date = config.data.date or self._began_on(checkpoint) or datetime.date.today()
        self.train_prompts, self.eval_sets = self._prompts() if topology.is_main else ([], [])
        self.objective = make_method(config.algorithm)
        needs_reference = self.objective.needs_reference != "none" and not (evaluation_only and config.teachers)
        domains = {prompt.domain for prompt in self.train_prompts}
        progress = self.console.working if self.console else None
        references = ReferenceBuilder(config, hf, needs_reference, topology.is_main, domains, progress, stack)
        engine_start = self._start_engine(stack)
        self.say(headline(config, sum(math.prod(shape) for shape in hf_shapes(hf).values())))
        self.plan = StagePlan.of(config, references.keeps_reference)
        self.policy = MegatronPolicy(config, hf, config.model.path, topology, references.keeps_reference)
        self.engine: Fleet | RecordedEngine | None = engine_start.result() if engine_start else None
        self.fleet = self.engine if isinstance(self.engine, Fleet) else None
        revive = self.fleet.revive if self.fleet else _nothing_to_revive
        self.main = MainRank(
            topology.broadcast, self.policy.named_weights, self._sync(stack, EngineLayout.of(hf)), revive
        )
        wants_check = config.sync.verify == "logprob" and (evaluation_only or not config.rollout.replay)
        self.sync_check = (
            LogprobCheck(config, self.main, self.policy, self.fleet, hf.vocab_size) if wants_check else None
        )
        self.reference = references.build(self.policy, self.main)
        self.verifier = self._verifier(stack)
        self.collector = self._collector()
        self.evaluator = self._evaluator()
        self.metrics = MetricsFile(config.run_dir / "metrics.jsonl", self._on_line) if topology.is_main else None
        candidate = self.reference if self.plan.chooses_best and isinstance(self.reference, SlotReference) else None
        checkpoints = CheckpointFolder(config.run_dir / "checkpoints", config.checkpoint.keep)
        self.best = BestWeights(
            config.run_dir,
            topology,
            self.policy.save_weights,
            self._carry,
            checkpoints,
            of_run=config.checkpoint.keep_best,
            stage=candidate,
        )
        self.state = RunState(
            topology,
            self.policy,
            self.reference,
            self.collector,
            self.best,
            self.metrics,
            checkpoints,
            self._carry,
            self.say,
        )

    def loop(self, stop: StopSignal) -> Loop:
        config = self.config
        steps = config.optimizer.steps
        return Loop(
            steps=steps,
            policy=self.policy,
            reference=self.reference,
            objective=self.objective,
            rollouts=self.collector,
            batches=BatchBuilder(config, self.plan),
            push_weights=self.push_weights,
            swap_due=self.plan.swap_due,
            restarts_policy=config.reference.restart_policy and self.plan.chooses_best,
            evaluate_due=self._evaluation_due,
            checkpoint_due=lambda done: due_every(config.checkpoint.every, done, at_end=True, steps=steps),
            evaluate=self.evaluate,
            save=self.state.save,
            restore=self.state.restore,
            step_log=self.metrics.step if self.metrics else silent_step,
            stop_requested=stop.requested,
        )

    # ------------------------------------------------------------------------------------------ verbs of the loop
    def push_weights(self, step: int) -> None:
        """Every engine gets the policy's weights as version `step`, and shows it where `sync.verify` says logprob."""
        self.main.push(step)
        if self.sync_check is not None:
            self.sync_check()

    def evaluate(self, step: int) -> None:
        """Once a step: an evaluation that stands in metrics.jsonl is not made again after a resume."""

        def work() -> dict[str, Any]:
            assert self.metrics and self.console
            scores = self.metrics.evaluation(step)
            if scores is None:
                scores = self.scores(f"step_{step:06d}")
                self.metrics.append({"step": step, "eval": scores})
                self.console.evaluation(step, scores)
            return scores

        self.best.consider(step, self.main.run(work))

    def scores(self, name: str) -> dict[str, Any]:
        """Evaluate the weights that the engine has, on rank 0."""
        assert self.evaluator
        return self.evaluator.run(name)

    def finish(self) -> None:
        """After the last step: the HF folder and the summary."""
        config = self.config
        if config.checkpoint.export_hf:
            self._export(config.run_dir / "hf")
        swaps = self.reference.version.ref_id
        if self.console:
            engine = {"name": "sglang", "version": self.fleet.clients[0].server_version()} if self.fleet else {}
            write_summary(config, engine, self.reference.version, swaps, self.best.run)
            self.console.say(f"done: {config.run_dir} ({swaps} swaps of the reference)")

    def say(self, text: str) -> None:
        if self.console:
            self.console.say(text)

    # ------------------------------------------------------------------------------------------ building
    def _prompts(self) -> tuple[list[Prompt], list[PreparedSet]]:
        assert self.tokenizer
        train, report = load_prompts(self.config.data, self.tokenizer, date=self.date)
        self.say(str(report))
        for note in notes_on(train, self.config):
            self.say(note)
        sets = []
        if self._evaluation_wanted() or self.evaluation_only:
            sets = prepare_sets(self.config, self.tokenizer, self.date, self.say)
        if self.config.rollout.replay is None:
            asked = [*train, *(prompt for one in sets for prompt in one.prompts)]
            check_context_length(self.config, max(len(prompt.token_ids) for prompt in asked))
        return train, sets

    def _began_on(self, checkpoint: Path | None) -> datetime.date | None:
        """The day that the run's checkpoints keep: a template that prints the date prints the same after midnight."""
        if checkpoint is not None:
            return began_on(checkpoint)
        return CheckpointFolder(self.config.run_dir / "checkpoints", self.config.checkpoint.keep).began_on()

    def _start_engine(self, stack: contextlib.ExitStack) -> Future | None:
        """Global rank 0's engine, started while all ranks build the model."""
        if not self.topology.is_main:
            return None
        pool = ThreadPoolExecutor(1)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # a mistake elsewhere need not wait for it
        if self.config.rollout.replay and not self.evaluation_only:
            return pool.submit(RecordedEngine, self.config.rollout.replay)
        if self.config.engine.rendezvous is not None:
            self.say("waiting for the engines; meanwhile the model is built")
        elif not self.config.engine.urls:
            self.say("starting the SGLang server; meanwhile the model is built")
        return pool.submit(self._start_fleet, stack)

    def _start_fleet(self, stack: contextlib.ExitStack) -> Fleet:
        # Every weight comes by the first push; SGLang need not read the checkpoint.
        raw = {"load_format": "dummy"} | server_raw(self.config)
        if self.config.sync.fp8:
            raw |= fp8_engine_arguments(raw)
        fleet = start_fleet(
            self.config.engine, self.model_files, self.config.model.dtype, raw, self.config.run_dir / "logs"
        )
        stack.callback(fleet.close)
        return fleet

    def _sync(self, stack: contextlib.ExitStack, layout: EngineLayout) -> WeightSync | None:
        if not self.topology.is_main:
            return None
        clients = self.fleet.clients if self.fleet else []
        sync = make_sync(self.config.sync, clients, self.config.run_dir / "sync", layout)
        stack.callback(sync.close)
        return sync

    def _verifier(self, stack: contextlib.ExitStack) -> Verifier | None:
        if not self.topology.is_main:
            return None
        rules = {domain: rule for one in self.eval_sets for domain, rule in one.rules.items()}
        verifier = make_verifier(self.config.verifier, {prompt.domain for prompt in self.train_prompts}, rules)
        stack.callback(verifier.close)
        return verifier

    def _collector(self) -> RolloutCollector:
        config, stream = self.config, None
        if self.topology.is_main:
            stream = make_stream(config.data, self.train_prompts, config.seed)
            if self.fleet:
                self.fleet.on_restart = self.main.push_again
        return RolloutCollector(
            config,
            self.main,
            self.engine,
            self.verifier,
            stream,
            decode=self.tokenizer.decode if self.tokenizer else _nothing_to_decode,
            stop_token_ids=self.tokenizer.eos_ids if self.tokenizer else (),
            dynamic_sampling=self.objective.dynamic_sampling,
            record=self._record,
            progress=self.console.working if self.console else None,
            date=self.date,
            check_verdicts=partial(refuse_failed_grading, rule=config.verifier.rule),
        )

    def _evaluator(self) -> Evaluator | None:
        if not self.eval_sets:
            return None
        assert self.tokenizer and self.engine and self.verifier and self.console
        limit, seed = self.config.rollout.max_response_tokens, self.config.seed
        eos_ids = self.tokenizer.eos_ids
        stop = tuple(self.config.rollout.stop)
        answering = Answering(self.engine, self.verifier, self.tokenizer.decode, eos_ids, limit, seed, stop)
        return Evaluator(self.eval_sets, answering, self.config.run_dir / "eval", self.console.working)

    def _evaluation_wanted(self) -> bool:
        wants = self.config.eval
        return wants.before or wants.after or wants.every > 0

    def _evaluation_due(self, done: int) -> bool:
        wants = self.config.eval
        if done == 0:
            return wants.before
        if self.plan.chooses_best and self.plan.swap_due(done):
            return True
        return due_every(wants.every, done, at_end=wants.after, steps=self.config.optimizer.steps)

    def _carry(self, folder: Path) -> None:
        """hf/ beside state/: the folder is then a converted megatron folder."""
        (folder / HF_FILES).mkdir()
        carry_files(self.model_files, folder / HF_FILES)

    def _record(self, step: int, rollouts: Sequence[Rollout]) -> None:
        if self.config.rollout.save and not self.config.rollout.replay:
            save_rollouts(rollouts_path(self.config.run_dir / "rollouts", step + 1), rollouts)

    def _on_line(self, line: dict[str, Any]) -> None:
        assert self.console
        self.console.step(line)

    def _export(self, folder: Path) -> None:
        if self.topology.is_main:
            with HFWriter(folder, self.model_files, self.policy.hf, overwrite=True) as writer:
                for name, tensor in self.policy.named_weights():
                    writer.add(name, tensor)
        else:
            for _ in self.policy.named_weights():
                pass


def _nothing_to_revive(error: Exception) -> int:
    return 0


def _nothing_to_decode(ids: Sequence[int]) -> str:
    raise AssertionError("only global rank 0 decodes responses")
