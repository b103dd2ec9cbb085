"""IP-Adapters beside stock diffusers, which loads the same files by code of its own."""

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
from click.testing import CliRunner
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from sdfast import Pipeline, StableDiffusionPipeline
from sdfast.arithmetic.device import DeviceArithmetic
from sdfast.arithmetic.host import HostArithmetic
from sdfast.call import Given
from sdfast.cli import main
from sdfast.ensemble import Ensemble
from sdfast.errors import RequestError
from sdfast.export.build import export
from sdfast.export.recipe import Recipe
from sdfast.image_processor import prepared
from sdfast.ip_adapter import pixel_values, pixels_of, read_images
from sdfast.loop import Rows
from sdfast.manifest import ImageProcessor, read_manifest
from sdfast.request import Request
from sdfast.server.batcher import Batcher
from sdfast.server.jobs import Done, Event, Failed, Job
from sdfast.server.studio import info_of
from sdfast.server.worker.opening import warm_up
from tests import checkpoints
from tests.conftest import FLAT_SIZES
from tests.fakes import FakeEngine
from tests.test_image_to_image import image, mask
from tests.test_pipeline import PROMPT, assert_same, ours, seeded

FORMS = ("plain", "plus", "full")
STEPS = 3
SIDE = 64
Pair = tuple[Any, Pipeline]


def with_adapters(pipe: Any, files: list[Path]) -> Any:
    """A stock pipeline that has loaded them."""
    encoder = files[0].parent / "image_encoder"
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder),
        feature_extractor=CLIPImageProcessor(size=30, crop_size=30),
    )
    names = [file.name for file in files]
    pipe.load_ip_adapter(str(files[0].parent), subfolder="", weight_name=names, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(checkpoint: Path, files: list[Path], kind: str, **options: Any) -> Any:
    """diffusers' pipeline of that name."""
    without = {"add_watermarker": False} if "XL" in kind else {"safety_checker": None}
    loaded = getattr(diffusers, kind).from_pretrained(checkpoint, local_files_only=True, **without, **options)
    return with_adapters(loaded, files)


def files_for(checkpoint: Path, place: Path, forms: tuple[str, ...] = FORMS) -> list[Path]:
    """Files of adapters for a checkpoint, in one folder with the image encoder that they read."""
    encoder = checkpoints.build_image_encoder(place / "image_encoder")
    return [
        checkpoints.build_ip_adapter(place / f"{form}.safetensors", checkpoint, form, seed=i, encoder=encoder)
        for i, form in enumerate(forms)
    ]


@pytest.fixture(scope="module")
def files(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return files_for(tiny_sd, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def sd(tiny_sd: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With an adapter of each form."""
    recipe = Recipe.make(backend="eager", ip_adapters=files)
    engine = export(tiny_sd, tmp_path_factory.mktemp("adapted") / "engine", recipe)
    return stock(tiny_sd, files, "StableDiffusionPipeline"), ours(engine)


def both(pair: Pair, output_type: str = "latent", **call: Any) -> Any:
    """The images of the same call, by stock diffusers and by sdfast. An adapter whose image is None counts
    for nothing with stock."""
    reference, pipe = pair
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.engine.scheduler_config)
    reference.scheduler = diffusers.DDIMScheduler.from_config(pipe.engine.scheduler_config)
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": output_type, **call}
    seen, scale = call["ip_adapter_image"], call.pop("ip_adapter_scale", 1.0)
    scales = scale if isinstance(scale, list) else [scale] * len(seen)
    reference.set_ip_adapter_scale([0.0 if a is None else s for a, s in zip(seen, scales, strict=True)])
    theirs = {**call, "ip_adapter_image": [one or image() for one in seen]}
    return (
        reference(**theirs, generator=seeded(0)).images,
        pipe(**call, ip_adapter_scale=scale, generator=seeded(0)).images,
    )


SEEN = image(3, 80, 52)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"ip_adapter_image": [SEEN, None, None]},
    "plus": {"ip_adapter_image": [None, SEEN, None]},
    "full": {"ip_adapter_image": [None, None, SEEN]},
    "all, each its scale": {
        "ip_adapter_image": [SEEN, image(4), image(5)],
        "ip_adapter_scale": [0.4, 1, 0.7],
    },
    "by layers": {
        "ip_adapter_image": [SEEN, image(4), None],
        "ip_adapter_scale": [{"up": {"block_0": [0.0, 1.0]}}, {"down": 0.5, "mid": 0.25}, 1.0],
    },
    "no guidance": {"ip_adapter_image": [SEEN, SEEN, None], "guidance_scale": 1.0},
    "several pictures": {
        "ip_adapter_image": [SEEN, None, None],
        "prompt": ["a boat", "the sea"],
        "num_images_per_prompt": 2,
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_equals_stock_diffusers(sd: Pair, call: str) -> None:
    assert_same(*both(sd, **CALLS[call]))


def test_an_image_matters(sd: Pair) -> None:
    """Each form, and the other image another way."""
    drawn = [both(sd, **CALLS[form])[1] for form in FORMS]
    other = both(sd, ip_adapter_image=[image(7), None, None])[1]
    without = sd[1](PROMPT, num_inference_steps=STEPS, output_type="latent", generator=seeded(0)).images
    for one, another in [*((one, without) for one in drawn), (drawn[0], other), (drawn[0], drawn[1])]:
        assert (one - another).norm() > 0.03 * another.norm()


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_over_an_image_equals_stock_diffusers(sd: Pair, task: str) -> None:
    made = getattr(diffusers, f"StableDiffusion{task}Pipeline").from_pipe(sd[0], torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    masked = {"mask_image": mask(), "height": SIDE, "width": SIDE} if task == "Inpaint" else {}
    call = {"image": image(1), "strength": 0.7, "ip_adapter_image": [None, SEEN, None], "guidance_scale": 4.0}
    assert_same(*both((made, sd[1]), **call, **masked))


def test_sdxl_equals_stock_diffusers(tiny_sdxl: Path, tmp_path: Path) -> None:
    files = files_for(tiny_sdxl, tmp_path, ("plus",))
    engine = export(tiny_sdxl, tmp_path / "engine", Recipe.make(backend="eager", ip_adapters=files))
    pair = stock(tiny_sdxl, files, "StableDiffusionXLPipeline"), ours(engine)
    scale = {"up": {"block_0": [0.0, 0.8]}}  # what is called the style, of SDXL's second of three there
    assert_same(*both(pair, ip_adapter_image=[SEEN], ip_adapter_scale=[scale], guidance_scale=5.0))
    assert_same(*both(pair, ip_adapter_image=[SEEN], guidance_scale=5.0, negative_prompt="a boat"))


def test_beside_a_controlnet_equals_stock_diffusers(
    tiny_sd: Path, tiny_controlnet: Path, files: list[Path], tmp_path: Path
) -> None:
    """Which is told nothing of the image."""
    recipe = Recipe.make(backend="eager", ip_adapters=files[:1], controlnet=tiny_controlnet)
    pipe = ours(export(tiny_sd, tmp_path / "engine", recipe))
    network = diffusers.ControlNetModel.from_pretrained(tiny_controlnet)
    reference = stock(tiny_sd, files[:1], "StableDiffusionControlNetPipeline", controlnet=network)
    reference.scheduler = pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.engine.scheduler_config)
    reference.set_ip_adapter_scale(0.6)
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent", "ip_adapter_image": SEEN}
    expected = reference(**call, image=image(2), generator=seeded(0)).images
    drawn = pipe(**call, control_image=image(2), ip_adapter_scale=0.6, generator=seeded(0)).images
    assert_same(expected, drawn)


def test_shallow_steps_are_told_of_the_image(tiny_sd: Path, files: list[Path], tmp_path: Path) -> None:
    """With all steps whole, and with shallow ones by the hooks of validation."""
    from sdfast.validation.drawing import generate

    recipe = Recipe.make(backend="eager", ip_adapters=files[:1], cache_branch=2)
    pipe = ours(export(tiny_sd, tmp_path / "engine", recipe))
    reference = stock(tiny_sd, files[:1], "StableDiffusionPipeline")
    seen = read_images(pipe.engine.manifest.model, SEEN)
    for interval in (1, 2):
        asked = request_of(cache_interval=interval, num_inference_steps=4, scheduler="ddim")
        expected = generate(reference, asked, output_type="latent", cache_branch=2, ip_adapter_images=seen)
        assert_same(expected, pipe.generate(asked, Given(ip_adapter_images=seen), "latent").images)


def test_an_onnx_engine_equals_stock_diffusers(flat_sd: Path, flat_onnx: Path, tmp_path: Path) -> None:
    """Made of one without: what an adapter does not change is kept. A picture of two adapters' images, and
    long prompts beside them."""
    files = files_for(flat_sd, tmp_path / "adapters", ("plus", "plain"))
    engine = shutil.copytree(flat_onnx, tmp_path / "engine")
    pipe = ours(export(flat_sd, engine, Recipe.make(sizes=FLAT_SIZES, batch=2, ip_adapters=files)))
    told = {name: module.fingerprint for name, module in pipe.engine.manifest.modules.items()}
    before = {name: module.fingerprint for name, module in read_manifest(flat_onnx).modules.items()}
    changed = {name for name in told if told[name] != before.get(name)}
    assert changed == {"unet", "image_encoder", "image_context", "image_context_2"}
    reference = stock(flat_sd, files, "StableDiffusionPipeline")
    call = {"ip_adapter_image": [SEEN, image(4)], "ip_adapter_scale": [0.8, 0.5], "height": 16, "width": 16}
    expected, drawn = both((reference, pipe), num_images_per_prompt=2, output_type="pt", **call)
    assert 10 * torch.log10(1 / (expected - drawn).square().mean()) > 100
    long = {"prompt": "a misty mountain cabin by the sea " * 20, "long_prompts": "chunk", "seed": 1}
    run = {**call, "num_inference_steps": 2, "output_type": "latent"}
    one, cut = (pipe(**run, **asked).images for asked in (long, long | {"long_prompts": "truncate"}))
    assert torch.isfinite(one).all() and not torch.equal(one, cut)


# ---------------------------------------------------------------- rows


def request_of(**fields: Any) -> Request:
    usual = {
        **{"prompts": (PROMPT,), "negative_prompts": (None,), "height": SIDE, "width": SIDE, "seed": 1},
        **{"num_inference_steps": 3, "scheduler": "euler", "ip_adapter_scale": 1.0},
    }
    return Request.make(**{**usual, **fields})


@pytest.mark.parametrize("arithmetic", [HostArithmetic, DeviceArithmetic])
def test_rows_with_and_without_an_image_share_a_batch(sd: Pair, arithmetic: Any) -> None:
    pipe, model = sd[1], sd[1].engine.manifest.model
    asked: list[tuple[Request, Any]] = [
        (request_of(ip_adapter_scale=[0.4, 0.0, 0.0], num_inference_steps=4), [SEEN, None, None]),
        (request_of(ip_adapter_scale=None, seed=2), None),
        (request_of(ip_adapter_scale=[0.0, 1.0, {"mid": 0.5}], guidance_scale=1.0), [None, SEEN, image(4)]),
        (request_of(ip_adapter_scale=[0.0, 0.0, 1.0], guidance_end=0.5), [None, None, image(4)]),
    ]
    given = [Given(ip_adapter_images=None if one is None else read_images(model, one)) for _, one in asked]
    alone = [pipe.generate(r, g, "latent").images[0] for (r, _), g in zip(asked, given, strict=True)]
    prepared = [pipe.prepare(r, g) for (r, _), g in zip(asked, given, strict=True)]
    rows = Rows(pipe.engine, [row for one in prepared for row in one.rows], SIDE, SIDE, arithmetic)
    while rows.active:
        rows.tick()
    for expected, got in zip(alone, rows.latents, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_scale_of_zero_is_no_adapter(sd: Pair, sd_engine: Path) -> None:
    """Nor is none at all."""
    call = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent", "seed": 4}
    call["scheduler"] = "ddim"
    zero = sd[1](**call, ip_adapter_image=[SEEN] * 3, ip_adapter_scale=0).images
    assert torch.equal(zero, sd[1](**call).images)
    assert_same(ours(sd_engine)(**call).images, zero)


def test_an_image_is_seen_once(sd: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, called = ours(sd[1].engine.folder), []
    call = pipe.engine.call

    def counted(name: str, *args: Any, **named: Any) -> Any:
        called.append(name)
        return call(name, *args, **named)

    monkeypatch.setattr(pipe.engine, "call", counted)
    run = {"num_inference_steps": 1, "output_type": "latent", "ip_adapter_scale": [1, 0.5, 0.2]}
    for prompt, seen in (("a", SEEN), ("b", SEEN.copy()), ("c", image(9))):
        pipe(prompt, ip_adapter_image=[seen, seen, None], **run)
    # Of each adapter that has an image: for both images, and the negative's for both
    assert called.count("image_encoder") == 2 * 3
    assert called.count("image_context") == called.count("image_context_2") == 3
    assert "image_context_3" not in called


def test_hires_passes_on_the_image(sd: Pair) -> None:
    """Both passes are told of it, as two calls are."""
    pipe = sd[1]
    call = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 3, "guidance_scale": 3.0}
    told = {"ip_adapter_image": [None, SEEN, None], "ip_adapter_scale": 0.7}
    hires = {"height": SIDE, "width": SIDE, "strength": 0.6, "upscaler": "latent"}
    twice = pipe(**call, **told, hires=hires, output_type="latent").images
    second = pipe(**call, hires=hires, output_type="latent").images
    assert (twice - second).norm() > 0.03 * second.norm()


def test_a_refiner_goes_on_without_the_image(sd: Pair, sd_engine: Path) -> None:
    asked, seen = request_of(num_inference_steps=4), read_images(sd[1].engine.manifest.model, [SEEN] * 3)
    drawn = Ensemble(sd[1], ours(sd_engine), 0.5).generate(
        asked, output_type="latent", ip_adapter_images=seen
    )
    without = Ensemble(sd[1], ours(sd_engine), 0.5).generate(
        request_of(ip_adapter_scale=None, num_inference_steps=4), output_type="latent"
    )
    assert (drawn.images - without.images).norm() > 0.03 * without.images.norm()


# ---------------------------------------------------------------- what is said and taken


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (30, 30), (17, 23), (200, 31)])
def test_images_are_made_ready_as_by_clips_processor(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), np.uint8)
    for mode in ("RGB", "RGBA", "L", "LA"):
        given = Image.fromarray(pixels).convert(mode)
        # on white where it is transparent, as transformers itself has it from some version on
        white = Image.alpha_composite(Image.new("RGBA", size, "white"), given.convert("RGBA")).convert("RGB")
        for resize, crop in ((30, 30), (40, 30)):
            stocks = CLIPImageProcessor(size={"shortest_edge": resize}, crop_size=crop)
            expected = stocks(white, return_tensors="pt").pixel_values[0]
            processor = ImageProcessor(resize=resize, crop=crop)
            assert torch.equal(pixel_values(pixels_of(prepared(given, processor)), processor), expected)


def test_long_images_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^ip_adapter_image: 2x900 is too long for its width"):
        prepared(Image.new("RGB", (2, 900)), ImageProcessor(resize=224, crop=224))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one of three": ({"ip_adapter_image": SEEN}, "^ip_adapter_image: 1, but this engine has 3 IP-Adapters"),
    "none of three": ({"ip_adapter_image": [None] * 3}, "^ip_adapter_image: None for every IP-Adapter"),
    "several of one": (
        {"ip_adapter_image": [[SEEN, SEEN], SEEN, SEEN]},
        "^ip_adapter_image: a list within the list; an adapter takes one image",
    ),
    "a tensor": (
        {"ip_adapter_image": [torch.zeros(3, 30, 30), None, None]},
        r"^ip_adapter_image: Tensor of shape \(3, 30, 30\) is not a PIL image",
    ),
    "a scale alone": ({"ip_adapter_scale": 0.5}, "^ip_adapter_scale: is for an image of an IP-Adapter"),
    "embeddings": ({"ip_adapter_image_embeds": [torch.zeros(2)]}, "^ip_adapter_image_embeds: not supported"),
    **{
        told: ({"ip_adapter_image": [SEEN] * 3, "ip_adapter_scale": scale}, message)
        for told, scale, message in (
            ("two scales", [1, 1], "^ip_adapter_scale: 2, but this engine has 3 IP-Adapters"),
            ("a negative scale", -0.1, "^ip_adapter_scale.*greater than or equal to 0"),
            ("another way", {"across": 1.0}, "^ip_adapter_scale.*must be 'down', 'mid' or 'up'"),
            (
                "no such block",
                {"down": {"block_0": 1.0}},
                r"^ip_adapter_scale: down.block_0: no transformers there; there are, .*: down.block_1 \(1\), "
                r"mid \(1\), up.block_0 \(2\)",
            ),
            ("too many", {"up": {"block_0": [1.0] * 3}}, "up.block_0: 3 numbers for its 2 transformers"),
            ("parts of the middle", {"mid": {"block_0": 1.0}}, "mid.block_0: no transformers there"),
        )
    },
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_by_name(sd: Pair, case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(RequestError, match=message):
        sd[1](PROMPT, num_inference_steps=1, scheduler="ddim", **fields)


def test_an_engine_without_an_adapter_takes_no_image() -> None:
    pipe = Pipeline(FakeEngine())
    with pytest.raises(RequestError, match=r"has no IP-Adapter; leave it out, or export .* --ip-adapter"):
        pipe("a", ip_adapter_image=SEEN)
    with pytest.raises(RequestError, match="has no IP-Adapter"):
        pipe.set_ip_adapter_scale(0.5)


def test_a_drop_in_has_diffusers_calls(sd: Pair) -> None:
    own = StableDiffusionPipeline(sd[1].engine)
    own.set_progress_bar_config(disable=True)
    with pytest.raises(RequestError, match=r"from_pretrained\(..., ip_adapters=\[...\]\)"):
        own.load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name="ip-adapter_sd15.safetensors")
    with pytest.raises(RequestError, match="greater than or equal to 0"):
        own.set_ip_adapter_scale(-1.0)
    call = {"num_inference_steps": 1, "output_type": "latent", "seed": 0, "ip_adapter_image": [SEEN] * 3}
    whole, half = (own(PROMPT, **call, ip_adapter_scale=scale).images for scale in (1.0, 0.5))
    assert torch.equal(own(PROMPT, **call).images, whole)
    own.set_ip_adapter_scale([0.5, 0.5, {"down": 0.5, "mid": 0.5, "up": 0.5}])
    assert torch.equal(own(PROMPT, **call).images, half)
    assert torch.equal(own(PROMPT, **call, ip_adapter_scale=1).images, whole)


def test_from_pretrained_takes_the_sources_of_adapters(
    tiny_sd: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd: Pair
) -> None:
    monkeypatch.setenv("SDFAST_CACHE", str(tmp_path))
    given = [files[0], {"source": files[1].parent, "weight_name": files[1].name}]
    pipe = Pipeline.from_pretrained(tiny_sd, backend="eager", ip_adapters=given)
    digests = [one.digest for one in pipe.engine.manifest.checkpoint.ip_adapters]
    assert digests == [one.digest for one in sd[1].engine.manifest.checkpoint.ip_adapters[:2]]


def test_the_command_line_draws_it_and_says_so(sd: Pair, tmp_path: Path) -> None:
    SEEN.save(tmp_path / "seen.png")
    out, engine = tmp_path / "out.png", str(sd[1].engine.folder)
    call = ["generate", PROMPT, "--engine", engine, "--steps", "2", "--seed", "5", "-o", str(out)]
    told = ["--ip-adapter-image", str(tmp_path / "seen.png"), *["--ip-adapter-image", "none"] * 2]
    scales = ["--ip-adapter-scale", '{"up": 0.5}', "--ip-adapter-scale", "1", "--ip-adapter-scale", "1"]
    done = CliRunner().invoke(main, [*call, *told, *scales])
    assert done.exit_code == 0, done.output
    drawn = Image.open(out)
    assert 'IP-Adapter scale: "{\\"up\\": 0.5}/0/0"' in drawn.info["parameters"]
    run = {"num_inference_steps": 2, "seed": 5, "guidance_scale": 7.0, "scheduler": "dpmpp_2m_karras"}
    [expected] = sd[1](
        PROMPT, ip_adapter_image=[SEEN, None, None], ip_adapter_scale=[{"up": 0.5}, 1, 1], **run
    ).images
    assert drawn.tobytes() == expected.tobytes()
    for given, message in (
        (scales, "give --ip-adapter-image too"),
        ([*told, "--ip-adapter-scale", "half"], "'half' is not a number, nor numbers by layers"),
        (told[:2], "1, but this engine has 3 IP-Adapters"),
    ):
        failed = CliRunner().invoke(main, [*call, "--overwrite", *given])
        assert failed.exit_code == 1 and message in failed.output
    info = CliRunner().invoke(main, ["info", engine]).output
    assert "plus.safetensors, plus" in info and "image_encoder" in info


def test_a_server_draws_the_pipelines_picture(sd: Pair, files: list[Path]) -> None:
    """Its engine is warmed up before, and its adapters have names."""
    pipe = sd[1]
    known = info_of(pipe.engine.manifest)
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert known.ip_adapters[0] == f"plain [{digest[:8]}]"
    assert known.image_processor == ImageProcessor(resize=30, crop=30)
    warm_up(pipe.engine)
    batcher, ended = Batcher(pipe.engine), SimpleQueue[Done | Failed]()

    def listen(event: Event) -> None:
        if isinstance(event, Done | Failed):
            ended.put(event)

    seen = read_images(pipe.engine.manifest.model, [SEEN, None, image(4)])
    asked = request_of(ip_adapter_scale=[0.7, 0.0, {"down": 1.0}])
    batcher.submit(Job("1", "engine", asked, ip_adapter=seen.numpy().tobytes()), listen)
    batcher.submit(Job("2", "engine", request_of(ip_adapter_scale=None)), listen)
    ends = [ended.get(timeout=20), ended.get(timeout=20)]
    assert all(isinstance(end, Done) for end in ends), ends
    pictures = [
        pipe.generate(asked, Given(ip_adapter_images=seen)).images[0],
        pipe.generate(request_of(ip_adapter_scale=None)).images[0],
    ]
    drawn = {Image.open(BytesIO(end.pngs[0])).tobytes() for end in ends if isinstance(end, Done)}
    assert drawn == {picture.tobytes() for picture in pictures}
    with pytest.raises(RequestError, match="ip_adapter_image: 5 bytes, but 3x30x30x3 uint8 are 8100"):
        batcher.submit(Job("3", "engine", asked, ip_adapter=b"short"), listen)
    with pytest.raises(RequestError, match="ip_adapter_scale and ip_adapter_image go together"):
        batcher.submit(Job("4", "engine", asked), listen)
    assert batcher.close(timeout=20)
