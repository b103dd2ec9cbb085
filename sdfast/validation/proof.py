"""Leaving the proof in the engine: `validation/`, and the figures in the manifest."""

import math
from collections.abc import Sequence
from pathlib import Path

from sdfast.engine import Engine
from sdfast.errors import EngineError
from sdfast.export.publish import write_atomically
from sdfast.manifest import MANIFEST_NAME, Manifest, Validation, read_manifest
from sdfast.validation.page import page
from sdfast.validation.pictures import Picture
from sdfast.validation.report import Report

FOLDER = "validation"
PAGE = f"{FOLDER}/report.html"
FIGURES = f"{FOLDER}/report.json"


def publish_proof(engine: Engine, report: Report, pictures: Sequence[Picture]) -> None:
    """Write the report into the engine's directory and its figures into the manifest, each file in one step.

    Raises `EngineError` when the engine was replaced meanwhile, or cannot be written to.
    """
    folder = engine.folder
    _check_unchanged(folder, engine.manifest)
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        write_atomically(folder / PAGE, page(report, pictures))
        write_atomically(folder / FIGURES, report.model_dump_json(indent=1) + "\n")
        manifest = engine.manifest.model_copy(update={"validation": _validation(report)})
        write_atomically(folder / MANIFEST_NAME, manifest.to_json())
    except OSError as error:
        raise EngineError(
            f"{folder}: the report cannot be written ({error.strerror}); check its permissions and the disk"
        ) from error
    engine.manifest = manifest


def _validation(report: Report) -> Validation:
    """What the manifest keeps. Its figures are JSON numbers, which NaN and infinity are not."""
    figures = {name: value for name, value in report.figures().items() if math.isfinite(value)}
    return Validation(passed=report.passed, created=report.setting.created, report=PAGE, figures=figures)


def _check_unchanged(folder: Path, opened: Manifest) -> None:
    now = read_manifest(folder)
    if (
        now.model_copy(update={"validation": None}).sealed()
        != opened.model_copy(update={"validation": None}).sealed()
    ):
        raise EngineError(f"{folder}: another engine was put there during the validation; validate it again")
