"""`sync.verify: logprob`: engines draw short samples after an update, and the trainer computes their log-probs again.

What differs by more than the arithmetic of two programs is a weight that did not arrive, or arrived wrongly.
"""

from __future__ import annotations

import random

from owpo_megatron.config import SyncConfig
from owpo_megatron.engine import Fleet
from owpo_megatron.errors import EngineError
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.types import Policy, Prompt, Rollout, Sample, SampleRequest, Sampling

PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 4, 8, 16
_FP8_TOLERANCE = 0.2
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


def tolerance_of(config: SyncConfig, dtype: str) -> float:
    """The mean |difference| that is allowed: `sync.tolerance`, or what the arithmetic of the two programs leaves."""
    return config.tolerance or (_FP8_TOLERANCE if config.fp8 else _TOLERANCE[dtype])


class LogprobCheck:
    """Call it after a push; collective over all trainer ranks.

    Args:
        tolerance: largest mean |difference|.
        temperature: sampling temperature of the rollouts.
        fleet: the engines, on global rank 0; None elsewhere.
        vocab_size: vocabulary size of the model; the prompts are random tokens, always the same.
    """

    def __init__(
        self,
        tolerance: float,
        temperature: float,
        main: MainRank,
        policy: Policy,
        fleet: Fleet | None,
        vocab_size: int,
    ):
        self.tolerance = tolerance
        self._main, self._policy, self._fleet = main, policy, fleet
        self._sampling = Sampling(RESPONSE_TOKENS, temperature)
        draw = random.Random(0)
        ids = [tuple(draw.randrange(vocab_size) for _ in range(PROMPT_TOKENS)) for _ in range(PROMPTS)]
        self._requests = [
            SampleRequest(Prompt(f"sync/{index}", prompt, "", ""), seed=index) for index, prompt in enumerate(ids)
        ]

    def __call__(self) -> list[float]:
        """Mean |log-prob of the trainer - log-prob of the engine| over the tokens of each engine's samples.

        Raises:
            EngineError: an engine differs by more than the tolerance.
        """
        drawn: list[tuple[str, list[Rollout]]] = self._main.run(self._draw)
        samples = [_sample(rollout) for _, rollouts in drawn for rollout in rollouts]
        logps = iter(self._policy.logprobs(samples))
        differences = []
        for url, rollouts in drawn:
            gaps = [
                abs(trainer - engine)
                for rollout in rollouts
                for trainer, engine in zip(next(logps).tolist(), rollout.behaviour_logp, strict=True)
            ]
            differences.append(sum(gaps) / len(gaps))
            if not differences[-1] <= self.tolerance:  # a NaN is no agreement
                raise EngineError(
                    f"after a push the log-probs of engine {url} are {differences[-1]:.2g} from the trainer's, over "
                    f"{self.tolerance:g} (sync.tolerance): its weights are not the policy's; look with "
                    "sync.verify=hash, or try another sync.transport"
                )
        return differences

    def push(self, version: int) -> None:
        """Implements Engines: bring the policy's weights to the engines, and check them there."""
        self._main.push(version)
        self()

    def _draw(self) -> list[tuple[str, list[Rollout]]]:
        fleet = self._fleet
        assert fleet is not None
        fleet.take_cache()
        return fleet.with_revival(
            lambda: [(client.url, client.generate(self._requests, self._sampling)) for client in fleet.clients]
        )


def _sample(rollout: Rollout) -> Sample:
    return Sample(rollout.prompt.token_ids, rollout.response_ids, 0.0, False, rollout.behaviour_logp)
