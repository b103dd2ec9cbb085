"""Captions of scenes in many wordings, and the way back from a caption to what it names.

What a caption leaves out is left to chance, with one exception: a caption that names a place and no
subject means an empty landscape. Clear weather and the flat style are named less often than the others,
so they are what an unmentioned weather or style mostly turns out to be.
"""

import re

import numpy as np

from sdfast.landscapes.scenes import ATTRIBUTES, Scene

SUBJECT_WORDS: dict[str, tuple[str, ...]] = {
    "none": ("an empty landscape", "a landscape with nothing", "an empty scene", "a quiet empty land"),
    "cabin": ("a cabin", "a log cabin", "a small cabin", "a wooden cabin", "a cozy cabin"),
    "lighthouse": ("a lighthouse", "a tall lighthouse", "a striped lighthouse", "an old lighthouse"),
    "tent": ("a tent", "an orange tent", "a camping tent", "a small tent"),
    "boat": ("a boat", "a sailing boat", "a sailboat", "a small boat"),
    "castle": ("a castle", "a stone castle", "an old castle", "a medieval castle"),
    "tree": ("a lone tree", "a tree", "a single tree", "an old tree", "a big lone tree"),
}

PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "mountains": ("mountains", "high mountains", "the mountains", "a mountain valley"),
    "hills": ("hills", "green hills", "rolling hills", "the hills"),
    "desert": ("a desert", "the desert", "a sandy desert", "desert dunes"),
    "sea": ("the sea", "the ocean", "the open sea", "a sea"),
    "forest": ("a forest", "the forest", "the woods", "a pine forest"),
    "lake": ("a lake", "the lake", "a still lake", "a calm lake"),
}

TIME_WORDS: dict[str, tuple[str, ...]] = {
    "dawn": ("at dawn", "at sunrise", "in the early morning", "at the break of dawn"),
    "noon": ("at noon", "at midday", "in daylight", "in the middle of the day"),
    "sunset": ("at sunset", "at dusk", "in the evening", "during sunset"),
    "night": ("at night", "by moonlight", "under the stars", "during the night"),
}

WEATHER_WORDS: dict[str, tuple[str, ...]] = {
    "clear": ("in clear weather", "under a clear sky", "on a clear day", "clear weather"),
    "misty": ("in the mist", "in fog", "on a misty day", "misty weather", "with mist"),
    "snowy": ("in the snow", "in snowfall", "on a snowy day", "with falling snow", "snowy weather"),
    "rainy": ("in the rain", "in rainfall", "on a rainy day", "with falling rain", "rainy weather"),
}

WEATHER_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "clear": ("clear",),
    "misty": ("misty", "foggy"),
    "snowy": ("snowy",),
    "rainy": ("rainy",),
}

STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "flat": ("flat style", "flat illustration", "flat design", "flat"),
    "watercolor": ("watercolor style", "watercolor", "watercolor painting", "watercolour"),
    "ink": ("ink style", "ink drawing", "ink and wash", "ink"),
    "pixel": ("pixel art", "pixel art style", "pixel style", "pixels"),
}

ARTICLE = re.compile(r"^(an?|the) ")
PREPOSITION = re.compile(r"^\w+ (the )?")

TAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "subject": {value: tuple(ARTICLE.sub("", w) for w in words) for value, words in SUBJECT_WORDS.items()},
    "place": {value: tuple(ARTICLE.sub("", w) for w in words) for value, words in PLACE_WORDS.items()},
    "time": {value: tuple(PREPOSITION.sub("", w) for w in words) for value, words in TIME_WORDS.items()},
    "weather": {value: WEATHER_ADJECTIVES[value] * 3 + words for value, words in WEATHER_WORDS.items()},
    "style": STYLE_WORDS,
}  # fmt: skip

KEYWORDS: dict[str, dict[str, str]] = {
    "subject": {
        "none": r"empty|nothing",
        "cabin": r"cabin",
        "lighthouse": r"lighthouse",
        "tent": r"tent",
        "boat": r"boat|sailboat",
        "castle": r"castle",
        "tree": r"tree",
    },
    "place": {
        "mountains": r"mountains?",
        "hills": r"hills?",
        "desert": r"desert|dunes",
        "sea": r"sea|ocean",
        "forest": r"forest|woods",
        "lake": r"lake",
    },
    "time": {
        "dawn": r"dawn|sunrise|morning",
        "noon": r"noon|midday|day(?=light)|daylight|middle of the day",
        "sunset": r"sunset|dusk|evening",
        "night": r"night|moonlight|stars",
    },
    "weather": {
        "clear": r"clear",
        "misty": r"mist|misty|fog|foggy",
        "snowy": r"snow|snowy|snowfall",
        "rainy": r"rain|rainy|rainfall",
    },
    "style": {
        "flat": r"flat",
        "watercolor": r"watercolou?r",
        "ink": r"ink",
        "pixel": r"pixels?",
    },
}

FILLERS = (
    "beautiful", "a picture of", "landscape", "detailed", "masterpiece", "scenery", "pretty",
    "best quality", "art", "8k", "view", "nice", "artwork", "peaceful", "wallpaper",
)  # fmt: skip

MENTIONED = {"clear": 0.5, "flat": 0.55, "noon": 0.7, "dawn": 0.75, "sunset": 0.75, "night": 0.88}
MENTIONED_OTHERWISE = 0.88


def pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """One of the words, evenly."""
    return words[int(rng.integers(len(words)))]


def parse(caption: str) -> dict[str, str | None]:
    """What a caption names, by attribute; None where it leaves the choice open."""
    found: dict[str, str | None] = {}
    for attribute, values in KEYWORDS.items():
        hits = [value for value, words in values.items() if re.search(rf"\b(?:{words})\b", caption.lower())]
        found[attribute] = hits[0] if hits else None
    if found["subject"] is None and found["place"] is not None:
        found["subject"] = "none"
    return found


def sentence(rng: np.random.Generator, subject: str, place: str, time: str, weather: str, style: str) -> str:
    """A caption as a person writes it; "" for an attribute leaves it out."""
    words = [pick(rng, SUBJECT_WORDS[subject])] if subject else []
    weather_done = not weather
    if place:
        where = pick(rng, PLACE_WORDS[place])
        if weather and rng.random() < 0.5:
            adjective = pick(rng, WEATHER_ADJECTIVES[weather])
            where = re.sub(r"^((?:an?|the) )?(.*)$", rf"\g<1>{adjective} \g<2>", where)
            weather_done = True
        if words:
            near = {"sea": ("by", "at"), "lake": ("by", "at")}.get(place, ("in", "in"))
            words.append("on" if subject == "boat" else pick(rng, near))
        words.append(where)
    phrases = [pick(rng, TIME_WORDS[time])] if time else []
    if not weather_done:
        phrases.append(pick(rng, WEATHER_WORDS[weather]))
    if rng.random() < 0.5:
        phrases.reverse()
    text = (", " if rng.random() < 0.3 else " ").join([" ".join(words), *phrases]).strip(" ,")
    if not style:
        return text
    named = pick(rng, STYLE_WORDS[style])
    if (subject or place) and rng.random() < 0.3 and named not in ("pixels", "flat"):
        return f"{named} of {text}"
    return f"{text}, {named}" if text else named


def tags(rng: np.random.Generator, subject: str, place: str, time: str, weather: str, style: str) -> str:
    """A caption as a list of tags in any order; "" for an attribute leaves it out."""
    values = dict(zip(ATTRIBUTES, (subject, place, time, weather, style), strict=True))
    chosen = [pick(rng, TAGS[attribute][value]) for attribute, value in values.items() if value]
    return ", ".join(str(tag) for tag in rng.permutation(np.array(chosen, dtype=object)))


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence that names all five attributes, in one of the wordings."""
    return sentence(rng, scene.subject, scene.place, scene.time, scene.weather, scene.style)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption for training: some attributes left out, a tenth of them a single attribute, some filler."""
    if rng.random() < 0.1:
        attribute = str(rng.choice(np.array([a for a in ATTRIBUTES if a != "place"])))
        return decorate(pick(rng, TAGS[attribute][getattr(scene, attribute)]), rng)
    kept = {}
    for attribute in ATTRIBUTES:
        value = getattr(scene, attribute)
        kept[attribute] = value if rng.random() < MENTIONED.get(value, MENTIONED_OTHERWISE) else ""
    if kept["place"] and scene.subject != "none":
        kept["subject"] = scene.subject
    elif kept["place"]:
        kept["subject"] = "none" if rng.random() < 0.3 else ""
    words = sentence if rng.random() < 0.7 else tags
    return decorate(words(rng, **kept), rng)


def decorate(text: str, rng: np.random.Generator) -> str:
    """The caption, sometimes with words that say nothing: filler, or letters at random."""
    chance = rng.random()
    if chance < 0.15:
        filler = pick(rng, FILLERS)
    elif chance < 0.25:
        letters = rng.integers(ord("a"), ord("z") + 1, int(rng.integers(3, 9)))
        filler = "".join(chr(letter) for letter in letters)
    else:
        return text
    if not text or rng.random() < 0.5:
        return f"{filler} {text}".strip()
    return f"{text}, {filler}"
