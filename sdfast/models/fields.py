"""Reading a component's `config.json`: every field is either understood or refused by name."""

from collections.abc import Mapping
from typing import Any

from sdfast.errors import CheckpointError


class Fields:
    """The fields of one `config.json`. Each is taken once; `finish` refuses those nobody took."""

    def __init__(self, component: str, config: Mapping[str, Any]) -> None:
        self.component, self.config = component, config
        self.levels = 1
        self.taken: set[str] = set()

    def refuse(self, name: str, allowed: str) -> CheckpointError:
        given = self.config.get(name)
        return CheckpointError(
            f"{self.component}/config.json: {name}={given!r} is not supported; supported: {allowed}. "
            "The stock pipeline (--backend diffusers) may run this checkpoint."
        )

    def take(self, name: str, default: Any) -> Any:
        self.taken.add(name)
        return self.config.get(name, default)

    def require(self, fixed: Mapping[str, Any], ignored: set[str]) -> None:
        """Every field in `fixed` must be absent or have just that value; those in `ignored` may be any."""
        self.taken |= ignored
        for name, value in fixed.items():
            given = self.take(name, value)
            if isinstance(given, (list, tuple)) and given:
                same = all(item == value for item in given)
            else:
                same = given == value or (value is None and given is False)
            if not same:
                raise self.refuse(name, repr(value))

    def choose(self, name: str, allowed: tuple[str | None, ...], default: str | None) -> str | None:
        value = self.take(name, default)
        if value not in allowed:
            raise self.refuse(name, ", ".join(map(repr, allowed)))
        return str(value) if value is not None else None

    def integer(self, name: str, default: int | None) -> int:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(name, "a positive integer")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.take(name, None) is None else self.integer(name, None)

    def number(self, name: str, default: float) -> float:
        """A number; null stands for the default."""
        value = default if self.take(name, None) is None else self.config[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def blocks(self, name: str, default: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
        """A list of block types."""
        value = self.take(name, default)
        if not isinstance(value, (list, tuple)) or not value or any(item not in allowed for item in value):
            raise self.refuse(name, "a list of " + ", ".join(allowed))
        return tuple(value)

    def per_level(self, name: str, default: Any) -> tuple[Any, ...]:
        """One value for each of the network's levels, from a list or from one value for all."""
        value = self.take(name, default)
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * self.levels
        if len(values) != self.levels:
            raise self.refuse(name, f"one value, or one for each of {self.levels} levels")
        return values

    def integers(self, name: str, default: Any) -> tuple[int, ...]:
        """A positive integer for each level."""
        values = self.per_level(name, default)
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            raise self.refuse(name, "positive integers")
        return values

    def finish(self) -> None:
        """Refuse what is left, unless it is switched off or diffusers' own bookkeeping."""
        for name, value in self.config.items():
            if name not in self.taken and not name.startswith("_") and value not in (None, False):
                raise self.refuse(name, "leaving it out")
