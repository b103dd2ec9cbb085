"""The loop: rows that differ in everything, stepping together, each as if it were alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdfast.arithmetic import (
    Capacity,
    DeviceArithmetic,
    HostArithmetic,
    Keep,
    Plan,
    Weight,
    device,
    rescale_guidance,
)
from sdfast.bucket import Buckets
from sdfast.errors import BackendError, NumericalError
from sdfast.loop import Rows
from sdfast.manifest import Span
from sdfast.noise import OwnNoise, SharedNoise, generator
from sdfast.row import Conditioning, Guide, Row
from sdfast.schedulers import Schedule, schedule
from tests.fakes import CONTEXT_WIDTH, LENGTH, SCHEDULER_CONFIG, SHIFT_WIDTH, Failpoint, FakeEngine

SHAPE = (4, 2, 2)
SIDE = 16


def plan(name: str, steps: int) -> Schedule:
    return schedule(name, SCHEDULER_CONFIG, num_inference_steps=steps)


@pytest.mark.parametrize("shape", [(4, 2, 2), (12, 16, 16), (3, 3, 3), (4, 64, 64)])
@pytest.mark.parametrize("draws", [0, 1, 3, 19, 40])
def test_noise_drawn_ahead_is_the_noise_drawn_in_turn(shape: tuple[int, ...], draws: int) -> None:
    """Number by number; and after the run the generator is where it would be."""
    ahead, in_turn = generator(3), generator(3)
    noise = OwnNoise([ahead], shape, ahead=draws)
    noise.initial()
    torch.randn(shape, generator=in_turn)
    draw = noise.of_row(0)
    for k in range(draws):
        assert torch.equal(draw(k), torch.randn(shape, generator=in_turn))
    assert torch.equal(ahead.get_state(), in_turn.get_state())


def told(schedule: Schedule, value: float) -> Conditioning:
    """A conditioning with `value` for its prompt."""
    shifts = torch.zeros(len(schedule), SHIFT_WIDTH)
    shifts[:, 0] = torch.tensor(schedule.timesteps.tolist()) / 1000
    return Conditioning(torch.full((LENGTH, CONTEXT_WIDTH), value), shifts)


Arithmetics = type[HostArithmetic] | type[DeviceArithmetic]


@pytest.fixture(params=[HostArithmetic, DeviceArithmetic])
def arithmetic(request: pytest.FixtureRequest) -> Arithmetics:
    """Every test that steps rows holds for both."""
    chosen: Arithmetics = request.param
    return chosen


def row(
    name: str = "euler_a",
    steps: int = 4,
    seed: int = 0,
    prompt: float = 10.0,
    negative: float | None = -5.0,
    guidance: Weight = 7.0,
    rescale: float = 0.0,
    keeps: bool = False,
    interval: int = 1,
    guided: range | None = None,
    further: Sequence[tuple[float, Weight]] = (),
) -> Row:
    """further: the prompt and the weight of each."""
    chosen = plan(name, steps)
    noise, keep = OwnNoise([generator(seed)], SHAPE), None
    if keeps:
        image, unit = torch.randn(2, *SHAPE, generator=generator(seed + 100))
        keep = Keep(torch.tensor([[[True, False], [False, True]]]), image, unit)
    return Row(
        schedule=chosen,
        latents=noise.initial()[0] * chosen.init_noise_sigma,
        positive=told(chosen, prompt),
        negative=None if negative is None else told(chosen, negative),
        guidance=guidance,
        noise=noise.of_row(0),
        guidance_rescale=rescale,
        keep=keep,
        guided=guided,
        cache_interval=interval,
        further=[Guide(told(chosen, what), weight) for what, weight in further],
    )


MIXED: list[dict[str, object]] = [
    {"name": "dpmpp_2m_karras", "steps": 5, "seed": 1, "prompt": 30.0},
    {"name": "euler_a", "steps": 3, "seed": 2, "negative": None},
    {"name": "ddim", "steps": 7, "seed": 3, "guidance": 2.0},
    {"name": "ddpm", "steps": 2, "seed": 4, "guidance": 3.0, "rescale": 0.7},
    {"name": "euler", "steps": 6, "seed": 5, "negative": None, "prompt": -2.0},
    {"name": "dpmpp_2m", "steps": 1, "seed": 6, "rescale": 0.2},
]
# Rows that something else guides, too.
FURTHER: list[dict[str, object]] = [
    {"name": "dpmpp_2m", "steps": 4, "seed": 9, "further": [(20.0, 3.0)]},
    {"name": "euler_a", "steps": 6, "seed": 10, "guidance": 5.0, "further": [(-8.0, -1.5), (50.0, 0.5)]},
    {"name": "ddim", "steps": 3, "seed": 11, "guidance": 0.0, "further": [(4.0, 1.0)], "keeps": True},
    {
        "name": "dpmpp_2m",
        "steps": 3,
        "seed": 12,
        "guidance": [9.0, 8.0, 7.5],
        "further": [(2.0, [-2.0, -1.0, 0.0])],
    },
    {"name": "euler_a", "steps": 4, "seed": 13, "rescale": 0.6, "further": [(5.0, [-3.0, -3.0, -1.0, -0.5])]},
    {"name": "euler", "steps": 5, "seed": 14, "guidance": [4.0, 3.0, 2.0, 1.0, 1.0]},
]
# Rows that keep a part of an image.
KEEPING: list[dict[str, object]] = [
    {"name": "heun", "steps": 4, "seed": 7, "keeps": True},
    {"name": "euler_a", "steps": 5, "seed": 8, "negative": None, "keeps": True},
]


def run(engine: FakeEngine, rows: Sequence[Row], arithmetic: Arithmetics) -> torch.Tensor:
    running = Rows(engine, rows, SIDE, SIDE, arithmetic)
    while running.active:
        running.tick()
    running.check()
    return running.latents


def alone(arithmetic: Arithmetics, **kinds: object) -> torch.Tensor:
    return run(FakeEngine(cached="interval" in kinds), [row(**kinds)], arithmetic)[0]


def at(weight: Weight, step: int) -> float:
    return weight[step] if isinstance(weight, Sequence) else weight


def by_hand(told_row: Row) -> torch.Tensor:
    """The row in float64, from the documentation of `Schedule` alone."""
    table = told_row.schedule
    registers = torch.zeros(table.registers, *SHAPE, dtype=torch.float64)
    registers[0] = told_row.latents
    deep: list[torch.Tensor] = []
    for k in range(len(table)):
        sample = registers[0] * table.input_scale[k]
        every = [told_row.negative, *(one.told for one in told_row.further), told_row.positive]
        told = [c.context[0, 0].double() / 100 + c.time_shift[k, 0].double() for c in every if c is not None]
        if k % told_row.cache_interval == 0:
            outputs, deep = [sample * 0.5 + t for t in told], [sample.mean() - t for t in told]
        else:
            outputs = [sample * 0.25 + t + d for t, d in zip(told, deep, strict=True)]
        guided, away = outputs[-1], len(told_row.told_at(k)) > 1
        if away:
            guided = outputs[0] + at(told_row.guidance, k) * (outputs[-1] - outputs[0])
        for guide, output in zip(told_row.further, outputs[1:], strict=False):
            guided = guided + at(guide.weight, k) * (output - outputs[0])
        if away and told_row.guidance_rescale:
            rescaled = guided * outputs[-1].std() / guided.std()
            guided = told_row.guidance_rescale * rescaled + (1 - told_row.guidance_rescale) * guided
        z = told_row.noise(k).double() if table.draws_noise[k] else torch.zeros(SHAPE, dtype=torch.float64)
        state = torch.cat([registers, guided[None], z[None]])
        registers = torch.einsum(
            "rs,schw->rchw", torch.tensor(table.matrix[k].tolist(), dtype=torch.float64), state
        )
        if (keep := told_row.keep) is not None and table.noising is not None:
            a, b = table.noising[k + 1]
            registers[0] = torch.where(keep.anew, registers[0], a * keep.latents + b * keep.noise)
    return registers[0]


@pytest.mark.parametrize("kinds", [*MIXED, *FURTHER, *KEEPING], ids=lambda kinds: str(kinds["name"]))
def test_a_row_is_its_schedule_applied_by_hand(arithmetic: Arithmetics, kinds: dict[str, object]) -> None:
    torch.testing.assert_close(
        alone(arithmetic, **kinds).double(), by_hand(row(**kinds)), rtol=1e-4, atol=1e-4
    )


def test_rows_that_differ_in_everything_equal_each_run_alone(
    arithmetic,
) -> None:
    all_kinds = [*MIXED, *FURTHER, *KEEPING]
    together = run(FakeEngine([Span(low=1, high=16)]), [row(**kinds) for kinds in all_kinds], arithmetic)
    for kinds, latents in zip(all_kinds, together, strict=True):
        torch.testing.assert_close(latents, alone(arithmetic, **kinds), rtol=1e-5, atol=1e-5)


def test_what_is_kept_ends_as_the_image_and_costs_the_others_nothing(arithmetic: Arithmetics) -> None:
    keeps = row(**KEEPING[0])
    latents, keep = run(FakeEngine(), [keeps], arithmetic)[0], keeps.keep
    assert keep is not None
    stays = ~keep.anew.expand(SHAPE)
    assert torch.equal(latents[stays], keep.latents[stays])
    assert not torch.isclose(latents[~stays], keep.latents[~stays]).any()
    for one in (keeps, row()):
        plan_of_row = Plan(one.schedule, [], 1.0, 0.0, one.noise, one.keep)
        assert Capacity.of([plan_of_row]).keeps == (one is keeps)


@pytest.mark.parametrize(
    ("forms", "calls"),
    [
        ([Span.exactly(4)], [4, 4, 4]),  # ten rows, padded to twelve
        ([Span.exactly(3), Span.exactly(4)], [4, 3, 3]),  # without a padded row
        ([Span(low=1, high=4)], [4, 4, 2]),
        ([Span.exactly(16)], [16]),
    ],
)
def test_rows_are_padded_and_split_over_the_forms_there_are(
    arithmetic: Arithmetics, forms: list[Span], calls: list[int]
) -> None:
    engine = FakeEngine(forms)
    running = Rows(
        engine, [row(**kinds) for kinds in MIXED], SIDE, SIDE, arithmetic
    )  # four guided and two plain rows
    running.tick()
    assert sorted(engine.calls["unet"], reverse=True) == calls
    while running.active:
        running.tick()
    for kinds, latents in zip(MIXED, running.latents, strict=True):
        torch.testing.assert_close(latents, alone(arithmetic, **kinds), rtol=1e-5, atol=1e-5)


def test_a_finished_row_keeps_its_latents_to_the_bit(arithmetic: Arithmetics) -> None:
    running = Rows(FakeEngine(), [row(steps=2), row(name="dpmpp_2m", steps=9)], SIDE, SIDE, arithmetic)
    running.tick()
    running.tick()
    finished = running.latents[0].clone()
    while running.active:
        running.tick()
    assert torch.equal(running.latents[0], finished)
    last = running.latents.clone()
    running.tick()  # nobody has steps left
    assert torch.equal(running.latents, last)


def test_a_finished_row_is_safe_from_what_the_network_says_of_it_later(arithmetic: Arithmetics) -> None:
    engine = FakeEngine()
    running = Rows(engine, [row(steps=1, negative=None), row(steps=3, negative=None)], SIDE, SIDE, arithmetic)
    running.tick()
    finished = running.latents[0].clone()
    engine.failpoints["unet"] = Failpoint("nan", rows=[0])
    while running.active:
        running.tick()
    running.check()
    assert torch.equal(running.latents[0], finished)


def test_a_row_that_is_not_finite_leaves_the_others_alone_and_is_told(arithmetic: Arithmetics) -> None:
    rows = [row(seed=1, negative=None), row(seed=2, negative=None)]
    running = Rows(FakeEngine(failpoints={"unet": Failpoint("nan", rows=[0])}), rows, SIDE, SIDE, arithmetic)
    while running.active:
        running.tick()
    with pytest.raises(NumericalError, match="not finite"):
        running.check()
    torch.testing.assert_close(running.latents[1], alone(arithmetic, seed=2, negative=None))


def test_latents_come_and_go_in_the_callers_order(arithmetic: Arithmetics) -> None:
    rows = [row(seed=i, negative=None if i % 2 else -5.0) for i in range(5)]
    running = Rows(FakeEngine([Span(low=1, high=16)]), rows, SIDE, SIDE, arithmetic)
    given = torch.stack([r.latents for r in rows])
    assert torch.equal(running.latents, given)
    running.latents = given.flip(0)
    assert torch.equal(running.latents, given.flip(0))


def test_latents_given_out_do_not_change_with_the_next_tick(arithmetic: Arithmetics) -> None:
    running = Rows(FakeEngine(), [row()], SIDE, SIDE, arithmetic)
    before = running.latents
    kept = before.clone()
    running.tick()
    assert torch.equal(before, kept)


def test_shared_noise_is_one_draw_for_all_rows_and_own_noise_is_not() -> None:
    shared = SharedNoise(generator(7), 3, SHAPE)
    source = generator(7)
    assert torch.equal(shared.initial(), torch.randn(3, *SHAPE, generator=source))
    drawn = torch.randn(3, *SHAPE, generator=source)
    assert all(torch.equal(shared.of_row(i)(0), drawn[i]) for i in range(3))
    later = torch.randn(3, *SHAPE, generator=source)
    assert torch.equal(shared.of_row(2)(5), later[2])
    own = OwnNoise([generator(7), generator(8)], SHAPE)
    assert torch.equal(own.initial()[1], torch.randn(1, *SHAPE, generator=generator(8))[0])


def test_rescaled_guidance_has_the_spread_of_the_positive_output() -> None:
    guided, positive = torch.randn(2, 4, 8, 8) * 5, torch.randn(2, 4, 8, 8)
    whole = rescale_guidance(guided, positive, torch.ones(2, 1, 1, 1))
    axes = (1, 2, 3)
    torch.testing.assert_close(whole.std(dim=axes), positive.std(dim=axes))
    none = rescale_guidance(guided, positive, torch.zeros(2, 1, 1, 1))
    assert torch.equal(none, guided)


def test_a_failing_network_is_not_hidden(arithmetic: Arithmetics) -> None:
    running = Rows(
        FakeEngine(failpoints={"unet": Failpoint("raise", after=1)}), [row()], SIDE, SIDE, arithmetic
    )
    running.tick()
    with pytest.raises(BackendError, match="failpoint"):
        running.tick()


def test_half_precision_stays_between_the_network_and_the_registers(arithmetic: Arithmetics) -> None:
    kinds = {"name": "dpmpp_2m_karras", "steps": 6, "guidance": 7.5, "rescale": 0.3}
    engine = FakeEngine(dtype=torch.float16)
    running = Rows(engine, [row(**kinds)], SIDE, SIDE, arithmetic)
    while running.active:
        running.tick()
    assert running.latents.dtype == torch.float32
    difference = running.latents[0] - alone(arithmetic, **kinds)
    assert 0 < difference.norm() < 5e-3 * running.latents.norm()


@pytest.mark.parametrize("lines", [1, 2, 3, 100])
def test_noise_on_a_device_comes_in_windows(monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    """However many steps' noise has room there, a row sees the same numbers; one alone, and a mixed six."""
    wanted = [alone(HostArithmetic, **kinds) for kinds in MIXED]
    numbers = 4 * 2 * 2 * 4  # bytes
    monkeypatch.setattr(device, "NOISE", lines * len(MIXED) * numbers)
    rows = [row(**kinds) for kinds in MIXED]
    together = run(FakeEngine([Span(low=1, high=16)]), rows, DeviceArithmetic)
    for latents, due in zip(together, wanted, strict=True):
        torch.testing.assert_close(latents, due, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lines", [1, 2, 100])
def test_rows_that_share_a_generator_share_their_windows(monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    def sharing() -> list[Row]:
        noise, chosen = SharedNoise(generator(7), 3, SHAPE), plan("euler_a", 6)
        first = noise.initial() * chosen.init_noise_sigma
        return [Row(chosen, first[i], told(chosen, 10.0 * i), None, 1.0, noise.of_row(i)) for i in range(3)]

    due = run(FakeEngine(), sharing(), HostArithmetic)
    monkeypatch.setattr(device, "NOISE", lines * 3 * 4 * 2 * 2 * 4)
    torch.testing.assert_close(run(FakeEngine(), sharing(), DeviceArithmetic), due, rtol=1e-5, atol=1e-5)


def test_tensors_are_left_to_the_next_rows(arithmetic: Arithmetics) -> None:
    """And nothing of the last ones is left in them, however far those got."""
    engine, buckets = FakeEngine([Span(low=1, high=16)]), Buckets()
    binds: list[object] = []
    bind = engine.bind
    engine.bind = lambda *given: binds.append(given) or bind(*given)  # type: ignore[method-assign]
    for ticks, kinds in enumerate([MIXED, MIXED[::-1], MIXED]):
        running = Rows(engine, [row(**k) for k in kinds], SIDE, SIDE, arithmetic, buckets)
        for _ in range(ticks * 3 + 1):
            running.tick()
        running.latents = torch.full_like(running.latents, torch.nan)
        running.tick()
        running.close()
    running = Rows(engine, [row(**k) for k in MIXED], SIDE, SIDE, arithmetic, buckets)
    while running.active:
        running.tick()
    assert len(binds) == 1
    for kinds, latents in zip(MIXED, running.latents, strict=True):
        torch.testing.assert_close(latents, alone(arithmetic, **kinds), rtol=1e-5, atol=1e-5)


def test_rows_at_the_same_time_have_tensors_of_their_own(arithmetic: Arithmetics) -> None:
    engine, buckets = FakeEngine(), Buckets()
    one, two = (Rows(engine, [row(seed=i)], SIDE, SIDE, arithmetic, buckets) for i in range(2))
    while one.active:
        one.tick()
        two.tick()
    torch.testing.assert_close(one.latents[0], alone(arithmetic, seed=0))
    torch.testing.assert_close(two.latents[0], alone(arithmetic, seed=1))


def test_only_the_most_recent_tensors_wait() -> None:
    buckets, made = Buckets(most=2), list[str]()

    def take(key: str) -> object:
        return buckets.take((key,), lambda: made.append(key) or key)  # type: ignore[return-value,arg-type]

    for key in ("a", "b", "c"):
        buckets.give((key,), take(key))  # type: ignore[arg-type]
    assert made == ["a", "b", "c"]
    assert [take("c"), take("b"), take("a")] == ["c", "b", "a"]
    assert made == ["a", "b", "c", "a"]  # the oldest was let go
    assert take("c") == "c" and made[-1] == "c"  # what is taken is not there for another


class NothingFromTheHost(TorchDispatchMode):
    """Raises where a tensor is given a number of the host by a copy: on a GPU, that is waited for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].dim() == 0:
            raise AssertionError(f"a number is copied into {list(args[0].shape)}")
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a number is read")
        return func(*args, **(kwargs or {}))


def test_ticks_on_a_device_copy_no_number_from_the_host() -> None:
    """Rows end at different ticks; what waits for a real device, only that can show: see test_cuda."""
    running = Rows(FakeEngine(), [row(**kinds) for kinds in MIXED], SIDE, SIDE, DeviceArithmetic)
    with NothingFromTheHost():
        while running.active:
            running.tick()
