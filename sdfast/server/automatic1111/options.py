"""AUTOMATIC1111's options: which checkpoint is drawn with, and what the others are here."""

from collections.abc import Mapping
from typing import Any

from sdfast.emphasis import Emphasis
from sdfast.server.jobs import EngineInfo, Studio
from sdfast.server.problems import Problem

CHECKPOINT, DIGEST, CLIP_SKIP = "sd_model_checkpoint", "sd_checkpoint_hash", "CLIP_stop_at_last_layers"
VAE = "sd_vae"
EMPHASIS = "emphasis"
EMPHASES: Mapping[str, Emphasis | None] = {
    "Original": "original",
    "No norm": "no_norm",
    "Ignore": "ignore",
    "None": None,
}
"""AUTOMATIC1111's names, its default first."""
MAX_CLIP_SKIP = 12  # AUTOMATIC1111's

_FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    VAE: (("Automatic", "None"), "an engine has its VAE inside"),
    "samples_format": (("png",), "pictures are PNG here"),
    "enable_pnginfo": ((True,), "PNGs have their parameters inside"),
    "comma_padding_backtrack": ((20,), "long prompts are parted at commas as with AUTOMATIC1111's default"),
    "randn_source": (("CPU",), "noise is drawn on the CPU, the same for every device"),
    "eta_noise_seed_delta": ((0,), "noise is of the picture's seed"),
    "eta_ddim": ((0, 0.0), "give eta in the request"),
    "eta_ancestral": ((1, 1.0), "ancestral samplers do whole ancestral steps"),
    "s_churn": ((0, 0.0), "samplers add no noise of their own"),
    "s_min_uncond": ((0, 0.0), "every step has its negative prompt"),
    "img2img_fix_steps": ((False,), "img2img does as many steps as denoising_strength says"),
    "img2img_color_correction": ((False,), "colours are as the engine draws them"),
    "img2img_background_color": (("#ffffff",), "transparent images are drawn over on white"),
    "initial_noise_multiplier": ((1, 1.0), "noise has its scheduler's strength"),
    "inpainting_mask_weight": ((1, 1.0), "a mask is whole"),
    "token_merging_ratio": ((0, 0.0), "tokens are not merged"),
    "face_restoration": ((False,), "faces are as the engine draws them"),
    "tiling": ((False,), "pictures are not made to tile"),
    "return_grid": ((False,), "pictures come one by one"),
    "live_previews_enable": ((True,), "whoever polls without skip_current_image gets pictures"),
    "use_old_karras_scheduler_sigmas": ((False,), "Karras's levels are those of the checkpoint"),
}
"""Options with the values that are true here, the first of which is told, and why there are no others."""

NAMES = (CHECKPOINT, DIGEST, CLIP_SKIP, EMPHASIS, *_FIXED)


def short_hash(engine: EngineInfo) -> str:
    return engine.unet_digest[:10]


def title(engine: EngineInfo) -> str:
    """The checkpoint's name as AUTOMATIC1111 writes it."""
    return f"{engine.name} [{short_hash(engine)}]"


def list_models(studio: Studio) -> list[dict[str, Any]]:
    """`GET /sdapi/v1/sd-models`: the engines. Where their files are is nobody's business."""
    return [
        {
            "title": title(engine),
            "model_name": engine.name,
            "hash": short_hash(engine),
            "sha256": engine.unet_digest,
            "filename": engine.name,
            "config": None,
        }
        for engine in studio.engines.values()
    ]


class Options:
    """The options of one server. The checkpoint is for all its clients, as in AUTOMATIC1111."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._chosen: str | None = None

    @property
    def engine(self) -> EngineInfo:
        """What is drawn with where a request names no checkpoint; the first one at first."""
        engines = self._studio.engines
        return engines[self._chosen] if self._chosen else next(iter(engines.values()))

    def told(self) -> dict[str, Any]:
        """`GET /sdapi/v1/options`."""
        fixed = {name: values[0] for name, (values, _) in _FIXED.items()}
        checkpoint = {CHECKPOINT: title(self.engine), DIGEST: self.engine.unet_digest}
        return {**checkpoint, CLIP_SKIP: 1, EMPHASIS: next(iter(EMPHASES)), **fixed}

    def set(self, given: Mapping[str, Any]) -> None:
        """`POST /sdapi/v1/options`, all of it or nothing. Raises `Problem`."""
        for name, usual in ((CLIP_SKIP, 1), (EMPHASIS, next(iter(EMPHASES)))):
            if (given.get(name) or usual) != usual:
                raise _refused(name, given[name], "put it into a request's override_settings")
        engine = self.chosen(given, "")
        if given.get(CHECKPOINT) is not None:
            self._chosen = engine.name

    def chosen(self, given: Mapping[str, Any], where: str = "override_settings.") -> EngineInfo:
        """The engine that the settings lead to. Raises `Problem` for one that cannot be had."""
        for name, value in given.items():
            if name not in NAMES:
                known = ", ".join(NAMES)
                raise Problem(
                    422, f"{where}{name:.60}: is not supported; leave it out. Known are: {known}", param=name
                )
            fixed = name in _FIXED and name != VAE and value is not None
            if fixed and not _among(value, _FIXED[name][0]):
                raise _refused(where + name, value, _FIXED[name][1])
        if given.get(DIGEST) not in (None, self.engine.unet_digest):
            raise _refused(where + DIGEST, given[DIGEST], f"it is told, not set; name the {CHECKPOINT}")
        checkpoint = given.get(CHECKPOINT)
        engine = self.engine if checkpoint is None else self._find(checkpoint, where + CHECKPOINT)
        usual, reason = _FIXED[VAE]
        own = usual if engine.vae is None else (*usual, engine.vae[0])
        if given.get(VAE) not in (None, *own):
            raise _refused(where + VAE, given[VAE], reason)
        return engine

    def refiner(self, checkpoint: str) -> EngineInfo:
        """The engine that goes on with pictures. Raises `Problem` for one that cannot be had."""
        return self._find(checkpoint, "refiner_checkpoint")

    def _find(self, checkpoint: Any, field: str) -> EngineInfo:
        """By its title, name, or hash."""
        for engine in self._studio.engines.values():
            if checkpoint in (title(engine), engine.name, short_hash(engine), engine.unet_digest):
                return engine
        there = ", ".join(map(title, self._studio.engines.values()))
        raise Problem(
            404, f"{field}: {checkpoint!r:.60} is not here; there are: {there}", param=CHECKPOINT,
            code="model_not_found", short="Model not found",
        )  # fmt: skip


def clip_skip_of(given: Mapping[str, Any], engine: EngineInfo) -> int | None:
    """How many layers are left out, which AUTOMATIC1111 counts from 1. Raises `Problem`.

    SDXL is trained on its last layer but one: there 1 and 2 both mean that one.
    """
    layers = given.get(CLIP_SKIP)
    if layers is None:
        return None
    most = 2 if engine.family == "sdxl" else MAX_CLIP_SKIP
    if type(layers) is not int or not 1 <= layers <= most:
        raise _refused(f"override_settings.{CLIP_SKIP}", layers, f"must be a whole number from 1 to {most}")
    return layers - 1 if layers > 1 and engine.family != "sdxl" else None


def emphasis_of(given: Mapping[str, Any]) -> Emphasis | None:
    """How a prompt's brackets count. Raises `Problem`."""
    name = given.get(EMPHASIS)
    if name is None:
        return next(iter(EMPHASES.values()))
    if not isinstance(name, str) or name not in EMPHASES:
        raise _refused(f"override_settings.{EMPHASIS}", name, f"must be one of {', '.join(EMPHASES)}")
    return EMPHASES[name]


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether it is one of them; false is not 0."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)


def _refused(name: str, value: Any, reason: str) -> Problem:
    return Problem(422, f"{name}: {value!r:.60} is not supported: {reason}", param=name.rpartition(".")[2])
