"""Our loss on the other side's tokens: `python -m owpo_megatron.bench.step_loss CONFIG SAMPLES RESULT`, one rank.

SAMPLES is a JSON file with prompt_ids, completion_ids and advantages per sample; RESULT gets loss and grad_norm of the
first update.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from owpo_megatron.config import Config


def main(config_file: Path, samples_file: Path, result_file: Path) -> None:
    from owpo_megatron.families import read_hf_config
    from owpo_megatron.mcore.topology import close_topology, init_topology
    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import MegatronPolicy, SlotReference
    from owpo_megatron.types import Sample

    config = Config.load(config_file)
    given = json.loads(samples_file.read_text())
    samples = [
        Sample(tuple(prompt), tuple(response), advantage, active=True, behaviour_logp=(0.0,) * len(response))
        for prompt, response, advantage in zip(
            given["prompt_ids"], given["completion_ids"], given["advantages"], strict=True
        )
    ]
    topology = init_topology(config.parallel, config.seed)
    try:
        hf = read_hf_config(config.model.path)
        policy = MegatronPolicy(
            config.model, config.parallel, config.optimizer, config.reference, hf, topology, config.rollout.temperature
        )
        logps = SlotReference(policy, loaded=True).logprobs(samples)
        samples = [replace(sample, ref_logp=logp) for sample, logp in zip(samples, logps, strict=True)]
        sums = policy.update(samples, make_method(config.algorithm))
    finally:
        close_topology()
    found = {"loss": sums["loss_sum"] / sums["loss_count"], "grad_norm": sums["grad_norm"]}
    result_file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
