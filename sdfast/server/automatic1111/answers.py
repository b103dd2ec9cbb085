"""What txt2img and img2img answer."""

import base64
import json
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from sdfast import __version__
from sdfast.infotext import of_hires, of_mask, told_of_refiner, told_prompt
from sdfast.schedulers import Sampler
from sdfast.server.automatic1111.calls import Call
from sdfast.server.automatic1111.fields import Generation
from sdfast.server.automatic1111.options import short_hash
from sdfast.server.automatic1111.pictures import Canvas
from sdfast.server.encoding import parameters_of
from sdfast.server.jobs import Done, EngineInfo


@dataclass(frozen=True)
class Order:
    """What a client asked for, the call that it became, and what that is drawn with."""

    asked: Generation
    call: Call
    engine: EngineInfo
    sampler: Sampler
    canvas: Canvas | None
    refiner: EngineInfo | None = None


def whole(order: Order, done: Done | None) -> bytes:
    """The answer's JSON; for a call that was ended, None. Megabytes of base64: call it in a thread."""
    pngs, infotexts = _finished(order, done) if done else _unfinished(order)
    sent = [] if order.asked.send_images is False else [base64.b64encode(png).decode() for png in pngs]
    told = {"images": sent, "parameters": order.asked.echo(), "info": json.dumps(_info(order, infotexts))}
    return json.dumps(told).encode()


def _finished(order: Order, done: Done) -> tuple[list[bytes], list[str]]:
    """Pictures and their infotexts."""
    pngs = [order.canvas.over(png) if order.canvas else png for png in done.pngs]
    return pngs, [_infotext(png) for png in done.pngs]


def _unfinished(order: Order) -> tuple[list[bytes], list[str]]:
    """How far the first picture came, which no parameters make again."""
    preview = order.call.preview
    if preview is None:
        return [], []
    return [order.canvas.over(preview.png) if order.canvas else preview.png], [""]


def _infotext(png: bytes) -> str:
    with Image.open(BytesIO(png), formats=["PNG"]) as image:
        return parameters_of(image)


def _info(order: Order, infotexts: list[str]) -> dict[str, Any]:
    asked, request, images = order.asked, order.call.job.request, order.call.job.request.images
    subseeds = request.variation_seeds or (-1 if asked.subseed is None else asked.subseed,) * images
    resized = request.seed_resize_from or (-1, -1)
    again = {} if request.hires is None else of_hires(request, request.hires, 0)
    refined = {}
    if order.refiner is not None:
        refined = told_of_refiner(order.refiner.name, order.refiner.unet_digest, asked.switch_at)
    return {
        "prompt": told_prompt(request, 0),
        "all_prompts": [told_prompt(request, 0)] * images,
        "negative_prompt": request.negative_prompts[0] or "",
        "all_negative_prompts": [request.negative_prompts[0] or ""] * images,
        "seed": request.seed,
        "all_seeds": list(request.seeds),
        "subseed": subseeds[0],
        "all_subseeds": list(subseeds),
        "subseed_strength": request.variation_strength,
        "width": request.width,
        "height": request.height,
        "sampler_name": order.sampler.sampler,
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": asked.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": order.engine.name,
        "sd_model_hash": short_hash(order.engine),
        "sd_vae_name": order.engine.vae[0] if order.engine.vae else None,
        "sd_vae_hash": order.engine.vae[1][:10] if order.engine.vae else None,
        "seed_resize_from_w": resized[1],
        "seed_resize_from_h": resized[0],
        "denoising_strength": request.strength if request.hires is None else request.hires.strength,
        "extra_generation_params": {
            "Schedule type": order.sampler.schedule_type,
            **{name: value for name, value in again.items() if name.startswith("Hires")},
            **of_mask(request),
            **refined,
        },
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": order.call.timestamp,
        "clip_skip": 1 + (request.clip_skip or 0),
        "is_using_inpainting_conditioning": False,
        "version": f"sdfast {__version__}",
    }
