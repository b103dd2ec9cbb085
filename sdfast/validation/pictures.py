"""Whole pictures: the engine's way from prompt to picture beside the stock pipeline's, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdfast.call import Given
from sdfast.errors import BackendError, NumericalError
from sdfast.first_latents import Over
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.validation.metrics import relative_l2
from sdfast.validation.observe import Run, observed_run
from sdfast.validation.reference import DrawnInFloat32


@dataclass(frozen=True)
class Drawn:
    """Pictures of one engine run: [n, 3, H, W] in [0, 1], and the latents after each step, [n, C, h, w]."""

    images: Tensor
    latents: list[Tensor]


@dataclass(frozen=True)
class Picture:
    """One picture by the engine, by the float32 stock pipeline, and by that in the engine's own dtype.

    over: what it was drawn over. control: of an engine with N ControlNets, their images, [1, N 3, H, W].
    seen: of one with IP-Adapters theirs, see `sdfast.ip_adapter.read_images`.
    """

    request: Request
    truth: Run
    same: Run | None
    engine: Drawn
    over: Over | None = None
    control: Tensor | None = None
    seen: Tensor | None = None

    @property
    def told(self) -> tuple[Over | None, Tensor | None, Tensor | None]:
        """What it was drawn with, as `draw` takes it."""
        return self.over, self.control, self.seen

    @property
    def image(self) -> Tensor:
        """The engine's, [3, H, W]."""
        return self.engine.images[0]

    @property
    def drift(self) -> list[float]:
        """Relative L2 of the engine's latents after each step."""
        return _drift(self.engine.latents, self.truth)

    @property
    def stock_drift(self) -> list[float]:
        """The same of the stock pipeline in the engine's dtype; empty in float32."""
        return _drift(self.same.latents, self.truth) if self.same else []


@dataclass(frozen=True)
class Repetition:
    """What must not change a picture.

    repeated: the same request again gave the same bytes. batched: the pictures of one request for all prompts
    and those of a request for each, as (of the batch, alone) pairs [3, H, W].
    """

    repeated: bool
    batched: list[tuple[Tensor, Tensor]]


def draw(
    pipe: Pipeline,
    request: Request,
    over: Over | None = None,
    control: Tensor | None = None,
    seen: Tensor | None = None,
) -> Drawn:
    """Run the engine. A picture that it refuses to make, being no number, is a picture of NaN."""
    latents: list[Tensor] = []

    def keep(_pipe: Any, _k: int, _t: float, tensors: dict[str, Tensor]) -> None:
        latents.append(tensors["latents"].float().cpu().clone())

    try:
        given = Given(over=over, control=control, ip_adapter_images=seen)
        images = pipe.generate(request, given, "pt", keep).images.cpu()
    except NumericalError:
        images = torch.full((request.images, 3, request.height, request.width), torch.nan)
    return Drawn(images, latents)


def compare_picture(
    pipe: Pipeline,
    exact: Any,
    same: Any | None,
    request: Request,
    wanted: Sequence[int] = (),
    over: Over | None = None,
    control: Tensor | None = None,
    seen: Tensor | None = None,
) -> Picture:
    """One picture on all sides, if `over` is given over that, if `control` is given under its guidance, and
    if `seen` is given like that.

    wanted: steps whose U-Net inputs the float32 run keeps.
    """
    told = over, control, seen
    truth = observed_run(exact, request, wanted, *told)
    reduced = _reduced_run(same, request, *told)
    return Picture(request, truth, reduced, draw(pipe, request, *told), *told)


def _reduced_run(
    same: Any | None,
    request: Request,
    over: Over | None,
    control: Tensor | None,
    seen: Tensor | None,
) -> Run | None:
    if same is None:
        return None
    try:
        with DrawnInFloat32():
            return observed_run(same, request, over=over, control=control, seen=seen)
    except RuntimeError as error:  # torch has no type for an operation that a device lacks in float16
        raise BackendError(
            f"stock diffusers does not run in float16 on {same.device} ({str(error).splitlines()[0]}), so an "
            "fp16 engine has no bar to meet here; validate it where float16 runs, such as --device cuda"
        ) from error


def repeat(pipe: Pipeline, pictures: Sequence[Picture]) -> Repetition:
    """Draw again what was drawn: once the same, once all in one request.

    All of one scheduler and seed, and over the same image and under the same control image, if any.
    """
    first, images = pictures[0].request, pictures[0].told
    prompts = tuple(picture.request.prompts[0] for picture in pictures)
    negatives = tuple(picture.request.negative_prompts[0] for picture in pictures)
    whole = first.model_copy(update={"prompts": prompts, "negative_prompts": negatives})
    batch = draw(pipe, whole, *images).images
    return Repetition(
        repeated=torch.equal(draw(pipe, first, *images).images, pictures[0].engine.images),
        batched=[(image, picture.image) for image, picture in zip(batch, pictures, strict=True)],
    )


def _drift(latents: Sequence[Tensor], truth: Run) -> list[float]:
    """Step for step as far as both go: another scheduler may take fewer evaluations."""
    return [relative_l2(given[:1], expected) for given, expected in zip(latents, truth.latents, strict=False)]
