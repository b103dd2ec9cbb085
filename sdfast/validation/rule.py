"""The rule: what a figure has to be for an engine to pass.

In float32 a module's relative L2 error is at most 1e-4 for every input, and every picture is at least 45 dB
from the reference. In a reduced precision the bar is the truth, not a constant: against float32 stock, the
engine's error is at most 1.1 times that of stock diffusers in the same precision, in every module and in the
pictures taken together, because rounding is chance in any one of them. No bar is lower than that of float32:
an engine need not be more exact than that. A figure that is not a number meets no bar.

Stock keeps SDXL's VAE in float32, because in float16 it would overflow. An engine whose VAE is float16 cannot
meet the error of one in float32; its VAE's halves are held to stock's own in bfloat16, the half precision
that stock's can run in. The bar of the pictures, which decides, is that of stock as it is.

FP8 and INT8 are approximations: what they touch has bars of its own, and the report says what it costs. With
FP8 the U-Net's relative L2 error is at most 1/8, the step from 1 to the next number of E4M3; that of the
pictures taken together at most 1/5, near 20 dB, beyond which they show something else. With INT8, which is
finer, both are half of that. The rest is held to stock.
"""

import math
from collections.abc import Mapping, Sequence

from sdfast.manifest import SHALLOW, Rounding
from sdfast.validation.metrics import compare, psnr, ssim
from sdfast.validation.modules import Measured
from sdfast.validation.pictures import Picture, Repetition
from sdfast.validation.report import Check, Failure, ModuleFigures, PictureFigures

RELATIVE_L2 = 1e-4
PICTURE_DB = 45.0
STOCK_FACTOR = 1.1
_UNET = ("unet", "step", "deep", SHALLOW)
BARS: Mapping[Rounding, Mapping[str, float]] = {
    "FP8": {**dict.fromkeys(_UNET, 1 / 8), "pictures": 1 / 5},
    "INT8": {**dict.fromkeys(_UNET, 1 / 16), "pictures": 1 / 10},
}
_WHOSE = {RELATIVE_L2: "float32", **{bar: kind for kind, bars in BARS.items() for bar in bars.values()}}


def judge_module(measured: Measured, *, rounding: Rounding | None = None) -> ModuleFigures:
    """A module's figures beside its bar. rounding: what layers of the engine's U-Net are in."""
    error, stock = measured.error, measured.stock
    bar = RELATIVE_L2 if stock is None else max(RELATIVE_L2, STOCK_FACTOR * stock.relative_l2)
    approximated = rounding is not None and measured.name in BARS[rounding]
    if rounding is not None:
        bar = BARS[rounding].get(measured.name, bar)
    exact = stock is None and not approximated
    value = error.worst if exact else error.relative_l2
    return ModuleFigures(
        name=measured.name,
        what=measured.what,
        inputs=error.inputs,
        relative_l2=error.relative_l2,
        worst=error.worst,
        max_abs=error.max_abs,
        cosine=error.cosine,
        stock_relative_l2=None if stock is None else stock.relative_l2,
        stock_dtype=measured.stock_dtype,
        measure="relative L2 of the worst input" if exact else "relative L2",
        bar=bar,
        passed=value <= bar,
    )


def judge_picture(picture: Picture, scheduler: str, *, rounding: Rounding | None = None) -> PictureFigures:
    """A picture's figures; in float32 without rounding it has a bar of its own."""
    truth, same = picture.truth.image, picture.same.image if picture.same else None
    error = compare([(picture.image, truth)])
    value = psnr(picture.image, truth)
    bar = PICTURE_DB if same is None and rounding is None else None
    return PictureFigures(
        scheduler=scheduler,
        prompt=picture.request.prompts[0],
        seed=picture.request.seed,
        psnr=value,
        ssim=ssim(picture.image, truth),
        relative_l2=error.relative_l2,
        max_abs=error.max_abs,
        drift=tuple(picture.drift),
        bar=bar,
        passed=value >= (PICTURE_DB if bar is not None else 0.0),
        stock_psnr=None if same is None else psnr(same, truth),
        stock_ssim=None if same is None else ssim(same, truth),
        stock_relative_l2=None if same is None else compare([(same, truth)]).relative_l2,
        stock_drift=tuple(picture.stock_drift),
    )


def measured_pictures(pictures: Sequence[Picture], *, rounding: Rounding | None = None) -> list[Measured]:
    """In a reduced precision, or with rounding: all pictures as one more thing that has a bar to meet."""
    reduced = [(p.same.image, p.truth.image) for p in pictures if p.same is not None]
    if not reduced and rounding is None:
        return []
    error = compare((picture.image, picture.truth.image) for picture in pictures)
    return [Measured("pictures", "all pictures together", error, compare(reduced) if reduced else None)]


def judge_repetition(
    repetition: Repetition,
    whole: Sequence[Measured],
    scheduler: str,
    *,
    rounding: Rounding | None = None,
) -> list[Check]:
    """Same seed, same bytes; and a batch changes a picture by no more than rounding may.

    whole: what `measured_pictures` gave.
    """
    apart = compare(repetition.batched)
    close = all(psnr(batched, alone) >= PICTURE_DB for batched, alone in repetition.batched)
    if whole:
        close = apart.relative_l2 <= judge_module(whole[0], rounding=rounding).bar
    same = "the same bytes" if repetition.repeated else "other bytes"
    return [
        Check(
            name=f"repeatable, {scheduler}",
            passed=repetition.repeated,
            detail=f"the same request again gives {same}",
        ),
        Check(
            name=f"batch, {scheduler}",
            passed=close,
            detail=f"batched and alone: relative L2 {apart.worst:.1e}, max abs {apart.max_abs:.1e}",
        ),
    ]


def failures(
    modules: Sequence[ModuleFigures], pictures: Sequence[PictureFigures], checks: Sequence[Check]
) -> list[Failure]:
    """Every reason why an engine does not pass, the most telling first: checks, modules, pictures."""
    found = [Failure(part=check.name, reason=check.detail) for check in checks if not check.passed]
    found += [
        Failure(part=module.name, reason=_module_reason(module)) for module in modules if not module.passed
    ]
    found += [Failure(part="picture", reason=_picture_reason(p)) for p in pictures if not p.passed]
    return found


def _module_reason(module: ModuleFigures) -> str:
    value = module.relative_l2 if module.measure == "relative L2" else module.worst
    if math.isnan(value):
        return "its output holds values that are not numbers"
    precision = module.stock_dtype or "this precision"
    of = f"{module.bar:.2e}, which is {STOCK_FACTOR:g} x the error of stock diffusers in {precision}"
    if module.bar in _WHOSE:
        of = f"{module.bar:g}, the bar of {_WHOSE[module.bar]}"
    return f"{module.measure} {value:.2e} is above {of} ({module.what})"


def _picture_reason(picture: PictureFigures) -> str:
    of = f'"{picture.prompt}" with {picture.scheduler}, seed {picture.seed}'
    if math.isnan(picture.psnr):
        return f"{of}: the picture holds values that are not numbers"
    return f"{of}: {picture.psnr:.1f} dB from the reference is below {PICTURE_DB:g} dB"
