"""Pictures under the guidance of a control image, beside stock diffusers' ControlNet pipelines."""

import hashlib
import shutil
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sdfast import drop_in
from sdfast.arithmetic import DeviceArithmetic
from sdfast.call import Given
from sdfast.control import scales
from sdfast.errors import ExportError, RequestError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.images import read_controls
from sdfast.loop import Rows
from sdfast.manifest import AddedControlNet, Model, read_manifest
from sdfast.masked_area import MaskedArea
from sdfast.pipeline import Pipeline
from sdfast.request import Request
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Done, Event, Failed, Job
from sdfast.server.studio import controlnet_name, info_of
from sdfast.server.worker.opening import warm_up
from sdfast.validation import validate
from tests import checkpoints
from tests.conftest import FLAT_SIZES
from tests.fakes import FakeEngine
from tests.test_image_to_image import assert_same_pictures, image, mask, spot
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

STEPS = 4
SIDE = 64


def stock(checkpoint: Path, controlnets: Path | list[Path], kind: str) -> Any:
    """diffusers' pipeline of that name."""
    without = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None}
    several = controlnets if isinstance(controlnets, list) else [controlnets]
    networks = [diffusers.ControlNetModel.from_pretrained(one) for one in several]
    pipe = getattr(diffusers, kind).from_pretrained(
        checkpoint,
        controlnet=networks if len(networks) > 1 else networks[0],
        local_files_only=True,
        **without,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def over(pipe: Any, task: str) -> Any:
    """The pipeline that draws over an image, on the networks of `pipe`."""
    kind = type(pipe).__name__.replace("ControlNet", f"ControlNet{task}")
    made = getattr(diffusers, kind).from_pipe(pipe, torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


Pair = tuple[Any, Pipeline]


@pytest.fixture(scope="module")
def sd(tiny_sd: Path, tiny_controlnet: Path, controlled_engine: Path) -> Pair:
    return stock(tiny_sd, tiny_controlnet, "StableDiffusionControlNetPipeline"), ours(controlled_engine)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One that reads blue first, and is less deep than the U-Net."""
    place = tmp_path_factory.mktemp("controlled")
    controlnet = checkpoints.build_controlnet(
        place / "controlnet",
        tiny_sdxl,
        transformer_layers_per_block=[1, 1],
        controlnet_conditioning_channel_order="bgr",
    )
    engine = export(tiny_sdxl, place / "engine", Recipe.make(backend="eager", controlnet=controlnet))
    return stock(tiny_sdxl, controlnet, "StableDiffusionXLControlNetPipeline"), ours(engine)


def both(pair: Pair, seeds: tuple[int, ...] = (0,), output_type: str = "latent", **call: Any) -> Any:
    """The images of the same call, by stock diffusers and by sdfast."""
    reference, pipe = pair
    scheduler = call.pop("scheduler", "DDIMScheduler")
    chosen = getattr(diffusers, scheduler).from_config(pipe.engine.scheduler_config)
    reference.scheduler = pipe.scheduler = chosen
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": output_type, **call}
    named = call if "image" in call else {**call, "image": call["control_image"]}
    named = {k: v for k, v in named.items() if "image" in call or k != "control_image"}
    return (
        reference(**named, generator=seeded(*seeds)).images,
        pipe(**call, generator=seeded(*seeds)).images,
    )


CALLS: dict[str, dict[str, Any]] = {
    "one picture": {},
    "a scale": {"controlnet_conditioning_scale": 0.6},
    "in the middle of the run": {"control_guidance_start": 0.2, "control_guidance_end": 0.75},
    "no guidance": {"guidance_scale": 1.0},
    "an image each": {
        "prompt": ["a boat", "the sea"],
        "control_image": [image(1), image(2)],
        "controlnet_conditioning_scale": 1.4,
    },
    "guess mode": {"guess_mode": True, "controlnet_conditioning_scale": 0.9, "control_guidance_end": 0.75},
    "guess mode without guidance": {"guess_mode": True, "guidance_scale": 1.0},
    "two evaluations a step": {"scheduler": "HeunDiscreteScheduler", "control_guidance_end": 0.6},
    "noise at each step": {"scheduler": "EulerAncestralDiscreteScheduler", "num_images_per_prompt": 2},
    "a tensor with places to be drawn anew": {
        "control_image": read_controls(image()).masked_fill(torch.ones(64, 64).triu() > 0, -1.0)
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_equals_stock_diffusers(sd: Pair, call: str) -> None:
    assert_same(*both(sd, **{"control_image": image(), **CALLS[call]}))


@pytest.mark.parametrize("call", ["a scale", "an image each", "guess mode"])
def test_sdxl_equals_stock_diffusers(sdxl: Pair, call: str) -> None:
    assert_same(*both(sdxl, **{"control_image": image(), "guidance_scale": 4.0, **CALLS[call]}))


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_over_an_image_equals_stock_diffusers(
    request: pytest.FixtureRequest, family: str, task: str, guess: bool
) -> None:
    reference, pipe = request.getfixturevalue(family)
    masked = {"mask_image": mask(), "height": SIDE, "width": SIDE} if task == "Inpaint" else {}
    call = {
        **{"image": image(1), "control_image": image(2), "strength": 0.6, "num_inference_steps": 5},
        **{"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.7, "guidance_scale": 4.0},
        "guess_mode": guess,
    }
    scheduler = "EulerAncestralDiscreteScheduler"
    assert_same(*both((over(reference, task), pipe), scheduler=scheduler, **call, **masked))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_part_of_an_image_equals_stock_diffusers(request: pytest.FixtureRequest, family: str) -> None:
    """By the drop-in, at the size that is theirs: the image's, in whole latents. The control image is cut out
    with it; a tensor, which diffusers does not take there, is one of the part."""
    reference, pipe = request.getfixturevalue(family)
    theirs = over(reference, "Inpaint")
    own = getattr(drop_in, type(theirs).__name__)(pipe.engine)
    own.set_progress_bar_config(disable=True)
    whole, hole = image(1, 70, 66), spot(70, 66, (20, 10, 50, 40))
    call = {
        **{"image": whole, "mask_image": hole, "padding_mask_crop": 4, "output_type": "pil"},
        **{"strength": 0.6, "num_inference_steps": 5, "guidance_scale": 4.0},
    }
    expected, drawn = both((theirs, own), **call, control_image=image(2, 70, 66))
    assert drawn[0].size == (70, 66)
    assert_same_pictures(expected, drawn)
    area = MaskedArea.make(whole, hole, padding_mask_crop=4, height=SIDE, width=SIDE)
    part = read_controls(area.cut(image(2, 70, 66)))
    again = own(PROMPT, **call, control_image=part, generator=seeded(0)).images
    other = own(PROMPT, **call, control_image=read_controls(image(2)), generator=seeded(0)).images
    assert_same_pictures(drawn, again)
    assert np.abs(np.asarray(drawn[0], int) - np.asarray(other[0], int)).max() > 1
    larger = {"image": image(1, 150, 137), "mask_image": spot(150, 137, (20, 10, 50, 40))}
    with pytest.raises(RequestError, match=r"^size 144x136 is not one of this engine's"):
        own(PROMPT, **call | larger, control_image=image(2, 150, 137))
    with pytest.raises(RequestError, match=r"^control_image: 64x64, but the image is 70x66"):
        own(PROMPT, **call, control_image=image(2))


def test_an_onnx_engine_equals_stock_diffusers(flat_sd: Path, flat_onnx: Path, tmp_path: Path) -> None:
    """Made of one without: what a ControlNet does not change is kept. Its ControlNet pools."""
    small = checkpoints.build_controlnet(
        tmp_path / "controlnet",
        flat_sd,
        conditioning_embedding_out_channels=(4, 16),
        global_pool_conditions=True,
    )
    engine = shutil.copytree(flat_onnx, tmp_path / "engine")
    pipe = ours(export(flat_sd, engine, Recipe.make(sizes=FLAT_SIZES, batch=2, controlnet=small)))
    told = {name: module.fingerprint for name, module in pipe.engine.manifest.modules.items()}
    before = {name: module.fingerprint for name, module in read_manifest(flat_onnx).modules.items()}
    changed = {name for name in told if told[name] != before.get(name)}
    assert changed == {"unet", "time_shift", "context", "control_embedding"}
    call = {"control_image": image().resize((16, 16)), "controlnet_conditioning_scale": 0.6}
    reference = stock(flat_sd, small, "StableDiffusionControlNetPipeline")
    expected, drawn = both((reference, pipe), **call, num_images_per_prompt=2, output_type="pt")
    assert 10 * torch.log10(1 / (expected - drawn).square().mean()) > 100


def request_of(**fields: Any) -> Request:
    usual = {
        **{"prompts": (PROMPT,), "negative_prompts": (None,), "height": SIDE, "width": SIDE, "seed": 1},
        **{"num_inference_steps": 3, "scheduler": "euler", "controlnet_conditioning_scale": 1.0},
    }
    return Request.make(**{**usual, **fields})


@pytest.mark.parametrize("arithmetic", [None, DeviceArithmetic])
def test_rows_of_different_scales_and_images_share_a_batch(sd: Pair, arithmetic: Any) -> None:
    pipe = sd[1]
    asked = [
        (request_of(controlnet_conditioning_scale=0.4, seed=2, num_inference_steps=4), image(3)),
        (request_of(control_guidance_start=0.5, guidance_scale=1.0), image(4)),
        (request_of(control_guidance_end=0.4), image(5)),
    ]
    given = [Given(control=read_controls(one)) for _, one in asked]
    alone = [pipe.generate(r, g, "latent").images[0] for (r, _), g in zip(asked, given, strict=True)]
    prepared = [pipe.prepare(r, g) for (r, _), g in zip(asked, given, strict=True)]
    rows = Rows(pipe.engine, [row for one in prepared for row in one.rows], SIDE, SIDE, arithmetic)
    while rows.active:
        rows.tick()
    for expected, got in zip(alone, rows.latents, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (alone[1] - alone[2]).norm() > 0.05 * alone[1].norm()


def model_of(count: int = 1, layers: int = 1, pooling: tuple[int, ...] = ()) -> Model:
    fields = {"controlnets": count, "control_layers": layers, "pooling_controlnets": pooling}
    return FakeEngine(controlnets=count).manifest.model.model_copy(update=fields)


def test_nothing_is_added_outside_of_the_steps_asked_for() -> None:
    one, two = model_of(), model_of(2)
    assert scales(request_of(), 3, one) == [(1.0,), (1.0,), (1.0,)]
    asked = request_of(
        controlnet_conditioning_scale=0.5, control_guidance_start=0.25, control_guidance_end=0.75
    )
    assert scales(asked, 4, one) == [(0.0,), (0.5,), (0.5,), (0.0,)]
    assert scales(asked, 3, one) == [(0.0,), (0.5,), (0.0,)]
    each = request_of(controlnet_conditioning_scale=[0.5, 2.0], control_guidance_end=[1.0, 0.5])
    assert scales(each, 2, two) == [(0.5, 2.0), (0.5, 0.0)]
    assert scales(asked, 4, two)[1] == (0.5, 0.5)


SOFT = [0.825**n for n in range(12, -1, -1)]  # as sd-webui-controlnet has it, of SD's 13 layers
FALLING = [10 ** (n / 12 - 1) for n in range(13)]  # as diffusers has it
NOTHING, WHOLE = [0.0] * 13, [1.0] * 13
MODES: dict[str, tuple[dict[str, Any], tuple[int, ...], list[float], list[float]]] = {
    "by default": ({}, (), WHOLE, WHOLE),
    "balanced": ({"control_mode": "balanced"}, (), WHOLE, WHOLE),
    "prompt": ({"control_mode": "prompt"}, (), SOFT, SOFT),
    "control": ({"control_mode": "control"}, (), SOFT, NOTHING),
    "guess": ({"control_mode": "guess"}, (), FALLING, NOTHING),
    "pools, by default": ({}, (0,), WHOLE, NOTHING),
    "pools, balanced": ({"control_mode": "balanced"}, (0,), WHOLE, NOTHING),
    "pools, prompt": ({"control_mode": "prompt"}, (0,), SOFT, NOTHING),
    "pools, guess": ({"control_mode": "guess"}, (0,), WHOLE, NOTHING),
    "by layer": ({"control_layer_scales": [FALLING]}, (), FALLING, FALLING),
    "by layer, control": (
        {"control_layer_scales": [FALLING], "control_mode": "control"},
        *((), FALLING, NOTHING),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_deals_the_scale_out(mode: str) -> None:
    fields, pooling, told, told_away = MODES[mode]
    asked, model = request_of(controlnet_conditioning_scale=0.5, **fields), model_of(1, 13, pooling)
    for expected, away in ((told, False), (told_away, True)):
        [found] = scales(asked, 1, model, away=away)
        assert found == pytest.approx([0.5 * share for share in expected], rel=1e-6)


def test_modes_are_each_controlnets_own() -> None:
    asked = request_of(control_mode=["control", "balanced"], control_layer_scales=[None, [0.25, 0.5]])
    [found] = scales(asked, 1, model_of(2, 2))
    assert found == pytest.approx([0.825**12, 0.825**11, 0.25, 0.5])
    assert scales(asked, 1, model_of(2, 2), away=True) == [(0.0, 0.0, 0.25, 0.5)]


def test_sdxls_ten_layers_are_the_first_of_sds_thirteen() -> None:
    [found] = scales(request_of(control_mode="prompt"), 1, model_of(1, 10))
    assert found == pytest.approx(SOFT[:10])


def test_of_several_the_first_that_pools_has_all_guess_as_in_diffusers() -> None:
    asked = request_of()
    assert scales(asked, 1, model_of(2, 2, (0,)), away=True) == [(0.0,) * 4]
    assert scales(asked, 1, model_of(2, 2, (0,))) == [pytest.approx((1.0, 1.0, 0.1, 1.0))]
    assert scales(asked, 1, model_of(2, 2, (1,)), away=True) == [(1.0,) * 4]


@pytest.mark.parametrize(("mode", "for_both"), [("prompt", True), ("control", False)])
def test_a_mode_is_what_stock_draws_with_its_residuals_scaled_so(
    sd: Pair, monkeypatch: pytest.MonkeyPatch, mode: str, for_both: bool
) -> None:
    reference, pipe = sd
    network = reference.controlnet

    def scaled(*args: Any, **given: Any) -> Any:
        down, mid = type(network).forward(network, *args, **given)
        parts = [part * 0.825 ** (12 - layer) for layer, part in enumerate([*down, mid])]
        if not for_both:
            for part in parts:
                part[: len(part) // 2] = 0
        return parts[:-1], parts[-1]

    monkeypatch.setattr(network, "forward", scaled)
    expected, _ = both(sd, control_image=image(), controlnet_conditioning_scale=1.5)
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent"}
    call |= {"control_image": image(), "controlnet_conditioning_scale": 1.5}
    drawn = pipe(**call, control_mode=mode, generator=seeded(0)).images
    assert_same(expected, drawn)
    layers = [0.825 ** (12 - layer) for layer in range(pipe.engine.manifest.model.control_layers)]
    rest = {"control_mode": "balanced" if for_both else "control", "control_layer_scales": layers}
    assert_same(expected, pipe(**call, **rest, generator=seeded(0)).images)
    assert (drawn - pipe(**call, generator=seeded(0)).images).norm() > 0.01 * drawn.norm()


@pytest.fixture(scope="module")
def pooling(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("pooling")
    net = checkpoints.build_controlnet(place / "shuffle", tiny_sd, global_pool_conditions=True)
    engine = export(tiny_sd, place / "engine", Recipe.make(backend="eager", controlnet=net))
    return stock(tiny_sd, net, "StableDiffusionControlNetPipeline"), ours(engine)


@pytest.mark.parametrize("call", ["one picture", "a scale", "no guidance", "an image each", "guess mode"])
def test_one_that_pools_equals_stock_diffusers(pooling: Pair, call: str) -> None:
    assert_same(*both(pooling, **{"control_image": image(), **CALLS[call]}))


def test_one_that_pools_is_validated(pooling: Pair) -> None:
    report = validate(pooling[1].engine, prompts=["a boat"], steps=3)
    assert report.passed, report.table()
    assert {module.name: module.worst for module in report.modules}["control_scale"] == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no control image": ({"control_image": None}, "^control_image: is missing; this engine has a ControlNet"),
    "a scale alone": (
        {"control_image": None, "controlnet_conditioning_scale": 0.5},
        "^control_image: is missing",
    ),
    "another size": (
        {"control_image": image(0, 72, 64), "height": SIDE, "width": SIDE},
        "^control_image: 72x64, but the picture is 64x64",
    ),
    "too many": ({"control_image": [image()] * 3}, "^control_image: 3 for 1 pictures"),
    "too large a number": (
        {"control_image": torch.full((3, SIDE, SIDE), 2.0)},
        r"^control_image: numbers from 2 to 2, but they lie in \[-1, 1\]",
    ),
    "whole numbers": (
        {"control_image": torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)},
        "^control_image: numbers of torch.uint8",
    ),
    "latents": ({"control_image": torch.zeros(4, 8, 8)}, r"^control_image: Tensor of shape \(4, 8, 8\)"),
    "a negative scale": ({"controlnet_conditioning_scale": -0.1}, "^controlnet_conditioning_scale: must be"),
    "no steps": (
        {"control_guidance_start": 0.5, "control_guidance_end": 0.5},
        r"^control_guidance_start: 0\.5 is not below control_guidance_end, 0\.5",
    ),
    "guess mode that is none": ({"guess_mode": 1}, r"^guess_mode: must be True or False \(got 1\)"),
    "guess mode and another": (
        {"guess_mode": True, "control_mode": "prompt"},
        "^guess_mode: is a control_mode, and another is given",
    ),
    "a mode that there is not": ({"control_mode": "strong"}, "^control_mode: must be 'balanced', 'prompt'"),
    "a mode for two": (
        {"control_mode": ["prompt", "control"]},
        "^control_mode: 2 numbers, but this engine has one ControlNet",
    ),
    "a layer too few": (
        {"control_layer_scales": [1.0] * 6},
        r"^control_layer_scales: 6 numbers, but a ControlNet of this engine adds to \d+ layers",
    ),
    "a mode without an image": (
        {"control_image": None, "control_mode": "prompt"},
        "^control_mode: is for a control image; give one",
    ),
    "guess mode without an image": ({"control_image": None, "guess_mode": True}, "^control_mode: is for a"),
    "layers without an image": (
        {"control_image": None, "control_layer_scales": [1.0]},
        "^control_layer_scales: is for a control image",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_by_name(sd: Pair, case: str) -> None:
    fields, message = BAD[case]
    call = {"control_image": image(), "num_inference_steps": 4, "scheduler": "ddim", **fields}
    with pytest.raises(RequestError, match=message):
        sd[1](PROMPT, **call)


def test_an_engine_without_a_controlnet_takes_no_control_image() -> None:
    pipe = Pipeline(FakeEngine())
    with pytest.raises(RequestError, match=r"has no ControlNet; leave it out, or export .* --controlnet"):
        pipe("a", control_image=image(0, 16, 16))
    with pytest.raises(RequestError, match="controlnet_conditioning_scale and a control image go together"):
        pipe("a", controlnet_conditioning_scale=0.5)
    with pytest.raises(RequestError, match="and control_guidance_end are for a control image"):
        pipe("a", control_guidance_end=0.5)
    pipe("a", guess_mode=False, num_inference_steps=1)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_drop_in_draws_what_diffusers_class_draws(request: pytest.FixtureRequest, family: str) -> None:
    """By places alone, most of them at diffusers' defaults."""
    reference, pipe = request.getfixturevalue(family)
    kind = type(reference).__name__
    own = getattr(drop_in, kind)(pipe.engine)
    own.set_progress_bar_config(disable=True)
    reference.scheduler = own.scheduler = diffusers.DDIMScheduler.from_config(pipe.engine.scheduler_config)
    args = (PROMPT, *[None] * (family == "sdxl"), image(), None, None, 3)
    results = [call(*args, generator=seeded(1), output_type="latent").images for call in (reference, own)]
    assert_same(*results)
    with pytest.raises(RequestError, match=f"image: is missing; {kind} draws under the guidance"):
        own(PROMPT)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_a_drop_in_over_an_image_draws_what_diffusers_class_draws(
    request: pytest.FixtureRequest, family: str, task: str
) -> None:
    """By places alone, the strength and the scale at the defaults of diffusers' class."""
    pair = request.getfixturevalue(family)
    reference = over(pair[0], task)
    kind = type(reference).__name__
    own = getattr(drop_in, kind)(pair[1].engine)
    own.set_progress_bar_config(disable=True)
    reference.scheduler = own.scheduler = diffusers.DDIMScheduler.from_config(own.engine.scheduler_config)
    images = (image(1), *[mask()] * (task == "Inpaint"), image(2))
    args = (PROMPT, *[None] * (family == "sdxl"), *images)
    call = {"num_inference_steps": 3, "output_type": "latent"}
    assert_same(*[drawn(*args, **call, generator=seeded(1)).images for drawn in (reference, own)])
    with pytest.raises(RequestError, match=f"control_image: is missing; {kind} draws over an image under"):
        own(*args[:-1])


def test_from_pretrained_takes_the_source_of_a_controlnet(
    tiny_sd: Path, tiny_controlnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd: Pair
) -> None:
    monkeypatch.setenv("SDFAST_CACHE", str(tmp_path))
    pipe = Pipeline.from_pretrained(tiny_sd, backend="eager", controlnet={"source": tiny_controlnet})
    assert pipe.engine.manifest.checkpoint.controlnets == sd[1].engine.manifest.checkpoint.controlnets
    with pytest.raises(
        ExportError, match="controlnet: must be a folder, a file or a Hub id, or a table of source"
    ):
        Pipeline.from_pretrained(tiny_sd, backend="eager", controlnet=sd[0].controlnet)


def test_a_server_knows_a_controlnet_by_name(sd: Pair, sd_engine: Path, tiny_controlnet: Path) -> None:
    weights = (tiny_controlnet / "diffusion_pytorch_model.safetensors").read_bytes()
    known = info_of(sd[1].engine.manifest)
    assert known.controlnets == (f"{tiny_controlnet.name} [{hashlib.sha256(weights).hexdigest()[:8]}]",)
    file = AddedControlNet(source="nets/canny_v1.1.safetensors", weights={"canny_v1.1.safetensors": "a" * 64})
    assert controlnet_name(file) == "canny_v1.1 [aaaaaaaa]"
    plain = info_of(read_manifest(sd_engine))
    assert plain.controlnets == ()
    assert (known.controlled, plain.controlled) == (True, False)


def test_a_server_draws_the_pipelines_picture(sd: Pair) -> None:
    """Its engine is warmed up before."""
    warm_up(sd[1].engine)
    batcher, ended = Batcher(sd[1].engine), SimpleQueue[Done | Failed]()

    def listen(event: Event) -> None:
        if isinstance(event, Done | Failed):
            ended.put(event)

    asked = request_of(controlnet_conditioning_scale=0.7, control_guidance_end=0.7)
    batcher.submit(Job("1", "engine", asked, control=image(3).tobytes()), listen)
    end = ended.get(timeout=20)
    assert isinstance(end, Done), end
    [drawn] = sd[1].generate(asked, Given(control=read_controls(image(3)))).images
    assert Image.open(BytesIO(end.pngs[0])).tobytes() == drawn.tobytes()
    assert batcher.close(timeout=20)
