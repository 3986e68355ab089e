"""Numbers of a response's tokens in one block of memory: 4 bytes each instead of the 36 of a tuple's objects."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

if TYPE_CHECKING:
    import numpy
    import torch
    from typing_extensions import Self

N = TypeVar("N", int, float)


class _Block(Sequence[N], Generic[N]):
    """An immutable sequence that compares, concatenates and is sliced as a tuple of the same numbers."""

    __slots__ = ("_numbers",)
    _code: ClassVar[str]

    def __init__(self, numbers: Iterable[N] = ()):
        self._numbers: array[N] = array(self._code, numbers)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Read what `bytes` returned: 4 bytes per number, in the machine's order."""
        made = cls()
        made._numbers.frombytes(content)
        return made

    def __bytes__(self) -> bytes:
        return self._numbers.tobytes()

    def tolist(self) -> list[N]:
        return self._numbers.tolist()

    def numpy(self) -> numpy.ndarray:
        """[L] int32 or float32, without a copy and read-only."""
        import numpy

        found = numpy.frombuffer(self._numbers, dtype=f"{self._code}4")
        found.flags.writeable = False
        return found

    def tensor(self) -> torch.Tensor:
        """[L] int32 or float32, without a copy: not to be written to."""
        import torch

        dtype = torch.int32 if self._code == "i" else torch.float32
        return torch.frombuffer(self._numbers, dtype=dtype) if self._numbers else torch.empty(0, dtype=dtype)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> N: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> N | Self:
        return self._like(self._numbers[place]) if isinstance(place, slice) else self._numbers[place]

    def __iter__(self) -> Iterator[N]:
        return iter(self._numbers)

    def __add__(self, more: Sequence[N]) -> Self:
        return self._like(self._numbers + (more._numbers if isinstance(more, type(self)) else array(self._code, more)))

    def __radd__(self, first: Sequence[N]) -> Self:
        return self._like(array(self._code, first) + self._numbers)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Block):
            return bool(self._numbers == other._numbers)
        return tuple(self._numbers) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._numbers))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytes, (bytes(self),)

    def __repr__(self) -> str:
        return repr(tuple(self._numbers))

    @classmethod
    def _like(cls, numbers: array[N]) -> Self:
        made = cls.__new__(cls)
        made._numbers = numbers
        return made


class TokenIds(_Block[int]):
    """Token ids.

    Example:
        >>> ids = TokenIds([11, 3]) + (1,)
        >>> ids, ids[:2] == (11, 3), len(bytes(ids))
        ((11, 3, 1), True, 12)
    """

    __slots__ = ()
    _code = "i"


class TokenValues(_Block[float]):
    """One float32 per token, as engines and the trainer compute them.

    Example:
        >>> TokenValues([-0.5, -0.1])  # -0.1 is not a float32
        (-0.5, -0.10000000149011612)
    """

    __slots__ = ()
    _code = "f"


Ids = TokenIds | tuple[int, ...]
Values = TokenValues | tuple[float, ...]


def tensor_of(numbers: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """[L] of this dtype, from a block or from any other sequence; not to be written to."""
    import torch

    if isinstance(numbers, (TokenIds, TokenValues)):
        return numbers.tensor().to(dtype)
    return torch.tensor(numbers, dtype=dtype)
