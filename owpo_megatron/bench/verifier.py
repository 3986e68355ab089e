"""owpo bench verifier: the maths verifier against math-verify called directly; and a fuzz run."""

from __future__ import annotations

import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers.pool import VerifierPool
from owpo_megatron.verifiers.rules import find_rule

Log = Callable[[str], None]
SIZES = {"short": 200, "8k": 8_000, "32k": 32_000}
COUNTS = {"short": 400, "8k": 120, "32k": 60}
WARM_UP = 80  # answers that each side grades before the measurement
HOSTILE_SHARE, HOSTILE_ANSWERS = 0.1, 1000


def measure(workers: Sequence[int], timeout: float, seed: int, log: Log) -> list[dict[str, Any]]:
    """Return one row per kind and length of answers, then one of a batch with adversarial answers among honest ones.

    Rates are items per second of wall-clock time. `direct` is math-verify's `parse` of both sides and `verify`, in this
    process, with its default settings; `pool_N` is this project's pool with N workers on the same items.
    """
    rows: list[dict[str, Any]] = []
    log("the parsers' caches, on both sides")
    draw = random.Random(f"{seed}/warm")
    warm_up = [_response(*_latex(draw), 200, draw) for _ in range(WARM_UP)]
    pools = {number: _warm_pool(number, timeout) for number in workers}
    _direct(warm_up)
    for number, pool in pools.items():
        pool.score(warm_up * number)
    for kind, make in {"integer": _integer, "latex": _latex}.items():
        for name, characters in SIZES.items():
            draw = random.Random(f"{seed}/{kind}/{name}")
            items = [_response(*make(draw), characters, draw) for _ in range(COUNTS[name])]
            log(f"{kind} answers, {name}: math-verify directly")
            row: dict[str, Any] = {"gold": kind, "length": name, "count": len(items)}
            row["direct_per_s"] = len(items) / _seconds(_direct, items)
            for number in workers:
                log(f"{kind} answers, {name}: {number} workers")
                row[f"pool_{number}_per_s"] = len(items) / _seconds(pools[number].score, items)
            row["times_direct"] = row[f"pool_{workers[-1]}_per_s"] / row["direct_per_s"]
            rows.append(row)
    for pool in pools.values():
        pool.close()
    rows.append(_with_hostile(max(workers), timeout, seed, log))
    return rows


def fuzz(count: int, workers: int, timeout: float, seed: int, log: Log) -> list[dict[str, Any]]:
    """Grade random unicode, LaTeX fragments and nested structures; return one row with the outcome."""
    draw = random.Random(seed)
    pool = _warm_pool(workers, timeout)
    reasons: Counter[str] = Counter()
    slowest = 0.0
    start = time.monotonic()
    for done in range(0, count, 500):
        log(f"fuzz: {done} of {count}")
        items = [_fuzzed(draw) for _ in range(min(500, count - done))]
        verdicts = pool.score(items)
        reasons.update(verdict.reason for verdict in verdicts)
        slowest = max(slowest, *(verdict.seconds for verdict in verdicts))
    seconds = time.monotonic() - start
    alive = [verdict.reason for verdict in pool.score([_control("42"), _control("41")])] == ["ok", "wrong"]
    pool.close()
    return [
        {"fuzzed": count, "workers": workers, "seconds": seconds, "slowest_s": slowest, "deadline_s": timeout}
        | {name: reasons[name] for name in sorted({*reasons, "timeout", "crashed"})}
        | {"pool_alive": alive, "peak_worker_mb": _peak_mb()}
    ]


def _with_hostile(workers: int, timeout: float, seed: int, log: Log) -> dict[str, Any]:
    draw = random.Random(f"{seed}/hostile")
    hostile = int(HOSTILE_ANSWERS * HOSTILE_SHARE)
    items = [_response(*draw.choice((_integer, _latex))(draw), 2_000, draw) for _ in range(HOSTILE_ANSWERS - hostile)]
    items += [GradingItem(f"The answer is \\boxed{{{_bomb(draw)}}}.", "42", "math") for _ in range(hostile)]
    draw.shuffle(items)
    log(f"{HOSTILE_ANSWERS} answers, {hostile} of them hostile: {workers} workers")
    pool = _warm_pool(workers, timeout)
    start = time.monotonic()
    verdicts = pool.score(items)
    seconds = time.monotonic() - start
    pool.close()
    reasons = Counter(verdict.reason for verdict in verdicts)
    return {
        "gold": "mixed", "length": "2k",
        "count": len(items), "hostile": hostile, "workers": workers, "seconds": seconds,
        "slowest_s": max(verdict.seconds for verdict in verdicts), "timeouts": reasons["timeout"],
        "crashed": reasons["crashed"], "peak_worker_mb": _peak_mb(),
    }  # fmt: skip


def _warm_pool(workers: int, timeout: float) -> VerifierPool:
    pool = VerifierPool({"math": find_rule("math")}, workers, timeout)
    pool.score([GradingItem(r"\boxed{\frac{1}{2}}", f"0.{digit}", "math") for digit in range(1, 1 + 4 * workers)])
    return pool


def _seconds(work: Callable[[Sequence[GradingItem]], object], items: Sequence[GradingItem]) -> float:
    start = time.perf_counter()
    work(items)
    return time.perf_counter() - start


def _direct(items: Sequence[GradingItem]) -> int:
    from math_verify import parse, verify

    return sum(verify(parse(f"\\boxed{{{item.answer}}}"), parse(item.response)) for item in items)


def _peak_mb() -> float:
    """Return the largest resident size of any worker that has exited (Linux counts in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1)


# ------------------------------------------------------------------------------------------------ generated answers
def _integer(draw: random.Random) -> tuple[str, str]:
    gold = draw.randrange(-500, 100_000)
    return str(gold), str(gold if draw.random() < 0.5 else gold + draw.randrange(1, 50))


def _latex(draw: random.Random) -> tuple[str, str]:
    a, b, c = (draw.randrange(2, 60) for _ in range(3))
    gold, equal = draw.choice([
        (f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a * c}}}{{{b * c}}}"),
        (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}"),
        (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})"),
        (f"\\left({a},\\frac{{{b}}}{{2}}\\right)", f"({a}, {b / 2})"),
        (f"[{a},{a + b}]", f"\\left[{a}, {a + b}\\right]"),
        (f"\\frac{{{a}\\pi}}{{{b}}}", f"\\frac{{{a * c}}}{{{b * c}}}\\pi"),
    ])  # fmt: skip
    return gold, equal if draw.random() < 0.5 else equal.replace(str(a), str(a + 1))


def _response(gold: str, answer: str, characters: int, draw: random.Random) -> GradingItem:
    steps: list[str] = []
    length = 0
    while length < characters - 60:
        a, b = draw.randrange(2, 999), draw.randrange(2, 999)
        steps.append(f"Step {len(steps) + 1}: since ${a} + {b} = {a + b}$, the remainder is {a % b} and we go on.\n")
        length += len(steps[-1])
    return GradingItem("".join(steps) + f"Therefore the answer is $\\boxed{{{answer}}}$.", gold, "math")


def _bomb(draw: random.Random) -> str:
    big = draw.randrange(7, 10)
    many = draw.randrange(200, 20_000)
    return draw.choice([
        f"{big}^{{{big}^{{{big}^{{{big}}}}}}}", f"2^{{10^{{{big}}}}}", f"{many}{many}!", f"(({many}!)!)!",
        f"\\sum_{{k=1}}^{{10^{{{big}}}}} k^{big}", f"\\prod_{{k=1}}^{{{many}00}} (1+\\frac{{1}}{{k^2}})",
        "\\int_0^{\\infty} \\frac{\\sin(x)^{" + str(big) + "}\\ln(x)}{x^3+e^{x}} dx", f"(x+y+z+w+v)^{{{many}}}",
        "\\sqrt{1+" * many + "1" + "}" * many, "(" * many + "42" + ")" * many, "1+" * many + "1",
        f"\\Gamma(10^{{{big}}})", "\\sin(x+1)^{40}-\\cos(x-1)^{40}", f"x^{{{many}}}-1=0", f"0.{'9' * many}",
        "\\sqrt[3]{10^{" + str(many) + "00}+1}", "\\frac{1}{1+" * 300 + "2" + "}" * 300,
    ])  # fmt: skip


def _control(answer: str) -> GradingItem:
    return GradingItem(f"\\boxed{{{answer}}}", "42", "math")


_FRAGMENTS = (
    r"\boxed{", r"\boxed", "}", "{", r"\frac", r"\frac{1}{", r"\sqrt[", "]", r"\left(", r"\right)", "^{", "_", "^", "!",
    r"\sum_{i=1}^{n}", r"\int_0^1", r"\lim_{x\to 0}", r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", r"\text{", "$",
    "$$", r"\(", r"\)", r"\[", r"\]", "Answer:", "answer is", "The final answer is ", "I hope it is correct.", "\n",
    " ",
    "=", "<", r"\le", r"\cup", r"\infty", r"\pi", "i", "e", "x", "y", "f(x)", "0", "1", "7", "42", "-", "+", "/",
    "*", ",",
    ";", ".", ":", "%", r"\%", r"\log_2", r"\sin", "(", ")", "[", "|", r"\{", r"\}", "<think>", "</think>", r"\pm",
    "10^9",
    r"\binom{9}{", r"\pmod{", "and", "or", "#", "####", "\x00", "\u202e", "\u200b", "²", "４", "π", "答案", "\ud800",
    "1e9",
)  # fmt: skip


_NESTS = (
    (r"\frac{", "}{2}"),
    (r"\sqrt{", "}"),
    ("(", ")"),
    (r"\left[", r"\right]"),
    ("{", "}"),
    ("x^{", "}"),
    ("-", ""),
)


def _fuzzed(draw: random.Random) -> GradingItem:
    shape = draw.randrange(4)
    if shape == 0:
        planes = (0x80, 0x3000, 0x10FFFF)
        text = "".join(chr(draw.randrange(draw.choice(planes))) for _ in range(draw.randrange(200)))
    elif shape == 1:
        text = "".join(draw.choice(_FRAGMENTS) for _ in range(draw.randrange(1, 60)))
    elif shape == 2:
        opening, closing = draw.choice(_NESTS)
        depth = draw.choice((2, 5, 20, 300, 5000))
        text = opening * depth + draw.choice(("42", "x", "")) + closing * draw.choice((depth, depth - 1, 0))
    else:
        text = draw.choice((_latex, _integer))(draw)[1]
        place = draw.randrange(len(text) + 1)
        text = text[:place] + draw.choice(_FRAGMENTS) + text[place + draw.randrange(3) :]
    if draw.random() < 0.7:
        text = draw.choice((f"so \\boxed{{{text}}}", f"Answer: {text}", f"The answer is ${text}$."))
    return GradingItem(text, draw.choice(("42", r"\frac{1}{2}", "x+1", "(1,2)", text[:80])), "math")
