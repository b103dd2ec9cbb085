"""Pictures by DPM++ SDE, whose noise is a Brownian motion's, beside the stock pipeline's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.schedulers import schedule
from sdfast.validation.drawing import generate
from sdfast.validation.modules import scheduler_error
from sdfast.validation.observe import observed_run
from tests.test_pipeline import assert_same, both, ours, stock

SDE = "DPMSolverSDEScheduler"


@pytest.fixture(scope="module")
def sd(tiny_sd: Path, sd_engine: Path) -> tuple[Any, Pipeline]:
    return stock(tiny_sd), ours(sd_engine)


@pytest.mark.filterwarnings("ignore:Should have t[ab]")  # the stock pipeline's own rounding
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("pictures", [1, 2])
def test_a_seed_in_the_config_gives_the_stock_picture(
    sd: tuple[Any, Pipeline], pictures: int, karras: bool
) -> None:
    """One motion for all pictures of the call, as diffusers has it."""
    overrides = {"noise_sampler_seed": 3, "use_karras_sigmas": karras}
    assert_same(*both(sd, scheduler=SDE, overrides=overrides, num_images_per_prompt=pictures))


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_the_rest_of_the_family_beside_stock(sd: tuple[Any, Pipeline], scheduler: str) -> None:
    assert_same(*both(sd, scheduler=scheduler))


@pytest.mark.filterwarnings("error:Should have t[ab]")
def test_a_picture_has_its_own_motion_by_its_seed(sd: tuple[Any, Pipeline]) -> None:
    """Whatever batch it is in, by seed or by generator; and another seed is another picture."""
    call = {"num_inference_steps": 4, "output_type": "latent", "scheduler": "DPM++ SDE Karras"}
    together = sd[1](["the sea", "a boat"], seed=40, **call).images
    alone = sd[1]("a boat", seed=41, **call).images
    assert_same(alone, together[1:])
    assert torch.equal(sd[1]("a boat", generator=torch.Generator().manual_seed(41), **call).images, alone)
    assert (sd[1]("a boat", seed=42, **call).images - alone).norm() > 0.1 * alone.norm()


def request_of(pipe: Pipeline, *prompts: str, count: int) -> Request:
    model = pipe.engine.manifest.model
    return Request.make(
        prompts=prompts,
        negative_prompts=(None,) * len(prompts),
        height=model.default_height,
        width=model.default_width,
        num_inference_steps=4,
        num_images_per_prompt=count,
        scheduler="DPM++ SDE",
        seed=40,
    )


@pytest.mark.filterwarnings("ignore:Should have t[ab]")
def test_validation_gives_the_stock_pictures_the_same_motions(sd: tuple[Any, Pipeline]) -> None:
    request = request_of(sd[1], "the sea", "a boat", count=2)
    assert_same(generate(sd[0], request, output_type="pt"), sd[1].generate(request, output_type="pt").images)


@pytest.mark.filterwarnings("ignore:Should have t[ab]")
def test_validation_replays_the_same_motion(sd: tuple[Any, Pipeline]) -> None:
    request = request_of(sd[1], "the sea", count=1)
    run = observed_run(sd[0], request)
    plan = schedule(request.scheduler, sd[1].engine.scheduler_config, num_inference_steps=4)
    measured = scheduler_error(request.scheduler, plan, [run])
    assert measured.error.relative_l2 < 1e-4
