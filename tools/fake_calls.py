"""Operations of a rank, as fake_ranks.py records them, and whether those of several ranks go together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """One operation of one rank: of two ranks where there is a peer, else of the whole group.

    `bytes` are those of the larger of what goes in and what comes out.
    """

    operation: str
    bytes: int
    group: tuple[int, ...]
    peer: int | None = None
    phase: str = ""


@dataclass
class RankRecord:
    """Operations of one rank, and the bytes that it would hold after an update."""

    rank: int
    place: dict[str, int]
    calls: list[Call]
    memory: dict[str, int]
    groups: dict[tuple[int, ...], str]  # what a group is for
    catalogue: Any = None  # its parameters, as the export of weights gathers them
    seconds: float = 0.0  # of CPU


def differences(records: Sequence[RankRecord]) -> list[str]:
    """List where ranks of a group do not do the same operations in the same order; empty: none waits for ever."""
    found = []
    by_group: dict[tuple[int, ...], dict[int, list[Call]]] = defaultdict(dict)
    pairs: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: {"send": [], "recv": []})
    known = {record.rank for record in records}
    for one in records:
        for members in {call.group for call in one.calls}:
            by_group[members][one.rank] = []
        for call in one.calls:
            if call.peer is None:
                by_group[call.group][one.rank].append(call)
            elif call.peer in known:
                ends = (one.rank, call.peer) if call.operation == "send" else (call.peer, one.rank)
                pairs[ends][call.operation].append(call.bytes)
    for members, calls in by_group.items():
        for rank in known & set(members) - set(calls):
            calls[rank] = []  # a member without any operation
        first, *others = calls
        for rank in others:
            for number in range(max(len(calls[first]), len(calls[rank]))):
                ours, theirs = (calls[who][number : number + 1] for who in (first, rank))
                if ours != theirs:
                    said = [f"{c[0].operation} of {c[0].bytes} bytes" if c else "nothing more" for c in (ours, theirs)]
                    where = f"group of {len(members)} from rank {members[0]}, operation {number}"
                    found.append(f"{where}: rank {first} {said[0]}, rank {rank} {said[1]}")
                    break
    for (source, target), ends in pairs.items():
        if ends["send"] != ends["recv"]:
            found.append(f"rank {source} sends {ends['send']} bytes, rank {target} receives {ends['recv']}")
    return found


def table(one: RankRecord) -> list[str]:
    """Rows of a Markdown table: what a rank does in each phase, how often and how large."""
    count: Counter[tuple[str, str, str]] = Counter()
    size: Counter[tuple[str, str, str]] = Counter()
    for call in one.calls:
        where = "neighbour" if call.peer is not None else one.groups.get(call.group, f"{len(call.group)} ranks")
        kind = (call.phase, call.operation, where)
        count[kind] += 1
        size[kind] += call.bytes
    return [f"| {' | '.join(kind)} | {count[kind]} | {size[kind] / 1e6:,.1f} |" for kind in count]
