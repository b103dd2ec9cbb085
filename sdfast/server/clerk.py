"""The batcher's clerk: a thread that writes PNG files and delivers jobs, beside the device's work."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from io import BytesIO
from typing import Any, TypeVar

from PIL import Image

from sdfast.engine import Engine
from sdfast.errors import SdfastError, first_line
from sdfast.infotext import infotext_of, png, told_of_refiner, told_of_vae, unet_digest
from sdfast.prompts import Prompts
from sdfast.server.jobs import Failed, Preview
from sdfast.server.work import Work

T = TypeVar("T")

log = logging.getLogger(__name__)


class Clerk:
    """What is handed in is done in that order. All methods are the batcher's thread's."""

    def __init__(self, engine: Engine, prompts: Prompts, *, behind: int) -> None:
        """prompts: of the engine, for the tokens that were read.
        behind: so many pictures may wait for the clerk; whoever hands in another waits, too."""
        self._engine, self._prompts, self._behind = engine, prompts, behind
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sdfast-png")
        self._writing: deque[Future[Any]] = deque()

    def picture(self, work: Work, index: int, pixels: Image.Image) -> None:
        """Write a job's picture, for `deliver`."""
        work.pngs[index] = self._write(self._png, work, index, pixels)

    def preview(self, work: Work, index: int, pixels: Image.Image) -> None:
        """Write a preview, and tell it."""
        self._write(self._tell_preview, work, index, pixels)

    def deliver(self, work: Work, before: Callable[[Work], None]) -> None:
        """Tell a job's end once all of its pictures are written; `before` is called just before."""
        self._thread.submit(self._deliver, work, before)

    def close(self) -> None:
        """Once all is done that was handed in."""
        self._thread.shutdown()

    def _write(
        self, write: Callable[[Work, int, Image.Image], T], work: Work, index: int, pixels: Image.Image
    ) -> Future[T]:
        while len(self._writing) > self._behind:
            wait([self._writing.popleft()])
        written = self._thread.submit(write, work, index, pixels)
        self._writing.append(written)
        return written

    # For the clerk's thread:

    def _png(self, work: Work, index: int, pixels: Image.Image) -> bytes:
        request, manifest = work.job.request, self._engine.manifest
        weights, name, origin = manifest.checkpoint.weights, manifest.name, work.job.origin
        vae = told_of_vae(manifest.checkpoint.vae)
        if origin is None:
            told = infotext_of(request, work.ready.schedule, index, model=name, weights=weights)
            return png(pixels, replace(told, extra={**told.extra, **vae}))
        whole = request.model_copy(update={"denoising_start": None, "strength": origin.strength})
        begun = {"unet/": origin.unet_digest}
        told = infotext_of(whole, work.ready.schedule, index, model=origin.engine, weights=begun)
        refined = told_of_refiner(name, unet_digest(weights), origin.switch_at)
        return png(pixels, replace(told, extra={**told.extra, **refined, **vae}))

    def _tell_preview(self, work: Work, index: int, pixels: Image.Image) -> None:
        file = BytesIO()
        pixels.save(file, format="PNG", compress_level=1)  # to be looked at once, and soon
        work.tell(Preview(index, file.getvalue()))

    def _deliver(self, work: Work, before: Callable[[Work], None]) -> None:
        before(work)
        try:
            # The tokens are counted here, where nobody's step waits for it.
            work.deliver(self._prompts.count(work.job.request, work.ready.editing))
        except (SdfastError, OSError, ValueError) as error:
            log.error("a picture could not be written as PNG", exc_info=error)
            work.tell(Failed("engine", f"a picture could not be written as PNG: {first_line(error)}"))
