"""The body of a request to /generate: prompts, and for each sample its parameters and its seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from owpo_megatron.types import SampleRequest, Sampling


def generate_body(
    requests: Sequence[SampleRequest], sampling: Sampling, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Build the JSON of /generate: top-k off, log-probs of logits / temperature returned.

    Args:
        names: one for each sample, by which it can be cut; None: the server names them.
    """
    ids = [list(request.prompt.token_ids) for request in requests]
    parameters = [
        sampling_parameters(request.sampling or sampling) | {"sampling_seed": request.seed} for request in requests
    ]
    one = len(requests) == 1  # a router refuses a list of one
    body: dict[str, Any] = {
        "input_ids": ids[0] if one else ids,
        "sampling_params": parameters[0] if one else parameters,
        "return_logprob": True,
    }
    if any((request.sampling or sampling).experts for request in requests):
        body["return_routed_experts"] = True
    return body if names is None else body | {"rid": names[0] if one else list(names)}


def sampling_parameters(sampling: Sampling) -> dict[str, Any]:
    """The server's names for the parameters of a sample."""
    found: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
    }
    if sampling.stop_token_ids:
        found["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.stop:
        found |= {"stop": list(sampling.stop), "no_stop_trim": True}
    return found
