"""The demo: the whole of sdfast on its built-in checkpoint."""

import time
from collections.abc import Callable
from pathlib import Path

from sdfast.export.build import Progress, export
from sdfast.export.recipe import Recipe
from sdfast.pictures import Job, draw
from sdfast.validation import validate

PROMPT = "a cabin in misty mountains, watercolor style"
SEED = 42


def run(engines: Path, outputs: Path, progress: Progress, say: Callable[[str], None]) -> bool:
    """Export, draw, validate; whether the engine passed. Says where the picture and the report are."""
    engine = engines / "landscapes"
    say("1. export the built-in checkpoint, once")
    start = time.perf_counter()
    export("landscapes", engine, Recipe(), progress=progress)
    say(f"2. draw {PROMPT!r}")
    [(picture, seed, _)] = draw(Job(PROMPT, engine, seed=SEED), outputs / "demo.png", overwrite=True)
    say(f"   export and picture: {time.perf_counter() - start:.1f} s")
    say("3. validate against stock diffusers")
    report = validate(engine, progress=say)
    say(report.table())
    say(f"picture: {picture} (seed {seed})")
    say(f"report:  {engine / 'validation' / 'report.html'}")
    return report.passed
