"""Images that are drawn over, and masks: what a caller gives of them, as tensors.

They are read as diffusers' image processors read them: PIL images, numpy arrays [H, W, 3] and tensors
[3, H, W] of numbers in [0, 1], one or a list or a batch of them. But for the one thing that those would do
unasked: an image of another size than that of the picture is refused, not resized.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sdfast.errors import RequestError
from sdfast.request import MAX_SIDE

FORMATS = ("PNG", "JPEG", "WEBP")
DRAWN_ANEW = 0.5  # of a mask, from here on


def read_images(given: Any, latent_channels: int) -> Tensor:
    """[n, 3, H, W] float32 in [0, 1]; or latents [n, C, h, w], from a tensor that has as many channels.

    Raises `RequestError` for what is no image.
    """
    read = _joined("image", [_image(one, latent_channels) for one in _several("image", given)])
    if read.shape[1] == 3:
        _check_range("image", read)
    return read


def read_controls(given: Any, controlnets: int = 1) -> Tensor:
    """[n, N 3, H, W] float32: control images of N ControlNets, one after the other in the channels.

    In [0, 1]; of arrays and tensors also negative numbers as low as -1, by which ControlNets for inpainting
    are told what is drawn anew. With several ControlNets: what `controls_of_each` takes; None is black.
    Raises `RequestError` for what is no image.
    """
    each = controls_of_each(given, controlnets)
    read = {i: _controls(images) for i, images in enumerate(each) if images is not None}
    count, shape = max(map(len, read.values())), next(iter(read.values())).shape[1:]
    for images in read.values():
        if images.shape[1:] != shape or count % len(images):
            raise RequestError(
                f"control_image: {', '.join(_told(images) for images in read.values())}; those of one call "
                "have one size, and are as many for each ControlNet, or one for all pictures"
            )
    black = torch.zeros(1, *shape)
    spread = [read.get(i, black) for i in range(len(each))]
    return torch.cat([images.repeat(count // len(images), 1, 1, 1) for images in spread], dim=1)


def controls_of_each(given: Any, controlnets: int) -> list[Any]:
    """What is given for each of several ControlNets: of a list with an image for each, or a batch, or None;
    or of a list of such lists, one for each picture, as diffusers takes them. Raises `RequestError`."""
    if controlnets == 1:
        return [given]
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    by_picture = [one for one in several if isinstance(one, (list, tuple))]
    if by_picture and len(by_picture) == len(several):
        if any(len(images) != controlnets or any(one is None for one in images) for images in by_picture):
            raise RequestError(
                f"control_image: of a list for each picture each has {controlnets} images, one for each "
                "ControlNet"
            )
        return [list(images) for images in zip(*by_picture, strict=True)]
    if len(several) != controlnets:
        raise RequestError(
            f"control_image: {len(several)}, but this engine has {controlnets} ControlNets; give a list with "
            "one for each, in their order, and None for one that is to add nothing"
        )
    if all(one is None for one in several):
        raise RequestError("control_image: None for every ControlNet; give one at least")
    return several


def _controls(given: Any) -> Tensor:
    """Of one ControlNet: [n, 3, H, W]."""
    images = [_image(one, 3, "control_image") for one in _several("control_image", given)]
    read = _joined("control_image", images)
    _check_range("control_image", read, lowest=-1)
    return read


def _told(images: Tensor) -> str:
    count, _, height, width = images.shape
    return f"{count} of {width}x{height}"


def read_masks(given: Any) -> Tensor:
    """[n, 1, H, W] float32: 1 where the image is drawn anew (white), 0 where it stays.

    Raises `RequestError` for what is no mask.
    """
    read = _joined("mask_image", [_mask(one) for one in _several("mask_image", given)])
    _check_range("mask_image", read)
    return (read >= DRAWN_ANEW).float()


def check_bytes(name: str, given: bytes, shape: tuple[int, ...]) -> None:
    """Raises `RequestError` unless the bytes are as many as uint8 pixels of that shape."""
    due = math.prod(shape)
    if len(given) != due:
        raise RequestError(f"{name}: {len(given)} bytes, but {'x'.join(map(str, shape))} uint8 are {due}")


def from_bytes(image: bytes, height: int, width: int) -> Tensor:
    """[1, 3, H, W] float32 in [0, 1] of the bytes of RGB pixels [H, W, 3] uint8."""
    return _of_uint8(_pixels("image", image, (height, width, 3)))


def controls_from_bytes(controls: bytes, height: int, width: int) -> Tensor:
    """[1, N 3, H, W], as `read_controls`, of the bytes of RGB pixels [N, H, W, 3] uint8."""
    count = len(controls) // (height * width * 3)
    images = _of_uint8(_pixels("control_image", controls, (count, height, width, 3)))
    return images.reshape(1, 3 * count, height, width)


def mask_from_bytes(mask: bytes, height: int, width: int) -> Tensor:
    """[1, 1, H, W] float32, as `read_masks`, of bytes [H, W] uint8."""
    return (_of_uint8(_pixels("mask", mask, (height, width))[..., None]) >= DRAWN_ANEW).float()


def pixels_from_bytes(name: str, given: bytes, shape: tuple[int, ...]) -> Tensor:
    """The bytes of uint8 pixels of that shape, as they are."""
    return torch.from_numpy(_pixels(name, given, shape).copy())


def open_image(path: Path) -> Image.Image:
    """The image in a PNG, JPEG or WebP file, upright. Raises `RequestError`.

    Its size is looked at before it is decoded.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            if max(file.size) > MAX_SIDE:
                raise RequestError(
                    f"{path}: {file.width}x{file.height}, but sides are at most {MAX_SIDE} pixels; "
                    "scale it down"
                )
            file.load()
            return ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise RequestError(f"{path}: is not a PNG, JPEG or WebP image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: cannot be read ({error})") from error


def _several(name: str, given: Any) -> Sequence[Any]:
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    if not several:
        raise RequestError(f"{name}: an empty list; give one image at least")
    return several


def _image(given: Any, latent_channels: int, name: str = "image") -> Tensor:
    """One image, or a batch of them: [n, 3, H, W], or latents."""
    if isinstance(given, Image.Image):
        return _of_uint8(np.asarray(given.convert("RGB")))
    if isinstance(given, np.ndarray):
        _check_float(name, given.dtype.kind == "f", given.dtype)
        array = given[None] if given.ndim == 3 else given
        if array.ndim == 4 and array.shape[3] == 3:
            return torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2)
    elif isinstance(given, Tensor):
        _check_float(name, given.is_floating_point(), given.dtype)
        tensor = given[None] if given.ndim == 3 else given
        if tensor.ndim == 4 and tensor.shape[1] in (3, latent_channels):
            return tensor.float().cpu()
    raise _no_image(name, given, "a PIL image, an array [H, W, 3] or a tensor [3, H, W]")


def _mask(given: Any) -> Tensor:
    """One mask, or a batch of them: [n, 1, H, W]."""
    if isinstance(given, Image.Image):
        return _of_uint8(np.asarray(given.convert("L"))[..., None])
    if isinstance(given, np.ndarray):
        _check_float("mask_image", given.dtype.kind in "fb", given.dtype)
        array = given[..., 0] if given.ndim > 2 and given.shape[-1] == 1 else given
        given = torch.from_numpy(array.astype(np.float32))
        if given.ndim == 4:
            raise _no_image("mask_image", array, "an array [H, W] or [n, H, W]")
    if isinstance(given, Tensor):
        _check_float("mask_image", given.is_floating_point() or given.dtype == torch.bool, given.dtype)
        tensor = given[None] if given.ndim == 2 else given
        tensor = tensor[:, None] if tensor.ndim == 3 else tensor
        if tensor.ndim == 4 and tensor.shape[1] == 1:
            return tensor.float().cpu()
    raise _no_image("mask_image", given, "a PIL image, or an array or tensor [H, W]")


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    sizes = {tuple(part.shape[1:]) for part in parts}
    if len(sizes) > 1:
        told = ", ".join(sorted(f"{width}x{height}" for *_, height, width in sizes))
        raise RequestError(f"{name}: images of different sizes ({told}); those of one call have one size")
    return torch.cat(list(parts))


def _of_uint8(pixels: np.ndarray) -> Tensor:
    """[..., H, W, C] uint8 -> [n, C, H, W] float32 in [0, 1]."""
    batch = pixels[None] if pixels.ndim == 3 else pixels
    return torch.from_numpy(batch.astype(np.float32) / np.float32(255)).permute(0, 3, 1, 2).contiguous()


def _pixels(name: str, given: bytes, shape: tuple[int, ...]) -> np.ndarray:
    check_bytes(name, given, shape)
    return np.frombuffer(given, np.uint8).reshape(shape)


def _check_float(name: str, is_float: bool, dtype: Any) -> None:
    if not is_float:
        raise RequestError(
            f"{name}: numbers of {dtype}, but arrays and tensors hold floating point numbers in [0, 1]; "
            "divide them, or give a PIL image"
        )


def _check_range(name: str, read: Tensor, lowest: int = 0) -> None:
    low, high = float(read.min()), float(read.max())
    if not (low >= lowest and high <= 1):  # so for NaN, too
        raise RequestError(f"{name}: numbers from {low:g} to {high:g}, but they lie in [{lowest}, 1]")


def _no_image(name: str, given: Any, wanted: str) -> RequestError:
    shape = f" of shape {tuple(given.shape)}" if hasattr(given, "shape") else ""
    return RequestError(f"{name}: {type(given).__name__}{shape} is not {wanted}, or a list of them")
