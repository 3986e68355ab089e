"""Samples that travel in one request, and the posts that wait for a lane of their engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Post:
    """Samples that are sent in one request: requests[first:end]."""

    first: int
    end: int
    engine: int | None = None  # that has their sessions; None: any


class Posts:
    """The posts that wait for a lane. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Post] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, posts: Sequence[Post], in_front: bool = False) -> None:
        with self._lock:
            self._waiting[0 if in_front else len(self._waiting) : 0 if in_front else None] = posts

    def of(self, engine: int) -> int:
        """Number of posts that this engine may take."""
        with self._lock:
            return sum(post.engine in (None, engine) for post in self._waiting)

    def take(self, engine: int) -> Post | None:
        with self._lock:
            for place, post in enumerate(self._waiting):
                if post.engine in (None, engine):
                    return self._waiting.pop(place)
        return None

    def clear(self) -> list[Post]:
        """Remove all of them, and return them."""
        with self._lock:
            left, self._waiting = self._waiting, []
        return left
