"""What was measured of the kernels for one shape, and who remembers it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Measured:
    """The kernel that was taken, by name.

    milliseconds: of every one that was timed, in a batch of `rows`. refused: why others were not.
    """

    kind: str
    milliseconds: Mapping[str, float]
    rows: int
    refused: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        times = sorted(self.milliseconds.items(), key=lambda item: (item[1], item[0]))
        return f"{self.kind} ({', '.join(f'{kind} {time:.3f} ms' for kind, time in times)})"


class Memory(Protocol):
    """What was measured on this machine, by the words that say of what."""

    def recall(self, what: str, kinds: Collection[str]) -> Measured | None:
        """What was measured, if what was taken then is among these `kinds`."""
        ...

    def keep(self, what: str, measured: Measured, kinds: Collection[str]) -> Measured:
        """Remember it. What another process has measured in the meantime stays, and is returned."""
        ...
