"""IP-Adapters' images on their way to the loop: made ready, seen, and as much of each as is asked for.

An engine with IP-Adapters draws with an image for each of them, or without any. What the U-Net is told of a
row's images has one shape whatever they are, so rows with and without share a batch; one without is told of
values that are zero.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdfast.engine import Engine
from sdfast.errors import NumericalError, RequestError
from sdfast.image_processor import prepared
from sdfast.manifest import IMAGE_ENCODER, ImageProcessor, IPAdapter, Model
from sdfast.prompts import PromptCache, PromptState
from sdfast.request import AdapterScale, Request
from sdfast.row import Conditioning

DEFAULT_SCALE = 1.0  # as in diffusers


def pixels_of(image: Image.Image) -> Tensor:
    """[H, W, 3] uint8 of an RGB image."""
    return torch.from_numpy(np.asarray(image).copy())


def pixel_values(pixels: Tensor, processor: ImageProcessor) -> Tensor:
    """pixels [S, S, 3] uint8 -> [3, S, S] float32, normalised."""
    unit = pixels.permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.mean, processor.std))
    return (unit - mean) / std


def read_images(model: Model, given: Any) -> Tensor:
    """[A, S, S, 3] uint8: an image for each of A adapters, made ready; black for one that has none.

    given: PIL images or arrays [H, W, 3] of uint8: one, or a list with one for each adapter, of which some
    may be None. Raises `RequestError` for what is no such image, and for more or fewer of them.
    """
    several, images = of_each(model, given), black_images(model)
    for i, one in enumerate(several):
        if one is not None:
            images[i] = _read(one, processor_of(model))
    return images


def black_images(model: Model) -> Tensor:
    """[A, S, S, 3] uint8, one for each adapter of a model that has some."""
    side = processor_of(model).crop
    return torch.zeros(len(model.ip_adapters), side, side, 3, dtype=torch.uint8)


def of_each(model: Model, given: Any) -> list[Any]:
    """What is given for each adapter. Raises `RequestError` where that are more or fewer than adapters."""
    check_taken(model)
    count = len(model.ip_adapters)
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    if any(isinstance(one, (list, tuple)) for one in several):
        raise RequestError(
            "ip_adapter_image: a list within the list; an adapter takes one image, the same for all pictures "
            "of a call"
        )
    if len(several) != count:
        has = "one IP-Adapter" if count == 1 else f"{count} IP-Adapters"
        raise RequestError(
            f"ip_adapter_image: {len(several)}, but this engine has {has}; give one for each, in their "
            "order, and None for one that is to add nothing"
        )
    if all(one is None for one in several):
        raise RequestError("ip_adapter_image: None for every IP-Adapter; leave it out to draw without them")
    return several


def _read(given: Any, processor: ImageProcessor) -> Tensor:
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim == 3 and given.shape[2] == 3:
        given = Image.fromarray(given)
    if not isinstance(given, Image.Image):
        shape = f" of shape {tuple(given.shape)}" if hasattr(given, "shape") else ""
        raise RequestError(
            f"ip_adapter_image: {type(given).__name__}{shape} is not a PIL image or an array [H, W, 3] of "
            "uint8, or a list of them"
        )
    return pixels_of(prepared(given, processor))


def asked_scale(model: Model, images: Any, scale: Any) -> Any:
    """What a request's scale is to be, with images as `read_images` takes them.

    By default 1, and 0 for an adapter without an image.
    """
    given = of_each(model, images)
    scale = DEFAULT_SCALE if scale is None else scale
    several = scale if isinstance(scale, (list, tuple)) else (scale,) * len(given)
    if all(one is not None for one in given) or len(several) != len(given):  # which is refused later
        return scale
    return tuple(0.0 if one is None else own for one, own in zip(given, several, strict=True))


def processor_of(model: Model) -> ImageProcessor:
    """That of a model with IP-Adapters."""
    if model.image_processor is None:
        raise ValueError("a model without IP-Adapters has no image processor")
    return model.image_processor


def check_taken(model: Model) -> None:
    """Raises `RequestError` where the engine has no IP-Adapter."""
    if not model.ip_adapters:
        raise RequestError(
            "ip_adapter_image: this engine has no IP-Adapter; leave it out, or export one with "
            "`sdfast export SOURCE -o DIR --ip-adapter IP_ADAPTER`"
        )


def check_images(model: Model, request: Request, images: Tensor | None) -> None:
    """Raises `RequestError` for images and scales that do not fit the engine, or one another."""
    if (request.ip_adapter_scale is not None) != (images is not None):
        raise RequestError("ip_adapter_scale and ip_adapter_image go together; give both, or neither")
    if images is not None:
        check_taken(model)
        side = processor_of(model).crop
        due = (len(model.ip_adapters), side, side, 3)
        if tuple(images.shape) != due or images.dtype != torch.uint8:
            raise RequestError(f"ip_adapter_image: {tuple(images.shape)}, but {due} uint8 is needed")
        _scales(model, request)


def check_scale(model: Model, scale: Any) -> None:
    """Raises `RequestError` for a scale that a request for the engine could not have."""
    check_taken(model)
    asked = {"prompts": ("",), "negative_prompts": (None,), "height": 8, "width": 8, "num_inference_steps": 1}
    _scales(model, Request.make(**asked, ip_adapter_scale=scale))


# ---------------------------------------------------------------- how much of each


def _scales(model: Model, request: Request) -> list[list[float]]:
    """For each adapter, how much of it each of the model's transformers is told."""
    scale, count = request.ip_adapter_scale, len(model.ip_adapters)
    several = scale if isinstance(scale, tuple) else (scale,) * count
    if len(several) != count:
        raise RequestError(
            f"ip_adapter_scale: {len(several)}, but this engine has {count} IP-Adapter{'s' * (count > 1)}; "
            "give one for each, in their order, or one for all"
        )
    return [by_transformer(model, one) for one in several if one is not None]


def by_transformer(model: Model, scale: AdapterScale) -> list[float]:
    """How much each transformer is told, of a number for all; or of numbers by their places, as in
    diffusers: `{"down": 1.0, "mid": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}}`, 0 for those not named.

    Raises `RequestError` for a place that the U-Net does not have.
    """
    names = [run.name for run in model.transformers]
    if not isinstance(scale, Mapping):
        return [float(scale)] * len(names)
    found = dict.fromkeys(names, 0.0)
    for path, numbers in _by_block(names, scale):
        own = [name for name in names if _block(name) == path]
        each = numbers if isinstance(numbers, tuple) else (numbers,)
        if not own or len(each) not in (1, len(own)):
            what = f"{len(each)} numbers for its {len(own)} transformers" if own else "no transformers there"
            raise RequestError(f"ip_adapter_scale: {path}: {what}; {_places(names)}")
        found.update(zip(own, each * len(own) if len(each) == 1 else each, strict=True))
    return list(found.values())


def _by_block(names: Sequence[str], scale: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The blocks that are spoken of, with the numbers for each."""
    for way, told in scale.items():
        if isinstance(told, Mapping):
            yield from ((f"{way}.{block}", numbers) for block, numbers in told.items())
        else:
            blocks = dict.fromkeys(_block(name) for name in names if name.partition(".")[0] == way)
            yield from ((block, told) for block in blocks or (way,))


def _block(name: str) -> str:
    """The block of a transformer: of "up.block_1.0" "up.block_1"; the middle is one."""
    return name.rpartition(".")[0] or name


def _places(names: Sequence[str]) -> str:
    told = (f"{block} ({count})" for block, count in Counter(map(_block, names)).items())
    return f"there are, with how many transformers each has: {', '.join(told)}"


def scaled(context: Tensor, model: Model, scales: Sequence[float]) -> Tensor:
    """context [..., KV] -> the same, the values of each transformer times its scale."""
    runs = zip(model.transformers, scales, strict=True)
    factors = [
        torch.tensor([1.0, scale]).repeat_interleave(run.channels).repeat(run.layers) for run, scale in runs
    ]
    return context * torch.cat(factors).to(context)


# ---------------------------------------------------------------- what the U-Net is told


class ImagePrompts:
    """The image side of an engine with IP-Adapters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._model = engine.manifest.model
        self._cache = PromptCache()

    def tell(
        self,
        request: Request,
        images: Tensor | None,
        positive: Sequence[Conditioning],
        negative: Sequence[Conditioning],
    ) -> tuple[list[Conditioning], list[Conditioning]]:
        """What the U-Net is told, of the images too. images: as `read_images` gives them, None for none.

        Negative prompts are told of an image that is none: its embedding is zero, or for adapters that look
        at its parts, each of its normalised pixels is, as with diffusers.
        """
        seen = self._context(request, images)
        told = [replace(one, image=seen) for one in positive]
        if not negative:
            return told, []
        away = seen if images is None else self._context(request, torch.zeros_like(images), away=True)
        return told, [replace(one, image=away) for one in negative]

    def _context(self, request: Request, images: Tensor | None, *, away: bool = False) -> Tensor:
        """[I, KV] of all adapters."""
        engine, model = self._engine, self._model
        if images is None:
            return torch.zeros(model.image_context, device=engine.device, dtype=engine.dtype)
        parts = []
        for adapter, image, scales in zip(model.ip_adapters, images, _scales(model, request), strict=True):
            shape = adapter.tokens, model.image_context[1]
            if any(scales):
                parts.append(scaled(self._seen(adapter, None if away else image), model, scales))
            else:
                parts.append(torch.zeros(shape, device=engine.device, dtype=engine.dtype))
        return torch.cat(parts)

    def _seen(self, adapter: IPAdapter, image: Tensor | None) -> Tensor:
        """[T, KV] of one adapter's image; of none for the negative. Raises `NumericalError`."""
        digest = None if image is None else hashlib.sha256(image.numpy().tobytes()).hexdigest()
        key = adapter.module, digest
        found = self._cache.get(key)
        if found is None:
            reads = self._encoded(adapter, image)
            context = self._engine.call(adapter.module, {"image": reads})["image_context"]
            if not bool(torch.isfinite(context).all()):
                raise NumericalError(
                    "what the U-Net is told of an IP-Adapter's image is not finite: export the engine in fp32"
                )
            found = PromptState(context, None), ""
            self._cache.put(key, *found)
        return found[0].context[0]

    def _encoded(self, adapter: IPAdapter, image: Tensor | None) -> Tensor:
        """What the adapter reads of the image encoder's results, [1, D] or [1, N, D]."""
        engine, processor = self._engine, processor_of(self._model)
        pixels = torch.zeros(3, processor.crop, processor.crop)
        if image is not None:
            pixels = pixel_values(image, processor)
        seen = engine.call(IMAGE_ENCODER, {"pixel_values": pixels[None].to(engine.device, engine.dtype)})
        reads = seen[adapter.reads]
        return torch.zeros_like(reads) if image is None and adapter.reads == "image_embeds" else reads
