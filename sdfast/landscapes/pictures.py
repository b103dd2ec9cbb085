"""The training set: pictures drawn once into a file that every stage of training reads."""

from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdfast.landscapes.draw import SIZE, draw
from sdfast.landscapes.scenes import ATTRIBUTES, Scene, training_scenes

CHUNK = 2000


def scene_of(index: int) -> Scene:
    """The scene of training picture `index`: subjects equally often, then any training combination."""
    rng = np.random.default_rng([7, index])
    subjects = ATTRIBUTES["subject"]
    subject = subjects[int(rng.integers(len(subjects)))]
    scenes = training_scenes_by_subject()[subject]
    return scenes[int(rng.integers(len(scenes)))]


@cache
def training_scenes_by_subject() -> dict[str, list[Scene]]:
    """The training combinations of each subject."""
    by_subject: dict[str, list[Scene]] = {}
    for scene in training_scenes():
        by_subject.setdefault(scene.subject, []).append(scene)
    return by_subject


def draw_chunk(folder: Path, chunk: int) -> Path:
    """Draw pictures chunk·2000 … chunk·2000 + 1999 into `chunk_N.npy` [2000, 128, 128, 3] uint8."""
    path = folder / f"chunk_{chunk}.npy"
    if not path.exists():
        pictures = np.empty((CHUNK, SIZE, SIZE, 3), dtype=np.uint8)
        for i in range(CHUNK):
            index = chunk * CHUNK + i
            pictures[i] = draw(scene_of(index), index)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, pictures)
        part.rename(path)
    return path


def draw_training_set(folder: Path, count: int, processes: int = 2) -> list[Path]:
    """Draw the first `count` training pictures (a multiple of 2000); returns the chunk files in order."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(draw_chunk, repeat(folder), range(count // CHUNK)))


def read_pictures(paths: list[Path]) -> NDArray[np.uint8]:
    """All pictures of these chunk files, [N, 128, 128, 3] uint8."""
    return np.concatenate([np.load(path) for path in paths])


def read_labels(count: int) -> NDArray[np.int64]:
    """The attribute indices of the first `count` training pictures, [N, 5]."""
    return np.array([scene_of(index).labels() for index in range(count)], dtype=np.int64)
