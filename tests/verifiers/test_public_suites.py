"""The public suites, hostile answers and reward hacks in tests/data/cases; whole data sets from OWPO_TEST_DATA.

Only the whole data sets are skipped where that folder is absent; small parts of them are in tests/data/cases.
"""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from pathlib import Path

import psutil
import pytest

from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers import VerifierPool
from owpo_megatron.verifiers.cases import read_cases, read_golds
from owpo_megatron.verifiers.rules import find_rule

DATA = Path(os.environ.get("OWPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
CASES = Path(__file__).parents[1] / "data" / "cases"
pytestmark = pytest.mark.process  # the pool
DEADLINE, MEMORY = 4.0, 2 * 2**30


def needed(name):
    if (CASES / name).is_file():
        return CASES / name
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is absent; set OWPO_TEST_DATA to the data folder")
    return DATA / name


@pytest.fixture(scope="module")
def pool():
    rules = {name: find_rule(name) for name in ("math", "math_any_symbols", "dapo", "dapo_strict_box")}
    pool = VerifierPool(rules, workers=2, timeout=DEADLINE, memory_bytes=MEMORY)
    yield pool
    pool.close()


def graded(pool, name, rule="math"):
    cases = read_cases(needed(name), rule)
    return list(zip(cases, pool.score([case.item for case in cases]), strict=True))


def is_right(case, verdict):
    return verdict.correct == case.expected


@pytest.mark.slow
def test_suites(pool):
    """Agreement of at least 99 % in all, and in no suite less than math-verify 0.9.0 alone."""
    pairs = [pair for pair in graded(pool, "verifier_cases.jsonl") if not pair[0].rule_specific]
    lines = needed("baseline_math_verify_0.9.0.jsonl").read_text().splitlines()
    alone = {line["id"]: line["verdict"] for line in map(json.loads, lines)}
    ours, baseline, total = Counter(), Counter(), Counter()
    for case, verdict in pairs:
        total[case.suite] += 1
        ours[case.suite] += is_right(case, verdict)
        baseline[case.suite] += alone[case.id] == case.expected
    assert sum(ours.values()) >= 0.99 * sum(total.values())
    assert {suite: ours[suite] for suite in total if ours[suite] < baseline[suite]} == {}


def test_dapo_rows_under_their_rule(pool):
    pairs = [pair for pair in graded(pool, "verifier_cases.jsonl", "dapo") if pair[0].suite.startswith("dapo/")]
    assert len(pairs) > 10 and [case.id for case, verdict in pairs if not is_right(case, verdict)] == []


def test_hostile_answers(pool):
    """Every fixed verdict right, every one in its time; the address space of a worker bounds its memory."""
    pairs = graded(pool, "adversarial.jsonl")
    assert [case.id for case, verdict in pairs if case.expected is not None and not is_right(case, verdict)] == []
    assert [case.id for case, verdict in pairs if verdict.seconds > case.limit_s] == []
    assert Counter(verdict.reason for _, verdict in pairs)["crashed"] == 0
    assert pool.score([GradingItem(r"\boxed{x+1}", "1+x", "math"), GradingItem(r"\boxed{x}", "y", "math")])[0].correct
    below = psutil.Process().children(recursive=True)
    assert [process.rlimit(resource.RLIMIT_AS) for process in below].count((MEMORY, MEMORY)) >= 2  # both workers


def test_reward_hacks(pool):
    pairs = [pair for pair in graded(pool, "reward_hack.jsonl") if pair[0].expected is not None]
    assert [case.id for case, verdict in pairs if verdict.correct and not case.expected] == []
    assert len([case.id for case, verdict in pairs if case.expected and not verdict.correct]) <= 1
    assert [case.id for case, verdict in pairs if case.suite.endswith("/control") and not is_right(case, verdict)] == []


def test_parts_of_data_sets_verify_against_themselves(pool):
    """AIME 2024, AMC 2023, and the gold answers of MATH and GSM8K in which they differ most."""
    cases = read_golds(CASES / "golds_of_sets.jsonl", "math")
    verdicts = pool.score([case.item for case in cases])
    assert len(cases) > 400
    assert [case.id for case, verdict in zip(cases, verdicts, strict=True) if not verdict.correct] == []


@pytest.mark.parametrize("name", ["aime24.jsonl", "amc23.jsonl", "gsm8k_train.jsonl", "math_train.jsonl"])
def test_gold_answers_verify_against_themselves(pool, name):
    cases = read_golds(needed(name), "math")
    verdicts = pool.score([case.item for case in cases])
    assert [case.id for case, verdict in zip(cases, verdicts, strict=True) if not verdict.correct] == []
