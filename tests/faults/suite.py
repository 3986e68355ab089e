"""Faults drawn at random, one after the other: what `make faults` runs.

    python tests/faults/suite.py --count 200 --seed 1            # kinds drawn uniformly; the seed is printed
    python tests/faults/suite.py --kind "a signal to stop"       # one kind, every way in which it can be injected
    python tests/faults/suite.py --each                          # every kind once, every way
    python tests/faults/suite.py --count 200 --seed 1 --results FILE --minutes 8   # a part; again: the next one

At least a fifth of the faults go through the `owpo` command. The exit code is 0 only where no fault had an effect that
it must not have: a wrong result, a hang, a lost checkpoint, a traceback shown to a user.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from ended import Broken  # noqa: E402
from rank_pool import Ranks  # noqa: E402
from registry import By, Kind, kinds  # noqa: E402
from trial import Ground, Trial  # noqa: E402

BY_COMMAND = 5  # one of so many faults, at least
OUTCOMES = ("right", "wrong result", "hang", "lost checkpoint", "traceback")


@dataclass(frozen=True)
class Draw:
    """A fault to inject."""

    kind: Kind
    by: By
    seed: int


@dataclass(frozen=True)
class Result:
    """The effect of one fault."""

    kind: str
    promise: str
    by: By
    seed: int
    outcome: str
    seconds: float
    told: str = ""


def draws(count: int, seed: int, known: Sequence[Kind]) -> list[Draw]:
    """Kinds drawn uniformly, each with a way and a seed of its own; a fifth or more by command."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        kind = rng.choice(known)
        cheap = [by for by in kind.by if by != "command"]  # a command takes ten times as long
        found.append(Draw(kind, rng.choice(cheap or kind.by), rng.randrange(2**31)))
    missing = -(-count // BY_COMMAND) - sum(draw.by == "command" for draw in found)
    able = [index for index, draw in enumerate(found) if draw.by != "command" and "command" in draw.kind.by]
    for index in sorted(
        rng.sample(able, max(0, min(missing, len(able))))
    ):  # all over the row: a part of it is one, too
        found[index] = Draw(found[index].kind, "command", found[index].seed)
        missing -= 1
    while missing > 0:  # too few of the kinds drawn have a command: others take their place
        kind = rng.choice([kind for kind in known if "command" in kind.by])
        index = next(place for place, draw in enumerate(found) if draw.by != "command")
        found[index] = Draw(kind, "command", rng.randrange(2**31))
        missing -= 1
    return found


def inject(draw: Draw, ground: Ground, folder: Path) -> Result:
    """One fault in a folder of its own, which is removed where nothing broke."""
    began = time.monotonic()
    outcome, told = "right", ""
    try:
        draw.kind.inject(Trial(ground, folder, random.Random(draw.seed), draw.by))
    except Broken as broken:
        outcome, told = broken.outcome, f"{broken}\n(files: {folder})"
    except Exception:
        outcome, told = "wrong result", f"the suite itself failed:\n{traceback.format_exc()}(files: {folder})"
    if outcome == "right":
        shutil.rmtree(folder, ignore_errors=True)
    kind = draw.kind
    return Result(kind.name, kind.promise, draw.by, draw.seed, outcome, round(time.monotonic() - began, 1), told)


def table(results: Sequence[Result]) -> str:
    """Outcomes by kind, as Markdown."""
    rows = ["| kind | n | by command | " + " | ".join(OUTCOMES) + " |", "|---|" + "---|" * (2 + len(OUTCOMES))]
    for kind in sorted({result.kind for result in results}):
        of_kind = [result for result in results if result.kind == kind]
        counts = Counter(result.outcome for result in of_kind)
        by_command = sum(result.by == "command" for result in of_kind)
        cells = [kind, len(of_kind), by_command, *(counts[outcome] for outcome in OUTCOMES)]
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    counts = Counter(result.outcome for result in results)
    by_command = sum(result.by == "command" for result in results)
    total = [f"all {len({result.kind for result in results})} kinds", len(results), by_command]
    rows.append("| " + " | ".join(str(cell) for cell in [*total, *(counts[outcome] for outcome in OUTCOMES)]) + " |")
    return "\n".join(rows)


def earlier(file: Path | None, drawn: Sequence[Draw]) -> list[Result]:
    """Results of the first faults of this draw, from a file that an earlier call wrote."""
    if file is None or not file.is_file():
        return []
    results = [Result(**one) for one in json.loads(file.read_text())]
    for result, draw in zip(results, drawn, strict=False):
        if (result.kind, result.by, result.seed) != (draw.kind.name, draw.by, draw.seed):
            raise SystemExit(f"{file} has the results of another draw: its {result.kind!r} is {draw.kind.name!r} here")
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn from the clock, and printed")
    parser.add_argument("--kind", action="append", help="only kinds whose name contains this text")
    parser.add_argument("--each", action="store_true", help="every kind once, every way in which it can be injected")
    parser.add_argument("--by", choices=("command", "ranks", "part"), help="only this way")
    parser.add_argument("--minutes", type=float, help="begin no fault after so many")
    parser.add_argument(
        "--results", type=Path, help="file of results; faults of this draw that are in it are not repeated"
    )
    parser.add_argument("--list", action="store_true", help="print the kinds")
    options = parser.parse_args(arguments)
    known = [one for one in kinds() if not options.kind or any(text in one.name for text in options.kind)]
    if options.kind:
        known = [one for one in known if one.name in options.kind] or known
    known = [one for one in known if options.by is None or options.by in one.by]
    if options.list:
        for kind in known:
            print(f"{kind.name}  [{', '.join(kind.by)}]  {kind.promise}")
        print(f"{len(known)} kinds")
        return 0
    if not known:
        parser.error(f"no kind is named like {options.kind}; --list prints them")
    seed = int(time.time()) if options.seed is None else options.seed
    if options.each or options.kind:
        drawn = [Draw(kind, by, seed) for kind in known for by in kind.by if options.by in (None, by)]
    else:
        drawn = draws(options.count, seed, known)
    print(f"{len(drawn)} faults of {len({draw.kind.name for draw in drawn})} kinds, seed {seed}", flush=True)
    results = earlier(options.results, drawn)
    here = Path(tempfile.mkdtemp(prefix="owpo-faults-"))
    with_ranks = Ranks(here)
    ground = Ground(here / "ground", with_ranks)
    began = time.monotonic()
    for number, draw in enumerate(drawn[len(results) :], start=len(results) + 1):
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            print(f"{number - 1} of {len(drawn)} faults after {options.minutes:g} min")
            break
        result = inject(draw, ground, here / f"{number:03d}")
        results.append(result)
        sign = "" if result.outcome == "right" else f"\n{result.told}"
        print(f"{number:4d} {result.outcome:15} {result.seconds:6.1f} s  {draw.kind.name} "
              f"({draw.by}, seed {draw.seed}){sign}", flush=True)  # fmt: skip
        if options.results:
            options.results.write_text(json.dumps([asdict(one) for one in results], indent=1))
    print(table(results))
    broken = [result for result in results if result.outcome != "right"]
    if not broken:
        shutil.rmtree(here, ignore_errors=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
