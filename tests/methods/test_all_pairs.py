"""Every method of the catalogue differs from every other in its value or a gradient, on one shared random step.

The step: rewards in two parts, lengths, entropies, texts, an earlier step behind it; ratios on both sides of every cap.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from evaluated import Response, evaluate

from owpo_megatron.methods import Method, StepView, catalogue, make_method

# What makes a method another one's twin on this step is a setting: here it is off its default.
SETTINGS = {
    "drpo": {"max_length": 6},
    "clip_cov": {"share": 0.2, "low": 0.0},
    "kl_cov": {"share": 0.2},
    "lp_reg": {"share": 0.5},
}
GROUPS, SIBLINGS = 4, 4
COUNT = GROUPS * SIBLINGS
METHODS = {
    name: make_method(name, **SETTINGS.get(name, {})) for name, one in catalogue().items() if one.kind != "sampling"
}


def random_step(seed: int, memory: dict) -> StepView:
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randint(1, 6, (COUNT,), generator=generator)).tolist()
    right = torch.rand(COUNT, generator=generator) < 0.4
    right[:SIBLINGS], right[-SIBLINGS:] = torch.tensor([True, False, False, False]), torch.tensor([True] * SIBLINGS)
    lengths[:SIBLINGS] = [1, 5, 4, 5]  # a group whose right answer is the shortest
    right[SIBLINGS : 2 * SIBLINGS], lengths[SIBLINGS : SIBLINGS + 2] = torch.tensor([True, True, False, False]), [1, 5]
    style = torch.rand(COUNT, generator=generator)
    return StepView(
        reward_N=right.double().tolist(),
        counts_N=[True] * COUNT,
        group_N=[index // SIBLINGS for index in range(COUNT)],
        length_N=lengths,
        prompt_N=[f"p{index // SIBLINGS}" for index in range(COUNT)],
        right_N=right.tolist(),
        part_N={"verdict": right.double().tolist(), "style": style.tolist()},
        weights={"verdict": 1.0, "style": 0.5},
        behaviour_N=[[-1.0] * length for length in lengths],
        entropy_N=[
            torch.rand(length, generator=generator) + 2 * torch.rand(1, generator=generator) for length in lengths
        ],
        pieces_N=[[" wait", " so", " 7", ".", "!"][:length] for length in lengths],
        max_length=6,
        progress=0.5,
        memory=memory,
    )


def signature(method: Method) -> list[float]:
    """Value and gradients of a step after another one, every number divided as in the loss."""
    memory: dict = {}
    method.advantages(random_step(1, memory))
    step = random_step(2, memory)
    generator = torch.Generator().manual_seed(7)
    responses = []
    for index, advantage in enumerate(method.advantages(step)):
        length = step.length_N[index]
        old = -torch.rand(length, generator=generator).double() * 3 - 0.05
        now = (old + 0.9 * torch.randn(length, generator=generator).double()).clamp(max=-0.01)
        if index == 1:  # a wrong answer's token beyond every cap
            old[0], now[0] = -9.0, -9.0 + math.log(30)
        further = torch.rand(2, length, generator=generator).double()
        spread = advantage.tolist() if isinstance(advantage, torch.Tensor) else advantage
        responses.append(
            Response(
                now.tolist(),
                old.tolist(),
                spread,
                step.reward_N[index],
                step.group_N[index],
                step.entropy_N[index].tolist(),
                (now + 0.3 * torch.randn(length, generator=generator)).tolist(),
                statistic=(now + further[0]).tolist(),
                old_statistic=(old + further[1]).tolist(),
            )  # fmt: skip
        )
    found = evaluate(method, responses)
    count = {"tokens": sum(step.length_N), "samples": COUNT, "sample_sums": COUNT}[method.divisor]
    return [found.loss, *(one / count for gradient in found.gradients for one in gradient)]


@pytest.fixture(scope="module")
def signatures() -> dict[str, list[float]]:
    return {name: signature(method) for name, method in METHODS.items()}


def test_no_two_methods_are_the_same(signatures: dict[str, list[float]]) -> None:
    equal = [
        (one, other)
        for one, other in itertools.combinations(signatures, 2)
        if signatures[one] == pytest.approx(signatures[other], rel=1e-6, abs=1e-9)
    ]
    assert equal == []


def test_every_method_learns_from_the_step(signatures: dict[str, list[float]]) -> None:
    for name, numbers in signatures.items():
        assert all(math.isfinite(number) for number in numbers), name
        assert max(abs(number) for number in numbers[1:]) > 1e-5, name


def test_there_are_as_many_as_promised() -> None:
    assert len(METHODS) >= 45
