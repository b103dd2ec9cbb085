"""What a landscape can be: five attributes, which of them go together, and which are held out."""

import hashlib
import itertools
from dataclasses import astuple, dataclass, fields

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": ("none", "cabin", "lighthouse", "tent", "boat", "castle", "tree"),
    "place": ("mountains", "hills", "desert", "sea", "forest", "lake"),
    "time": ("dawn", "noon", "sunset", "night"),
    "weather": ("clear", "misty", "snowy", "rainy"),
    "style": ("flat", "watercolor", "ink", "pixel"),
}

HELD_OUT_SHARE = 0.10


@dataclass(frozen=True)
class Scene:
    """One value of each attribute; what is drawn and what a picture is judged by."""

    subject: str
    place: str
    time: str
    weather: str
    style: str

    def __post_init__(self) -> None:
        """Refuse a value that is not in `ATTRIBUTES`, and a boat on dry land."""
        for name, values in ATTRIBUTES.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"{name} is {value!r}; it can be one of {', '.join(values)}")
        if not possible(self.subject, self.place):
            raise ValueError(f"a {self.subject} cannot be in the {self.place}; boats need the sea or a lake")

    def labels(self) -> tuple[int, ...]:
        """The index of each value in its attribute's tuple, in the order of `ATTRIBUTES`."""
        return tuple(values.index(getattr(self, name)) for name, values in ATTRIBUTES.items())


def possible(subject: str, place: str) -> bool:
    """Whether this subject is ever drawn in this place: boats only on water."""
    return subject != "boat" or place in ("sea", "lake")


def all_scenes() -> list[Scene]:
    """Every combination that is drawn, in a fixed order."""
    order = [field.name for field in fields(Scene)]
    combinations = itertools.product(*(ATTRIBUTES[name] for name in order))
    return [Scene(*values) for values in combinations if possible(values[0], values[1])]


def held_out(scene: Scene) -> bool:
    """Whether the combination is kept out of all training: a tenth, chosen by a hash of its values."""
    digest = hashlib.sha256("/".join(astuple(scene)).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def training_scenes() -> list[Scene]:
    """The combinations that every stage of training may see."""
    return [scene for scene in all_scenes() if not held_out(scene)]


def held_out_scenes() -> list[Scene]:
    """The combinations that no stage of training sees; the measured figures are about these."""
    return [scene for scene in all_scenes() if held_out(scene)]
