"""Trains three updates at each requested layout and prints how far it is from the dense oracle's file."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import torch
    from tiny import make_config, random_samples, report

    from owpo_megatron.algorithms import make_objective
    from owpo_megatron.convert import read_hf_config
    from owpo_megatron.parallel.topology import close_topology, init_topology
    from owpo_megatron.policy import MegatronPolicy

    model_dir, oracle_path, layouts = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    oracle = torch.load(oracle_path)
    for layout in layouts:
        tokens = layout.pop("tokens_per_microbatch", 24)
        config = make_config(model_dir, parallel=layout, optimizer={"tokens_per_microbatch": tokens})
        topology = init_topology(config.parallel, config.seed)
        policy = MegatronPolicy(config, read_hf_config(model_dir), model_dir, topology)
        logp = policy.logprobs(random_samples(0, logps=False))
        logp_error = max(float((a - b).abs().max()) for a, b in zip(logp, oracle["logp"], strict=True))
        losses, norms = [], []
        for update in range(3):
            sums = policy.update(random_samples(update), make_objective("owpo"))
            losses.append(sums["loss_sum"] / sums["loss_count"])
            norms.append(sums["grad_norm"])
        weights = dict(policy.named_weights())
        errors = {name: float((tensor - oracle["weights"][name]).abs().max()) for name, tensor in weights.items()}
        worst = max(errors, key=errors.get) if errors else None
        report(
            topology,
            layout=layout,
            logp=logp_error,
            loss=max(abs(a - b) for a, b in zip(losses, oracle["losses"], strict=True)),
            grad_norm=max(abs(a - b) for a, b in zip(norms, oracle["grad_norms"], strict=True)),
            weights=errors[worst] if worst else None,
            worst=worst,
            missing=sorted(set(oracle["weights"]) - set(weights) - {"lm_head.weight"}) if worst else None,
        )
    close_topology()


if __name__ == "__main__":
    main()
