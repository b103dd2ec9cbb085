"""What a job is drawn over, on the engine's side: bytes checked, and as tensors."""

from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.first_latents import Over, check_edits, check_strength
from sdfast.images import check_bytes, from_bytes, mask_from_bytes
from sdfast.pipeline import check_channels
from sdfast.server.jobs import Job


def check_over(engine: Engine, job: Job) -> None:
    """Raises `RequestError` for an image or a mask that the engine cannot take, or not with this request."""
    height, width = job.request.height, job.request.width
    if engine.manifest.model.controlled:
        raise RequestError(
            "this engine has a ControlNet and needs a control image, which the server does not take; draw "
            "with `sdfast generate --control FILE`, or ask an engine without"
        )
    check_channels(engine.manifest.model, masked=job.mask is not None)
    check_strength(job.request, over=job.image is not None)
    if job.mask is not None:
        if job.image is None:
            raise RequestError("mask: is for an image to draw over; give image too")
        check_bytes("mask", job.mask, (height, width))
    if job.image is not None:
        check_edits(engine)
        check_bytes("image", job.image, (height, width, 3))


def over_of(job: Job) -> Over | None:
    """What a job is drawn over."""
    if job.image is None:
        return None
    height, width = job.request.height, job.request.width
    mask = None if job.mask is None else mask_from_bytes(job.mask, height, width)
    return Over(from_bytes(job.image, height, width), mask)
