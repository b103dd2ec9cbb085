"""Step caching: stock diffusers' picture of the same, and each row's own, whoever is beside it."""

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sdfast.arithmetic import HostArithmetic
from sdfast.call import Given
from sdfast.cli import main
from sdfast.errors import EngineError, ExportError, RequestError
from sdfast.export.build import export
from sdfast.export.checkpoint import resolve
from sdfast.export.modules import module_specs
from sdfast.export.networks import Networks
from sdfast.export.recipe import Recipe
from sdfast.first_latents import Over
from sdfast.images import read_images
from sdfast.infotext import infotext_of, read
from sdfast.loop import Rows
from sdfast.manifest import SHALLOW, Span, read_manifest
from sdfast.models.fp8 import Conv3x3FP8, LinearFP8
from sdfast.pictures import Job, draw
from sdfast.pipeline import Pipeline
from sdfast.request import Hires, Request
from sdfast.row import Member, Row
from sdfast.server import jobs
from sdfast.server.batcher import Batcher
from sdfast.server.work import Room
from sdfast.server.worker.opening import warm_up
from sdfast.summary import summary
from sdfast.validation.drawing import generate
from sdfast.validation.reference import reference_pipeline
from tests.fakes import FakeEngine
from tests.sealing import reseal
from tests.test_image_to_image import image
from tests.test_joining import EXACT
from tests.test_loop import FURTHER, KEEPING, MIXED, SIDE, Arithmetics, alone, arithmetic, by_hand, row
from tests.test_pipeline import assert_same, ours

__all__ = ["arithmetic"]  # the fixture


def request_of(**more: Any) -> Request:
    usual = {
        **{"prompts": ("a boat",), "negative_prompts": ("mist",), "height": 64, "width": 64, "seed": 3},
        **{"num_inference_steps": 7, "scheduler": "ddim", "cache_interval": 3},
    }
    return Request.make(**{**usual, **more})


@contextmanager
def remembering(unet: Any, interval: int, branch: int) -> Iterator[None]:
    """Whatever of diffusers' U-Net lies deeper than skip `branch` gives, in every evaluation but one in
    `interval`, what it gave in the last of these."""
    down, up, calls = list[list[Any]](), list[list[Any]](), 0
    for block in unet.down_blocks:  # each place gives a skip, the first of them skip 1
        down += _with_attention(block)
        down += [[sampler] for sampler in block.downsamplers or ()]
    for block in unet.up_blocks:  # each place consumes a skip, the last of them skip 0
        up += _with_attention(block)
        up[-1] += block.upsamplers or ()
    deep = [*down[branch:], [unet.mid_block], *up[: len(up) - branch - 1]]

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def remembered(module: Any) -> Any:
        forward, kept = module.forward, list[Any]()

        def answer(*args: Any, **given: Any) -> Any:
            if (calls - 1) % interval == 0:
                kept[:] = [forward(*args, **given)]
            return kept[0]

        return answer

    with pytest.MonkeyPatch.context() as patch, unet.register_forward_pre_hook(count):
        for module in (module for place in deep for module in place):
            patch.setattr(module, "forward", remembered(module))
        yield


def _with_attention(block: Any) -> list[list[Any]]:
    attentions = list(getattr(block, "attentions", ()))
    return [[resnet, *attentions[i : i + 1]] for i, resnet in enumerate(block.resnets)]


Case = tuple[Any, Pipeline, int]  # the stock pipeline of a checkpoint, its engine's, and the branch


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The case of a checkpoint and a branch, made when it is first asked for."""

    @cache
    def stock(kind: str) -> Any:
        return reference_pipeline(resolve(str(request.getfixturevalue(f"tiny_{kind}"))))

    @cache
    def case(kind: str, branch: int) -> Case:
        recipe = Recipe.make(backend="eager", cache_branch=branch, sizes={"min": "64x64", "max": "128x128"})
        place = tmp_path_factory.mktemp("cached") / kind
        engine = export(request.getfixturevalue(f"tiny_{kind}"), place, recipe)
        return stock(kind), ours(engine), branch

    return case


def stock_latents(stock: Any, branch: int, asked: Request, over: Any = None) -> torch.Tensor:
    """The last ones, by diffusers' pipeline."""
    plain = asked.model_copy(update={"cache_interval": 1})
    with remembering(stock.unet, asked.cache_interval, branch):
        return generate(stock, plain, output_type="latent", over=over)


ASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "two pictures, with noise": (
        "sd",
        0,
        {"cache_interval": 5, "scheduler": "euler_a", "num_images_per_prompt": 2},
    ),
    "not guided, a history": ("sd", 0, {"guidance_scale": 1.0, "scheduler": "dpmpp_2m_karras"}),
    "not guided at the end, in a shallow step": ("sd", 1, {"guidance_end": 0.5}),
    "two evaluations a step, each counted": ("sd", 3, {"scheduler": "heun", "num_inference_steps": 4}),
    "more than there are steps": ("sd", 3, {"cache_interval": 100, "num_inference_steps": 3}),
    "two passes, each counted from its own first": (
        "sd",
        0,
        {"num_inference_steps": 3, "hires": Hires.make(height=80, width=80, num_inference_steps=4)},
    ),
    "SDXL": ("sdxl", 0, {"cache_interval": 2}),
    "SDXL, not guided, below the first level": ("sdxl", 2, {"guidance_scale": 1.0}),
}


@pytest.mark.parametrize("ask", ASKS)
def test_pictures_are_those_of_stock_diffusers(made: Any, ask: str) -> None:
    kind, branch, fields = ASKS[ask]
    stock, pipe, _ = made(kind, branch)
    asked = request_of(**fields)
    expected = stock_latents(stock, branch, asked)
    assert_same(expected, pipe.generate(asked, output_type="latent").images)
    uncached = pipe.generate(asked.model_copy(update={"cache_interval": 1}), output_type="latent").images
    assert (uncached - expected).norm() > 3e-3 * expected.norm()


def test_the_stock_pipeline_draws_the_same(made: Any, tmp_path: Path) -> None:
    """To the bit what those modules draw that remember; on the command line too."""
    stock, pipe, branch = made("sd", 1)
    asked = request_of(num_inference_steps=4)
    drawn = generate(stock, asked, output_type="latent", cache_branch=branch)
    assert torch.equal(drawn, stock_latents(stock, branch, asked))
    with pytest.raises(RequestError, match="a checkpoint does not say up to which branch"):
        generate(stock, asked)
    job = {
        "prompt": "a boat",
        "negative": "mist",
        "steps": 4,
        "guidance": 7.5,
        "scheduler": "ddim",
        "seed": 3,
    }
    cached = Job(**job, engine=pipe.engine.folder, size="64x64", cache_interval=3, backend="diffusers")
    [(path, _, _)] = draw(cached, tmp_path / "a.png", False)
    [expected] = generate(stock, asked, cache_branch=branch)
    assert Image.open(path).tobytes() == expected.tobytes()


def test_over_an_image_evaluations_are_counted_from_the_first_that_is_done(made: Any) -> None:
    stock, pipe, branch = made("sd", 0)
    over = Over(read_images(image(), 4), None)
    asked = request_of(strength=0.6)
    expected = stock_latents(stock, branch, asked, over)
    assert_same(expected, pipe.generate(asked, Given(over=over), "latent").images)


def test_without_an_interval_an_engine_draws_what_one_without_a_branch_draws(
    made: Any, sd_engine: Path
) -> None:
    asked = request_of(cache_interval=1, num_inference_steps=3)
    plain = ours(sd_engine).generate(asked, output_type="latent").images
    assert torch.equal(made("sd", 0)[1].generate(asked, output_type="latent").images, plain)


@pytest.mark.slow
@pytest.mark.parametrize("branch", [0, 3])
def test_an_onnx_engine_equals_stock_diffusers(
    made: Any, sd_onnx: Path, tiny_sd: Path, tmp_path: Path, branch: int
) -> None:
    """Made of one without a branch: the other modules are kept."""
    engine = shutil.copytree(sd_onnx, tmp_path / "engine")
    pipe = ours(export(tiny_sd, engine, Recipe.make(cache_branch=branch)))
    told = {name: module.fingerprint for name, module in pipe.engine.manifest.modules.items()}
    before = {name: module.fingerprint for name, module in read_manifest(sd_onnx).modules.items()}
    assert {name for name in told if told[name] != before.get(name)} == {"unet", SHALLOW}
    asked = request_of(guidance_end=0.5, num_images_per_prompt=2)
    expected = stock_latents(made("sd", branch)[0], branch, asked)
    assert_same(expected, pipe.generate(asked, output_type="latent").images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("branch", "forms"),
    [(0, {"sizes": {"min": "16x16", "max": "48x48"}, "batch": 2}), (3, {"sizes": ["16x24"], "batch": [1]})],
)
def test_a_compiled_engine_equals_stock_diffusers(
    shallow_sd: Path, tmp_path: Path, branch: int, forms: dict[str, Any]
) -> None:
    recipe = Recipe.make(backend="inductor", cache_branch=branch, **forms)
    pipe = ours(export(shallow_sd, tmp_path / "engine", recipe))
    asked = request_of(height=24, width=16, guidance_end=0.5)
    stock = reference_pipeline(resolve(str(shallow_sd)))
    expected = stock_latents(stock, branch, asked)
    assert_same(expected, pipe.generate(asked, output_type="latent").images)


# Rows


KINDS: list[dict[str, Any]] = [
    {**MIXED[0], "interval": 3},
    {**MIXED[1], "interval": 3},
    {"name": "ddim", "steps": 9, "seed": 3, "guided": range(4), "interval": 3},
    {"name": "heun", "steps": 4, "seed": 7, "interval": 3, "rescale": 0.4, "guided": range(2)},
    {**KEEPING[1], "interval": 3},
    {**FURTHER[1], "interval": 3},
    {"name": "euler", "steps": 1, "seed": 9, "interval": 3},
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: str(kinds["name"]))
def test_a_row_is_its_schedule_applied_by_hand(arithmetic: Arithmetics, kinds: dict[str, Any]) -> None:
    torch.testing.assert_close(
        alone(arithmetic, **kinds).double(), by_hand(row(**kinds)), rtol=1e-4, atol=1e-4
    )


def cached_engine() -> FakeEngine:
    return FakeEngine([Span(low=1, high=16)], cached=True)


@pytest.mark.parametrize("seed", range(4))
def test_rows_come_and_go_and_each_is_as_if_alone(arithmetic: Arithmetics, seed: int) -> None:
    """Some leave for a while, and come back when the others are where they were."""
    chance, due = random.Random(seed), [alone(HostArithmetic, **kinds) for kinds in KINDS]
    running, kind_of, finished = Rows(cached_engine(), [], SIDE, SIDE, arithmetic), dict[Row, int](), 0
    waiting: list[Row | Member] = []
    for _ in range(25):
        number = chance.randrange(len(KINDS))
        waiting.append(chosen := row(**KINDS[number]))
        kind_of[chosen] = number
    while waiting or running.rows:
        leaving = [r for r in running.rows if r in running.finished or chance.random() < 0.1]
        for r in set(leaving) & set(running.finished):
            torch.testing.assert_close(running.latents_of(r), due[kind_of[r]], **EXACT)
            finished += 1
        aside = [running.member(r) for r in leaving if r not in running.finished]
        phase, joining = running.phase_without(leaving), list[Row | Member]()
        for other in list(waiting):
            own = other.phase if isinstance(other, Member) else other.phase_at(0)
            if len(joining) < 2 and phase in (None, own) and chance.random() < 0.6:
                phase = own
                joining.append(other)
                waiting.remove(other)
        running.change(joining, leaving)
        waiting += aside
        running.tick()
    assert finished == 25


def test_one_step_in_so_many_is_whole(arithmetic: Arithmetics) -> None:
    engine = cached_engine()
    running = Rows(engine, [row(steps=7, interval=3, guided=range(5))], SIDE, SIDE, arithmetic)
    told = []
    while running.active:
        before = (len(engine.calls["unet"]), len(engine.calls[SHALLOW]))
        running.tick()
        told.append(tuple(len(engine.calls[n]) - b for n, b in zip(("unet", SHALLOW), before, strict=True)))
    assert told == [(1, 0), (0, 1), (0, 1)] * 2 + [(1, 0)]
    assert (engine.calls["unet"], engine.calls[SHALLOW]) == ([2, 2, 1], [2, 2, 2, 1])


def test_rows_of_different_phases_do_not_share_ticks() -> None:
    running = Rows(cached_engine(), [row(steps=7, interval=3)], SIDE, SIDE)
    running.tick()
    for other in (row(interval=3), row(interval=2), row()):
        with pytest.raises(ValueError, match="different phases"):
            running.change([other])
    running.tick()
    running.tick()
    running.change([row(interval=3)])
    with pytest.raises(ValueError, match="guided from the first step on"):
        row(interval=2, guided=range(1, 3))
    plain = Rows(FakeEngine(), [row(interval=2)], SIDE, SIDE)
    plain.tick()
    with pytest.raises(ValueError, match="need an engine with a cache branch"):
        plain.tick()


def test_a_room_lets_rows_in_where_the_others_are_in_their_phase() -> None:
    kinds = [{"name": "ddim", "steps": 8, "seed": seed, "interval": 3} for seed in range(4)]
    first, late, later, last = rows = [row(**kind) for kind in kinds]
    due, ended = [alone(HostArithmetic, **kind) for kind in kinds], list[int]()
    room, steps = Room(Rows(cached_engine(), [], SIDE, SIDE)), list[list[int]]()

    def turn() -> None:
        room.settle()
        room.rows.tick()
        steps.append([room.rows.steps.get(r, -1) for r in rows])

    room.join(first)
    turn()
    room.join(late)  # waits for two ticks
    turn()
    turn()
    turn()
    aside = room.put_aside(first)
    room.join(later)
    turn()
    room.join(aside)  # back in the middle of its interval, where `late` is before it
    turn()
    waiting = room.put_aside(later)  # which had only begun to wait, and joins when the others have gone
    turn()
    assert room.rows.steps == {late: 4}
    room.join(waiting)
    room.join(last)
    while not room.empty:
        turn()
        for r in room.rows.finished:
            torch.testing.assert_close(room.rows.latents_of(r), due[rows.index(r)], **EXACT)
            ended.append(rows.index(r))
            room.leave(r)
    assert steps[:4] == [[1, -1, -1, -1], [2, -1, -1, -1], [3, -1, -1, -1], [4, 1, -1, -1]]
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_server_draws_the_pipelines_picture(made: Any) -> None:
    """Its engine is warmed up before. One that comes late, beside one whose steps are all whole."""
    pipe = made("sd", 0)[1]
    warm_up(pipe.engine)
    batcher, ended = Batcher(pipe.engine), SimpleQueue[tuple[str, Any]]()

    def submit(name: str, asked: Request) -> None:
        def listen(event: jobs.Event) -> None:
            if isinstance(event, jobs.Done | jobs.Failed):
                ended.put((name, event))

        batcher.submit(jobs.Job(name, "engine", asked), listen)

    asked = {
        "long": request_of(num_inference_steps=12),
        "late": request_of(seed=8, guidance_scale=1.0),
        "whole": request_of(cache_interval=1),
    }
    for name, one in asked.items():
        submit(name, one)
    for _ in asked:
        name, end = ended.get(timeout=20)
        assert isinstance(end, jobs.Done), end
        [drawn] = pipe.generate(asked[name]).images
        pixels = [np.asarray(one, np.int16) for one in (drawn, Image.open(BytesIO(end.pngs[0])))]
        assert abs(pixels[0] - pixels[1]).max() <= 1
    assert batcher.close(timeout=20)


# What is refused, and what is told


def test_what_makes_no_sense_is_refused() -> None:
    for fields, reason in (
        ({"cache_interval": 0}, "cache_interval: must be greater than or equal to 1"),
        ({"cache_interval": 2.0}, "cache_interval: must be a valid integer"),
        ({"guidance_start": 0.25}, r"cache_interval: with guidance_start 0\.25"),
    ):
        with pytest.raises(RequestError, match=reason):
            request_of(**fields)
    request_of(cache_interval=1, guidance_start=0.25)
    remedy = r"^cache_interval: 3, but .* `sdfast export SOURCE -o DIR --cache-branch 0`$"
    with pytest.raises(RequestError, match=remedy):
        Pipeline(FakeEngine())("a", cache_interval=3)
    batcher, asked = Batcher(FakeEngine(), own_thread=False), request_of(height=16, width=16)
    with pytest.raises(RequestError, match=remedy):
        batcher.submit(jobs.Job("1", "fake", asked), print)


def test_what_cannot_be_exported_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cache_branch: a ControlNet adds to what lies deep"):
        Recipe.make(cache_branch=0, controlnet="org/canny")
    with pytest.raises(ExportError, match="cache_branch: must be greater than or equal to 0"):
        Recipe.make(cache_branch=-1)
    with pytest.raises(ExportError, match="cache_branch: 4, but this U-Net has branches 0 to 3"):
        export(tiny_sd, tmp_path / "engine", Recipe.make(backend="eager", cache_branch=4))
    sizes = {"min": "64x64", "max": "128x128"}
    for backend in ("onnx", "inductor"):
        with pytest.raises(ExportError, match="give the sizes as a list, or take a lower branch"):
            export(tiny_sd, tmp_path / "engine", Recipe.make(backend=backend, cache_branch=3, sizes=sizes))
    assert not (tmp_path / "engine").exists()


def test_an_engine_without_its_shallow_steps_is_not_opened(made: Any, tmp_path: Path) -> None:
    engine = shutil.copytree(made("sd", 0)[1].engine.folder, tmp_path / "engine")
    assert "step cache   branch 0" in summary(read_manifest(engine))
    reseal(engine, lambda document: document["modules"].pop(SHALLOW))
    with pytest.raises(EngineError, match="no module 'unet_shallow'"):
        read_manifest(engine)


def test_layers_in_fp8_are_so_in_shallow_steps(tiny_sdxl: Path) -> None:
    recipe = Recipe.make(backend="eager", dtype="fp16", fp8=True, cache_branch=2)
    whole, shallow, *_ = module_specs(Networks.of(resolve(str(tiny_sdxl)), 2), recipe)
    assert (whole.name, shallow.name) == ("unet", SHALLOW)
    assert shallow.fp8 and set(shallow.fp8) < set(whole.fp8)
    found = {
        name for name, layer in shallow.load().named_modules() if isinstance(layer, LinearFP8 | Conv3x3FP8)
    }
    assert found == set(shallow.fp8)


def test_the_parameters_say_so() -> None:
    pipe = Pipeline(FakeEngine(cached=True))
    told = infotext_of(request_of(), pipe.schedule_of(request_of()), 0, model="m", weights={}).extra
    assert told == {"Cache interval": "3"}


def test_on_the_command_line(shallow_sd: Path, tmp_path: Path) -> None:
    engine, picture = str(tmp_path / "engine"), tmp_path / "a.png"

    def sdfast(*options: object) -> str:
        result = CliRunner().invoke(main, [str(option) for option in options])
        assert result.exit_code == 0, result.output
        return result.output

    sdfast("export", shallow_sd, "-o", engine, "--backend", "eager", "--cache-branch", 2)
    assert "step cache   branch 2" in sdfast("info", engine)
    drawn = "generate", "a boat", "--engine", engine, "--steps", 4, "--seed", 1, "-o", picture
    sdfast(*drawn, "--cache-interval", 3)
    assert read(picture).extra == {"Cache interval": "3"}
    request = request_of(
        **{"negative_prompts": (None,), "height": 16, "width": 16, "num_inference_steps": 4, "seed": 1},
        **{"guidance_scale": 7.0, "scheduler": "dpmpp_2m_karras"},
    )
    [expected] = ours(Path(engine)).generate(request).images
    assert Image.open(picture).tobytes() == expected.tobytes()
