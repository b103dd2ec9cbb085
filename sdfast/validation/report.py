"""The report of a validation: every figure, the bar it had to meet, and the verdict in words."""

import math

from pydantic import BaseModel, ConfigDict

from sdfast.manifest import Rounding
from sdfast.validation.metrics import IDENTICAL_DB


class _Part(BaseModel):
    # Figures that are not finite are results too: they go into the JSON as "NaN" and "Infinity".
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class ModuleFigures(_Part):
    """The error of one module against float32 stock, over `inputs` inputs.

    relative_l2: all inputs together; worst: that of the worst input. stock_relative_l2: the error of stock
    diffusers in the engine's own reduced precision, or in `stock_dtype`. measure: the name of the figure that
    had to meet `bar`.
    """

    name: str
    what: str
    inputs: int
    relative_l2: float
    worst: float
    max_abs: float
    cosine: float
    stock_relative_l2: float | None
    stock_dtype: str | None = None
    measure: str
    bar: float
    passed: bool


class PictureFigures(_Part):
    """One picture against float32 stock. drift: relative L2 of the latents after each step.

    stock_*: the same figures of stock diffusers in the engine's own reduced precision. `bar` in dB, where the
    picture has one of its own.
    """

    scheduler: str
    prompt: str
    seed: int
    psnr: float
    ssim: float
    relative_l2: float
    max_abs: float
    drift: tuple[float, ...]
    bar: float | None
    passed: bool
    stock_psnr: float | None
    stock_ssim: float | None
    stock_relative_l2: float | None
    stock_drift: tuple[float, ...]


class Check(_Part):
    """Something that holds or does not."""

    name: str
    passed: bool
    detail: str


class Price(_Part):
    """What guidance in a share of the steps saves and costs: another picture, so no failure.

    rows: of the U-Net's, of those with guidance in all steps. psnr_min, ssim_min: of the picture that is the
    furthest from the reference's with guidance in all steps.
    """

    guidance_start: float
    guidance_end: float
    rows: float
    psnr_min: float
    ssim_min: float

    def __str__(self) -> str:
        return (
            f"the price of guidance from {self.guidance_start:.0%} to {self.guidance_end:.0%} of the steps: "
            f"{self.rows:.0%} of the U-Net's rows, and the furthest picture is {decibels(self.psnr_min)} dB "
            f"(SSIM {self.ssim_min:.3f}) from the reference's with guidance in all"
        )


class CachePrice(_Part):
    """What step caching saves and costs: another picture, so no failure.

    seconds: of the pictures, as a share of those without. psnr_min, ssim_min: of the picture that is the
    furthest from the reference's without.
    """

    cache_interval: int
    branch: int
    seconds: float
    psnr_min: float
    ssim_min: float

    def __str__(self) -> str:
        return (
            f"the price of one whole step in {self.cache_interval}, the others up to branch {self.branch}: "
            f"{self.seconds:.0%} of the time, and the furthest picture is {decibels(self.psnr_min)} dB "
            f"(SSIM {self.ssim_min:.3f}) from the reference's, all of whose steps are whole"
        )


class Failure(_Part):
    """Why the engine failed: the part at fault, and what is wrong with it."""

    part: str
    reason: str


class Setting(_Part):
    """What was compared, how, and where.

    fp8, int8: how many layers of the engine's U-Net are in FP8, or in INT8. inpaints: whether all pictures
    were drawn over the masked part of one image; refines: over the whole of it; instructed: whether all edit
    it. controlnet: that all were drawn with, under one control image. vae: in the place of the checkpoint's
    own, in both. loras: that were merged into the engine, and fused into the reference, each with its scale;
    and those that requests choose, of which all was added. embeddings: that both know. ip_adapters: that all
    were drawn with, each with an image.
    """

    engine: str
    folder: str
    backend: str
    dtype: str
    fp8: int = 0
    int8: int = 0
    inpaints: bool = False
    refines: bool = False
    instructed: bool = False
    controlnet: str | None = None
    vae: str | None = None
    ip_adapters: tuple[str, ...] = ()
    device: str
    checkpoint: str
    loras: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    reference: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int
    machine: str
    versions: dict[str, str]
    created: str
    seconds: float

    @property
    def rounding(self) -> Rounding | None:
        """What those layers of the U-Net are in that are approximated."""
        return "FP8" if self.fp8 else "INT8" if self.int8 else None


class Report(_Part):
    """A validation. `failures` is empty when the engine passed; `notes` says what was not looked at."""

    setting: Setting
    modules: tuple[ModuleFigures, ...]
    pictures: tuple[PictureFigures, ...]
    checks: tuple[Check, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...] = ()
    guidance: Price | None = None
    step_cache: CachePrice | None = None

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def verdict(self) -> str:
        """One line: passed, or the first reason why not."""
        if self.passed:
            return f"passed: {self.setting.engine} makes the picture of {self.setting.reference}"
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        return f"failed: {self.failures[0].part}: {self.failures[0].reason}{more}"

    @property
    def prices(self) -> list[str]:
        """What approximations cost that were asked for by name."""
        rounding = [self._price_of_rounding()] if self.setting.rounding else []
        return rounding + [str(price) for price in (self.guidance, self.step_cache) if price is not None]

    def _price_of_rounding(self) -> str:
        """The error, and in a reduced precision that of stock in it."""
        unet, setting = next(module for module in self.modules if module.name == "unet"), self.setting
        stock = ["", ""]
        if unet.stock_relative_l2 is not None:
            stock = [
                f", that of stock in {setting.dtype} {unet.stock_relative_l2:.2e}",
                f", stock's {decibels(self._stock_furthest)} dB",
            ]
        return (
            f"the price of {setting.rounding} in {setting.fp8 or setting.int8} layers: the U-Net's relative "
            f"L2 is {unet.relative_l2:.2e}{stock[0]}; the furthest picture is {decibels(self._furthest)} dB "
            f"from the reference{stock[1]}"
        )

    @property
    def _furthest(self) -> float:
        return min(picture.psnr for picture in self.pictures)

    @property
    def _stock_furthest(self) -> float:
        return min((p.stock_psnr for p in self.pictures if p.stock_psnr is not None), default=math.nan)

    @property
    def stand_in(self) -> str | None:
        """What is held to stock in another precision than the engine's, and why. None where nothing is."""
        held = [module for module in self.modules if module.stock_dtype is not None]
        if not held:
            return None
        names = ", ".join(module.name for module in held)
        return (
            "stock diffusers keeps this VAE in float32, since float16 would overflow, and the engine's is "
            f"{self.setting.dtype}: stock's VAE in {held[0].stock_dtype} sets the bar of {names}, and stock "
            "as it is that of the pictures"
        )

    def figures(self) -> dict[str, float]:
        """The figures that enter the engine's manifest."""
        found = {f"{module.name}.relative_l2": module.relative_l2 for module in self.modules}
        found["picture.psnr_min"] = self._furthest
        if self.setting.fp8:
            found["stock.picture.psnr_min"] = self._stock_furthest
        found["picture.ssim_min"] = min(picture.ssim for picture in self.pictures)
        found["latents.relative_l2_max"] = max(
            (p.drift[-1] for p in self.pictures if p.drift), default=math.nan
        )
        return found

    def table(self) -> str:
        """Everything that matters, as aligned plain text."""
        setting = self.setting
        lines = [
            f"{setting.engine}: {setting.backend} {setting.dtype}"
            f"{f' with {setting.rounding}' if setting.rounding else ''} on {setting.device}, "
            f"against {setting.reference}",
            *(f"with LoRA {lora}" for lora in setting.loras),
            *([f"with ControlNet {setting.controlnet}"] if setting.controlnet else []),
            *([f"with the VAE of {setting.vae}"] if setting.vae else []),
            *(f"with IP-Adapter {adapter}" for adapter in setting.ip_adapters),
            *(f"with embedding {embedding}" for embedding in setting.embeddings),
            f"{setting.width}x{setting.height}, {setting.steps} steps, guidance {setting.guidance_scale:g}, "
            f"seed {setting.seed}{', over the masked part of one image' * setting.inpaints}"
            f"{', over one image' * setting.refines}{', each edits one image' * setting.instructed}",
            "",
            *_columns(_MODULE_HEAD, [_module_line(module) for module in self.modules]),
            "",
            *_columns(_PICTURE_HEAD, [_picture_line(picture) for picture in self.pictures]),
            "",
            *_columns(("check", "", ""), [(c.name, c.detail, _mark(c.passed)) for c in self.checks]),
            *[f"\n{price}" for price in self.prices],
            *([f"\n{self.stand_in}"] if self.stand_in else []),
            *[f"\nnote: {note}" for note in self.notes],
            "",
            *([f"passed in {setting.seconds:.1f} s"] if self.passed else self._failed()),
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _failed(self) -> list[str]:
        return ["FAILED", *(f"  {failure.part}: {failure.reason}" for failure in self.failures)]


_MODULE_HEAD = ("module", "relative L2", "worst", "stock", "bar", "max abs", "cosine", "")
_PICTURE_HEAD = ("picture", "scheduler", "PSNR dB", "stock dB", "SSIM", "last latents", "")


def _module_line(module: ModuleFigures) -> tuple[str, ...]:
    stock = "" if module.stock_relative_l2 is None else f"{module.stock_relative_l2:.2e}"
    return (
        module.name,
        f"{module.relative_l2:.2e}",
        f"{module.worst:.2e}",
        stock,
        f"{module.bar:.2e}",
        f"{module.max_abs:.2e}",
        f"{module.cosine:.9f}",
        _mark(module.passed),
    )


def _picture_line(picture: PictureFigures) -> tuple[str, ...]:
    prompt = picture.prompt if len(picture.prompt) <= 44 else picture.prompt[:43] + "…"
    drift = f"{picture.drift[-1]:.2e}" if picture.drift else ""
    return (
        prompt,
        picture.scheduler,
        decibels(picture.psnr),
        "" if picture.stock_psnr is None else decibels(picture.stock_psnr),
        f"{picture.ssim:.6f}",
        drift,
        _mark(picture.passed),
    )


def decibels(psnr: float) -> str:
    return "equal" if psnr >= IDENTICAL_DB else f"{psnr:.1f}"


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def _columns(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    """Lines of cells under a head, each column as wide as its widest cell; empty columns are left out."""
    rows = [head, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    used = [i for i in range(len(head)) if any(row[i] for row in lines)]
    return ["  ".join(row[i].ljust(widths[i]) for i in used) for row in rows]
