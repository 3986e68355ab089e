"""The guard at the start of a run: every method keeps to its coupling, and one that does not is refused by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from coupled_methods import COUPLED, Deceived, RightAgainstWrong, SequenceRatio, UncertainTokens

from owpo_megatron.errors import UserError
from owpo_megatron.methods import Dapo, Method, Terms, catalogue, check_coupling


@pytest.mark.parametrize("name", list(catalogue()))
def test_every_method_of_the_catalogue_keeps_to_its_coupling(name: str) -> None:
    check_coupling(catalogue()[name]())


@pytest.mark.parametrize("method", COUPLED, ids=lambda method: method.name)
def test_coupled_methods_that_say_so_pass(method: Method) -> None:
    check_coupling(method)


def test_it_takes_milliseconds() -> None:
    check_coupling(Dapo())
    started = time.process_time()
    check_coupling(Dapo())
    assert time.process_time() - started < 0.5, "CPU seconds"


def broken(terms: Callable[..., Terms]) -> Method:
    @dataclass(frozen=True)
    class Broken(Method):
        name = "broken"
        summary = "Broken on purpose."

    Broken.terms = terms  # type: ignore[method-assign]
    return Broken()


@pytest.mark.parametrize(
    "value",
    [
        lambda logp, batch: batch.advantage_C * (logp - logp.mean()),
        lambda logp, batch: batch.advantage_C * logp / batch.advantage_C.abs().sum(),
        lambda logp, batch: logp.cumsum(0),
        lambda logp, batch: logp * (logp.detach() >= logp.detach().median()),
        lambda logp, batch: logp.detach() + (logp - logp.detach()).sum(),  # the value is right, the gradient is not
    ],
    ids=["mean", "sum of advantages", "cumsum", "median", "gradient alone"],
)
def test_terms_that_reduce_over_rows_are_refused(value: Callable[..., torch.Tensor]) -> None:
    method = broken(lambda self, logp_C, batch: Terms(value(logp_C, batch)))
    with pytest.raises(UserError, match=r"method = broken: the (value|gradient) of a token depends on .*prepare\(\)"):
        check_coupling(method)


def test_the_deceived_one_is_named() -> None:
    with pytest.raises(UserError, match="method = deceived: the value of a token depends on which other tokens"):
        check_coupling(Deceived())


def test_metrics_are_looked_at_too_and_shapes() -> None:
    coupled = broken(lambda self, logp_C, batch: Terms(logp_C, {"share": logp_C / logp_C.sum()}))
    with pytest.raises(UserError, match="the metric share of a token depends on"):
        check_coupling(coupled)
    summed = broken(lambda self, logp_C, batch: Terms(logp_C, {"total": logp_C.detach().sum()}))
    with pytest.raises(UserError, match=r"a metric total of shape \(\) for 18 rows|of shape \(\) for 17 rows"):
        check_coupling(summed)
    reserved = broken(lambda self, logp_C, batch: Terms(logp_C, {"entropy": logp_C.detach()}))
    with pytest.raises(UserError, match="method = broken: rename the metric entropy: the trainer uses this name"):
        check_coupling(reserved)
    with pytest.raises(UserError, match=r"a value of shape \(\)"):
        check_coupling(broken(lambda self, logp_C, batch: Terms(logp_C.sum())))


def test_prepare_may_not_couple_more_than_is_declared() -> None:
    @dataclass(frozen=True)
    class WholeMinibatch(SequenceRatio):
        name = "whole_minibatch"

        def prepare(self, samples):
            drift = torch.stack([(one.now_logp_L - one.old_logp_L).mean() for one in samples]).mean()
            return [{"drift": drift, "now": one.now_logp_L} for one in samples]

    with pytest.raises(UserError, match=r"prepare\(\) couples more than one sample; declare `coupling` group or mini"):
        check_coupling(WholeMinibatch())

    @dataclass(frozen=True)
    class AllGroups(RightAgainstWrong):
        name = "all_groups"

        def prepare(self, samples):
            return [{"slope": 1.0, "share": float(len(samples))} for _ in samples]

    with pytest.raises(UserError, match=r"prepare\(\) couples more than one group; declare `coupling` minibatch"):
        check_coupling(AllGroups())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda samples: [{"kept": 1.0}], "returned 1 mappings for 6 samples"),
        (lambda samples: [{f"kept{i}": 1.0} for i in range(len(samples))], "the same names for every sample"),
        (lambda samples: [{} for _ in samples], "at least one"),
        (lambda samples: [{"kept": torch.ones(7)} for _ in samples], r"kept is \(7,\); give a number, or one per tok"),
    ],
)
def test_what_prepare_returns_is_looked_at(answer: Callable[..., list], message: str) -> None:
    @dataclass(frozen=True)
    class Odd(UncertainTokens):
        name = "odd"

        def prepare(self, samples):
            return answer(samples)

    with pytest.raises(TypeError, match=message):
        check_coupling(Odd())
