"""The control images of a request, and those of IP-Adapters: whether they suit the engine, and opened."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from PIL import Image

from sdfast.masked_area import MaskedArea
from sdfast.server.jobs import EngineInfo
from sdfast.server.openai.fields import CONTROL_IMAGE, IP_ADAPTER_IMAGE
from sdfast.server.problems import Problem
from sdfast.server.uploads import pixels, seen, sized

T = TypeVar("T")


def check_control(
    engine: EngineInfo, engines: Mapping[str, EngineInfo], images: Sequence[object | None]
) -> None:
    """Raises `Problem`; before an image is opened. images: for each ControlNet what was sent, None for one
    that is to add nothing."""
    count = len(engine.controlnets)
    if count and not any(images):
        raise Problem(
            422,
            f"{CONTROL_IMAGE}: is missing; {engine.name} has a ControlNet, which draws every picture under "
            "the guidance of one",
            param=CONTROL_IMAGE,
            code="missing_field",
        )
    if images and not count:
        able = ", ".join(name for name, info in engines.items() if info.controlled) or "none"
        raise Problem(
            422,
            f"{CONTROL_IMAGE}: {engine.name} has no ControlNet; leave it out, or ask an engine that has one; "
            f"here have: {able}",
            param=CONTROL_IMAGE,
            code="unsupported_model",
        )
    if len(images) != count:
        has = "one ControlNet" if count == 1 else f"{count} ControlNets, and needs an image for each"
        raise Problem(
            422,
            f"{CONTROL_IMAGE}: {len(images)} were sent, but {engine.name} has {has}: "
            f"{', '.join(engine.controlnets)}",
            param=CONTROL_IMAGE,
        )


def controls_of(
    images: Sequence[T | None],
    decoded: Callable[[T], Image.Image],
    height: int,
    width: int,
    area: MaskedArea | None = None,
) -> bytes | None:
    """`Job.control`: the images, resampled where they have another size, black where there is none.

    area: of an image the part that is drawn, which is cut out of control images of the image's size, too.
    Takes processor time. Raises `Problem` for what is no image.
    """
    if not images:
        return None

    def drawn(image: Image.Image) -> bytes:
        if area is None:
            return pixels(image, height, width)
        return area.cut(sized(image, area.image.height, area.image.width)).tobytes()

    black = bytes(height * width * 3)
    return b"".join(drawn(decoded(one)) if one else black for one in images)


def check_ip_adapter(
    engine: EngineInfo, engines: Mapping[str, EngineInfo], images: Sequence[object | None]
) -> None:
    """The same of IP-Adapters' images, without which an engine that has some draws, too."""
    count = len(engine.ip_adapters)
    if not images:
        return
    if not count:
        able = ", ".join(name for name, info in engines.items() if info.ip_adapters) or "none"
        raise Problem(
            422,
            f"{IP_ADAPTER_IMAGE}: {engine.name} has no IP-Adapter; leave it out, or ask an engine that has "
            f"one; here have: {able}",
            param=IP_ADAPTER_IMAGE,
            code="unsupported_model",
        )
    if len(images) != count or not any(images):
        has = "one IP-Adapter" if count == 1 else f"{count} IP-Adapters, and takes an image for each"
        raise Problem(
            422,
            f"{IP_ADAPTER_IMAGE}: {sum(map(bool, images))} were sent, but {engine.name} has {has}: "
            f"{', '.join(engine.ip_adapters)}",
            param=IP_ADAPTER_IMAGE,
        )


def seen_of(
    images: Sequence[T | None], decoded: Callable[[T], Image.Image], engine: EngineInfo
) -> bytes | None:
    """`Job.ip_adapter`: the images, made ready for the engine's image encoder, black where there is none.

    Takes processor time. Raises `Problem` for what is no image.
    """
    processor = engine.image_processor
    if not images or processor is None:
        return None
    black = bytes(processor.crop**2 * 3)
    return b"".join(seen(decoded(one), processor, IP_ADAPTER_IMAGE) if one else black for one in images)
