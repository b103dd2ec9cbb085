"""The pictures that a job is given, on the engine's side: bytes checked, and as tensors."""

from torch import Tensor

from sdfast.call import Given
from sdfast.control import check_controlled
from sdfast.engine import Engine
from sdfast.errors import RequestError
from sdfast.first_latents import Over, check_edits, check_strength
from sdfast.images import (
    check_bytes,
    controls_from_bytes,
    from_bytes,
    mask_from_bytes,
    pixels_from_bytes,
)
from sdfast.ip_adapter import check_images, check_taken, processor_of
from sdfast.loras import check_loras
from sdfast.noise import generator
from sdfast.pag import check_pag
from sdfast.preparation import check_cached, check_channels, check_instructed, check_refined
from sdfast.request import Request
from sdfast.server.handover import check_handed, unpacked
from sdfast.server.jobs import Job


def check_given(engine: Engine, job: Job) -> None:
    """Raises `RequestError` for pictures that the engine cannot take, or not with this request, and for those
    that it cannot do without."""
    height, width = job.request.height, job.request.width
    check_channels(engine.manifest.model, masked=job.mask is not None)
    check_instructed(engine.manifest.model, job.request, over=job.over, masked=job.mask is not None)
    check_cached(engine.manifest.model, job.request)
    check_pag(engine.manifest.model, job.request)
    check_loras(engine.manifest.model, job.request)
    check_strength(job.request, over=job.over, masked=job.mask is not None)
    check_refined(engine.manifest.model, over=job.over)
    if job.mask is not None:
        if not job.over:
            raise RequestError("mask: is for an image to draw over; give image too")
        check_bytes("mask", job.mask, (height, width))
    if job.image is not None:
        check_edits(engine)
        check_bytes("image", job.image, (height, width, 3))
    if job.handed is not None:
        check_handed(job.handed, job.request.images, _latents(engine, job.request))
    check_controlled(engine.manifest.model, job.request, controlled=job.control is not None)
    if job.control is not None:
        several = (count,) if (count := engine.manifest.model.controlnets) > 1 else ()
        check_bytes("control_image", job.control, (*several, height, width, 3))
    check_images(engine.manifest.model, job.request, _seen(engine, job))


def given_of(engine: Engine, job: Job) -> Given:
    """What a job is drawn over, and under the guidance of what; and where two engines share its pictures, the
    generator of each, which goes from the one to the other."""
    request = job.request
    height, width = request.height, request.width
    control = None if job.control is None else controls_from_bytes(job.control, height, width)
    seen = _seen(engine, job)
    mask = None if job.mask is None else mask_from_bytes(job.mask, height, width)
    if job.handed is not None:
        latents, sources = unpacked(job.handed, request.images, _latents(engine, request))
        return Given(sources, over=Over(latents, mask), control=control, ip_adapter_images=seen, seeded=True)
    over = None if job.image is None else Over(from_bytes(job.image, height, width), mask)
    generators = [generator(seed) for seed in request.seeds] if job.hands_over else None
    return Given(generators, over=over, control=control, ip_adapter_images=seen, seeded=job.hands_over)


def _seen(engine: Engine, job: Job) -> Tensor | None:
    """The images of IP-Adapters. Raises `RequestError` where they are more or fewer bytes than there are."""
    if job.ip_adapter is None:
        return None
    model = engine.manifest.model
    check_taken(model)
    side = processor_of(model).crop
    return pixels_from_bytes("ip_adapter_image", job.ip_adapter, (len(model.ip_adapters), side, side, 3))


def _latents(engine: Engine, request: Request) -> tuple[int, int, int]:
    model = engine.manifest.model
    factor = model.vae_scale_factor
    return model.latent_channels, request.height // factor, request.width // factor
