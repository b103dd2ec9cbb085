"""Two pipelines that share the denoising of a picture, such as SDXL's base and its refiner."""

from dataclasses import dataclass, replace

from torch import Tensor

from sdfast.call import Given, PipelineOutput
from sdfast.experts import SWITCH_AT, check_alike, halves
from sdfast.first_latents import Over
from sdfast.noise import generator
from sdfast.pipeline import Pipeline
from sdfast.request import Request


@dataclass(frozen=True)
class Ensemble:
    """A pipeline that begins pictures, and one that finishes them from the share `switch_at` on."""

    base: Pipeline
    refiner: Pipeline
    switch_at: float = SWITCH_AT

    def generate(
        self,
        request: Request,
        over: Over | None = None,
        control: Tensor | None = None,
        output_type: str = "pil",
        ip_adapter_images: Tensor | None = None,
    ) -> PipelineOutput:
        """Draw what `request` asks for. Each picture has one generator from its first noise to its last.

        over: what it is drawn over; control: the control images of a base with a ControlNet;
        ip_adapter_images: the images of one with IP-Adapters. The refiner is told of neither. Raises
        `RequestError` for what either of the two cannot do.
        """
        begun, finished = halves(request, self.switch_at, self.refiner.engine.manifest.model)
        check_alike(self.base.engine.manifest.model, self.refiner.engine.manifest.model)
        self.refiner.engine.check_size(finished.height, finished.width)
        source = [generator(seed) for seed in request.seeds]
        part = over if over is None else replace(over, area=None)  # which has to be finished to be pasted
        given = Given(source, over=part, control=control, ip_adapter_images=ip_adapter_images, seeded=True)
        left = self.base.generate(begun, given, "latent")
        finishing = Over(left.images) if over is None else replace(over, image=left.images)
        given = Given(source, over=finishing, seeded=True)
        images = self.refiner.generate(finished, given, output_type).images
        return PipelineOutput(
            images, request.seeds, left.truncated, variation_seeds=request.variation_seeds or None
        )
