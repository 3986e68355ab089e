"""Evaluation on held-out problems: k samples a problem, Pass@k by the unbiased estimator."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from owpo_megatron.config import EvalConfig
from owpo_megatron.trainer.rollouts import sample_seed
from owpo_megatron.types import Progress, Prompt, Rollout, RolloutEngine, SampleRequest, Sampling, Verdict


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv:2107.03374), Eq. 1.

    Example:
        >>> pass_at_k(samples=4, correct=1, k=2)  # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
        0.5
    """
    assert 0 < k <= samples and 0 <= correct <= samples
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


class Evaluator:
    """Draws and grades `samples` responses of every problem; keeps the per-problem results.

    The same problems with the same seeds each time, so that two evaluations differ by the policy only.
    """

    def __init__(
        self,
        config: EvalConfig,
        problems: Sequence[Prompt],
        max_tokens: int,
        stop_token_ids: tuple[int, ...],
        engine: RolloutEngine,
        grade: Callable[[Sequence[Rollout]], list[Verdict]],
        seed: int,
        out_dir: Path,
        progress: Progress | None = None,
    ):
        self._config = config
        self._problems = list(problems[: config.limit])
        self._sampling = Sampling(max_tokens, config.temperature, config.top_p, stop_token_ids)
        self._engine = engine
        self._grade = grade
        self._seed = seed
        self._out_dir = out_dir
        self._progress = progress

    def run(self, name: str) -> dict[str, Any]:
        """{"pass@1": ..., "problems": n, "samples": k, "response_length": mean}; details go to eval/NAME.jsonl."""
        count = self._config.samples
        requests = [
            SampleRequest(prompt, sample_seed(~self._seed, index, sibling))
            for index, prompt in enumerate(self._problems)
            for sibling in range(count)
        ]
        rollouts = self._engine.generate(requests, self._sampling, self._progress)
        verdicts = self._grade(rollouts)
        correct = [
            sum(verdict.correct for verdict in verdicts[start : start + count])
            for start in range(0, len(verdicts), count)
        ]
        self._keep(name, rollouts, verdicts)
        scores: dict[str, Any] = {
            f"pass@{k}": sum(pass_at_k(count, right, k) for right in correct) / len(correct)
            for k in self._config.pass_at
        }
        length = sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts)
        return scores | {"problems": len(correct), "samples": count, "response_length": length}

    def _keep(self, name: str, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> None:
        count = self._config.samples
        lines = []
        for index, prompt in enumerate(self._problems):
            mine = slice(index * count, (index + 1) * count)
            lines.append(
                {
                    "id": prompt.id,
                    "answer": prompt.answer,
                    "verdicts": [verdict.reason for verdict in verdicts[mine]],
                    "responses": [list(rollout.response_ids) for rollout in rollouts[mine]],
                }
            )
        self._out_dir.mkdir(parents=True, exist_ok=True)
        scratch = self._out_dir / f"{name}.tmp"
        scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(scratch, self._out_dir / f"{name}.jsonl")
