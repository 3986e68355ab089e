"""Builds what global rank 0 talks to the engines with: the engines themselves, the sync of weights, and its check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.engine import EngineTurns, Fleet, RecordedEngine, start_fleet
from owpo_megatron.engine.command import server_variables
from owpo_megatron.engine.warm import WarmEngine, take_warm_engine, warm_folder
from owpo_megatron.families import EngineLayout, HFModel, expert_shape
from owpo_megatron.policy import MegatronPolicy
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.sync import NodeOwners, Ranks, Senders, make_senders, make_sync, run_arguments
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.supply import ExclusiveSync
from owpo_megatron.trainer.sync_check import LogprobCheck, tolerance_of
from owpo_megatron.trainer.turns import SyncInTurn, Turns
from owpo_megatron.types import RolloutEngine, WeightSync


class EngineBuilder:
    """Starts the engines of a run while its model is built, on a GPU before it is, and brings them its weights.

    Args:
        model_files: HF folder of the model that the engines serve.
        evaluation_only: an engine is needed even where rollouts are replayed.
        say: called with a line for a person.
        stack: receives everything that must be closed.
    """

    def __init__(
        self,
        config: Config,
        hf: HFModel,
        model_files: Path,
        evaluation_only: bool,
        say: Callable[[str], None],
        stack: contextlib.ExitStack,
    ):
        self._config, self._hf, self._model_files = config, hf, model_files
        self._folder = RunFolder.of(config)
        self.replays = config.rollout.replay is not None and not evaluation_only
        self._say, self._stack = say, stack

    @property
    def take_memory(self) -> bool:
        """Whether engines are starting that may use the GPUs of the ranks."""
        engine = self._config.engine
        starting = engine.starts_servers or engine.rendezvous is not None
        elsewhere = self._config.launch.engine_nodes > 0 or engine.device == "cpu"
        return starting and not self.replays and not elsewhere

    def start(self, given: RolloutEngine | None) -> Future[RolloutEngine]:
        """The engines, on their way; a given one as it is, or recorded rollouts."""
        pool = ThreadPoolExecutor(1)
        self._stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # a mistake elsewhere need not wait for it
        if given is not None:
            return pool.submit(lambda: given)
        if self.replays:
            assert self._config.rollout.replay is not None
            return pool.submit(RecordedEngine, self._config.rollout.replay)
        if self._config.engine.rendezvous is not None:
            self._say("waiting for the engines")
        return pool.submit(self._start_fleet)

    def senders(self, ranks: Ranks, policy: MegatronPolicy) -> Senders | NodeOwners | None:
        """This rank's part where several ranks send the weights; None where rank 0 does. Collective."""
        senders = make_senders(self._config.sync, ranks, policy, EngineLayout.of(self._hf))
        if senders is not None:
            senders.notify = self._say
            self._stack.callback(senders.close)
        return senders

    def turns(self, policy: MegatronPolicy, barrier: Callable[[], None], fleet: Fleet | None) -> Turns | None:
        """`engine.in_turn`, on every rank; None where it is off or rollouts are replayed."""
        if not self._config.engine.in_turn or self.replays:
            return None
        turns = Turns(policy, barrier, EngineTurns(fleet) if fleet else None)
        if fleet:
            fleet.take_cache = turns.take_cache
        return turns

    def sync(
        self, fleet: Fleet | None, senders: Senders | NodeOwners | None = None, turns: Turns | None = None
    ) -> WeightSync:
        """The way of the weights to these engines; with none it still reads them."""
        clients = fleet.clients if fleet else []
        sync: WeightSync = make_sync(self._config.sync, clients, self._folder.sync, EngineLayout.of(self._hf), senders)
        if turns:
            sync = SyncInTurn(sync, turns)
        if fleet and self._config.rollout.max_staleness:
            fleet.weights_change = True
            sync = ExclusiveSync(sync, fleet.lock)
        self._stack.callback(sync.close)
        return sync

    def check(self, main: MainRank, policy: MegatronPolicy, fleet: Fleet | None) -> LogprobCheck | None:
        """`sync.verify: logprob`, on every rank; None where it is off or rollouts are replayed."""
        config = self._config
        if config.sync.verify != "logprob" or self.replays:
            return None
        tolerance = tolerance_of(config.sync, config.model.dtype)
        return LogprobCheck(tolerance, config.rollout.temperature, main, policy, fleet, self._hf.vocab_size)

    def _start_fleet(self) -> Fleet:
        config = self._config
        raw, own, dtype = run_arguments(config), server_variables(config), config.model.dtype
        warm = self._warm_engine(raw, own)
        if warm is not None:
            self._say(f"using the warm engine at {warm.client.url}; engine.warm=false starts one of the run's own")
            fleet = Fleet([warm], config.engine)
        else:
            if config.engine.starts_servers:
                self._say("starting the SGLang server")
            logs = self._folder.logs
            fleet = start_fleet(config.engine, self._model_files, dtype, raw, logs, variables=own, with_keys=True)
        fleet.notify = self._say
        fleet.own_weights()
        fleet.check_tokens(self._hf.vocab_size)
        if config.rollout.routing_replay:
            fleet.ask_for_experts(expert_shape(self._hf))
        self._stack.callback(fleet.close)
        if config.engine.in_turn:
            EngineTurns(fleet).free(weights=True)  # before the ranks build their model
        return fleet

    def _warm_engine(self, raw: Mapping[str, Any], variables: Mapping[str, str]) -> WarmEngine | None:
        config = self._config
        engine = config.engine
        if not (engine.warm and engine.starts_servers and engine.count == 1):
            return None
        folder = warm_folder(config.runs_dir, engine, self._model_files, config.model.dtype, raw, variables)
        return take_warm_engine(folder, engine)
