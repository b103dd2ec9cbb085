"""Recipes: what to build, as a TOML file or as arguments."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sdfast.errors import ExportError
from sdfast.manifest import LONG_PROMPTS, ONE_CHUNK, LoraName, Span
from sdfast.request import MAX_IMAGES, MAX_IP_ADAPTERS, MAX_SIDE

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_RECORDED = "recorded"  # the context in which an engine's own recipe is read


def _size(text: str) -> str:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("must be WIDTHxHEIGHT in pixels, such as '512x512'")
    for side in map(int, match.groups()):
        if side % 8 or not 8 <= side <= MAX_SIDE:
            raise ValueError(f"sides are multiples of 8 from 8 to {MAX_SIDE} pixels")
    return text


Size = Annotated[str, AfterValidator(_size)]
LayerPattern = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_IMAGES)]


def sides(size: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT"."""
    width, height = size.split("x")
    return int(height), int(width)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SizeRange(_Part):
    """Any size between two: one graph with free axes serves them all."""

    min: Size
    max: Size

    @property
    def spans(self) -> tuple[Span, Span]:
        """The spans of the height and of the width, in pixels."""
        low, high = sides(self.min), sides(self.max)
        return Span(low=low[0], high=high[0]), Span(low=low[1], high=high[1])

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = sides(self.min), sides(self.max)
        if low[0] > high[0] or low[1] > high[1]:
            raise ValueError(f"min {self.min!r} is larger than max {self.max!r}")
        return self


def _path_as_text(given: Any) -> Any:
    return os.fspath(given) if isinstance(given, os.PathLike) else given


class FileSetting(_Part):
    """Something in a file of its own. A text in its place is its source.

    source: a .safetensors file, a folder that holds one, or a Hub id.
    weight_name: which file of a folder or Hub repository, where it is not plain.
    revision: branch, tag or commit on the Hub.
    """

    source: Annotated[str, Field(min_length=1), BeforeValidator(_path_as_text)]
    weight_name: str | None = None
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str | os.PathLike) else given


class LoraSetting(FileSetting):
    """A LoRA to be merged into the weights, or to be chosen by requests.

    scale: how much of it is merged: 1 is all, 0 nothing, less than that the opposite.
    on_request: it is not merged; each request says how much of it is added, by default nothing.
    name: what requests call it. Default: the name of its file, or of the folder or repository where diffusers
        names all files alike.
    """

    scale: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 1.0
    on_request: Annotated[bool, Field(strict=True)] = False
    name: LoraName | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.on_request and self.scale != 1.0:
            raise ValueError("scale: requests say that of a LoRA which is on_request; leave one of them out")
        if self.name is not None and not self.on_request:
            raise ValueError("name: is for a LoRA that is on_request; a merged one has none")
        return self


class EmbeddingSetting(FileSetting):
    """An embedding (textual inversion) that the text encoders are to know.

    token: what stands for it in prompts. Default: what its file names, else the file's own name.
    """

    token: Annotated[str, Field(min_length=1)] | None = None


class IPAdapterSetting(FileSetting):
    """An IP-Adapter that pictures may be drawn with.

    weight_name: as above, and subfolder: where it lies there, as with diffusers' load_ip_adapter.
    """

    subfolder: str | None = None

    @model_validator(mode="after")
    def _named_in_a_folder(self) -> Self:
        if self.subfolder is not None and self.weight_name is None:
            raise ValueError("subfolder: give weight_name too, the name of the file there")
        return self

    def as_file(self) -> FileSetting:
        """The file that is meant, by its whole name in the folder or repository."""
        name = self.weight_name if not self.subfolder else f"{self.subfolder.strip('/')}/{self.weight_name}"
        return FileSetting(source=self.source, weight_name=name, revision=self.revision)


class ComponentSetting(_Part):
    """A network with a source of its own. A text in its place is its source.

    source: a diffusers folder of it, a .safetensors file, or a Hub id.
    revision, variant: as those of the checkpoint.
    """

    source: Annotated[str, Field(min_length=1), BeforeValidator(_path_as_text)]
    revision: str | None = None
    variant: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, given: Any) -> Any:
        if isinstance(given, str | os.PathLike):
            return {"source": given}
        if not isinstance(given, Mapping | cls):  # such as a network that was loaded already
            raise ValueError(
                "must be a folder, a file or a Hub id, or a table of source, revision and variant"
            )
        return given


class ControlNetSetting(ComponentSetting):
    """A ControlNet to be put beside the U-Net."""


_PRECISIONS = ("auto", "fp32")


class VAESetting(ComponentSetting):
    """A VAE to take the place of the checkpoint's own. Its folder may be a whole checkpoint's."""

    @model_validator(mode="before")
    @classmethod
    def _no_precision(cls, given: Any) -> Any:
        if given in _PRECISIONS:
            raise ValueError(f"is the source of another VAE; the precision is vae_dtype = {given!r}")
        return given


def _one_or_several(given: Any) -> Any:
    """A list of what may also be one of it, or none."""
    if given is None:
        return ()
    return given if isinstance(given, (list, tuple)) else (given,)


class Recipe(_Part):
    """How to build one engine.

    sizes: a list of "WIDTHxHEIGHT", each compiled for itself, or {min, max}; default: the checkpoint's own,
        or of optimum's graphs all that they take.
    batch: the most pictures of one call into the networks (any number up to it), or a list of exact numbers,
        each compiled for itself.
    provider: ONNX: the execution provider that the graphs are written for; they run on no other. Default:
        "cpu" in fp32, "cuda" in fp16.
    device: "inductor", and no other: what it is compiled for, the very device that is here; default: "cpu" in
        fp32, "cuda" in fp16.
    autotune: "inductor": try the kernels for attention, and on CUDA the ways to compute each product, and
        take the fastest; default: on CUDA. A CPU has the kernels alone, which are tried for fixed sizes and
        batches.
    kernels: "inductor" on CUDA: "auto" (default) tries sdfast's own too when autotuning fixed sizes, and
        takes each where it is faster than the compiler's; "compiler" never takes one.
    winograd: ONNX for the CPU: the faster algorithm for 3×3 convolutions in fp32; its weights take more room.
        Default there: true.
    fp8: "inductor" and "eager" in fp16: the U-Net's linear layers in FP8, and those 3×3 convolutions that are
        faster so, an approximation. For GPUs of compute capability 8.9 and above; eager engines of it, with
        all convolutions in FP8, also run on a CPU, slowly, for checks.
    int8: "onnx" for the CPU and "eager", in fp32: the U-Net's linear layers in INT8, an approximation. Of x86
        for processors with VNNI; eager engines of it run anywhere, slowly, for checks.
    long_prompts: "inductor": a further form of the U-Net, for prompts of more than 75 tokens; the one for
        shorter ones stays as it is. Default: false. Engines of other backends take long prompts anyway.
    vae: what takes the place of the checkpoint's own VAE.
    vae_dtype: of fp16 engines: "auto" (default), float16 wherever the VAE's numbers can be made to fit, or
        "fp32".
    loras: what is merged into the weights, and what requests choose; several add up.
    controlnet: under whose guidance every picture is drawn, by a control image; one, or a list of several, of
        which each has a control image.
    embeddings: what tokens in prompts stand for.
    ip_adapters: what images can be told to the U-Net by, beside the prompt.
    image_encoder: the folder of what they see images with, on this disk or within the first one's
        repository. Default: the checkpoint's own, or else image_encoder beside the first one's file.
    cache_branch: make shallow steps of the U-Net too, for requests with a `cache_interval`: an approximation,
        see `sdfast.models.step_cache`. The skip up to which they go: 0 is the usual one, the fastest; later
        ones change the picture less. Not together with a ControlNet.
    pag: for requests with a `pag_scale` (perturbed-attention guidance, see `sdfast.models.pag`): which
        self-attention layers are perturbed, as diffusers' pag_applied_layers name them: "mid" is the usual.
        Not together with a ControlNet.

    A field that has no use in a recipe is None there, and refused when it is given.
    """

    checkpoint: str | None = None
    revision: str | None = None
    variant: str | None = None
    backend: Literal["onnx", "inductor", "eager"] = "onnx"
    dtype: Literal["fp32", "fp16"] = "fp32"
    provider: Annotated[Literal["cpu", "cuda", "tensorrt"] | None, Field(validate_default=True)] = None
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)] | SizeRange | None = None
    batch: Count | tuple[Count, ...] = 4
    device: Literal["cpu", "cuda"] | None = None
    autotune: bool | None = None
    kernels: Literal["auto", "compiler"] | None = None
    winograd: Annotated[bool | None, Field(validate_default=True)] = None
    fp8: bool = False
    int8: bool = False
    long_prompts: bool | None = None
    vae: VAESetting | None = None
    vae_dtype: Annotated[Literal["auto", "fp32"] | None, Field(validate_default=True)] = None
    loras: tuple[LoraSetting, ...] = ()
    controlnet: Annotated[tuple[ControlNetSetting, ...], BeforeValidator(_one_or_several)] = ()
    embeddings: tuple[EmbeddingSetting, ...] = ()
    ip_adapters: Annotated[tuple[IPAdapterSetting, ...], Field(max_length=MAX_IP_ADAPTERS)] = ()
    image_encoder: Annotated[str | None, BeforeValidator(_path_as_text)] = None
    cache_branch: Annotated[int | None, Field(strict=True, ge=0)] = None
    pag: tuple[LayerPattern, ...] = ()

    @field_validator("batch")
    @classmethod
    def _buckets(cls, batch: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(batch, int):
            return batch
        if not batch:
            raise ValueError(f"give at least one number, from 1 to {MAX_IMAGES}")
        return tuple(sorted(set(batch)))

    @field_validator("provider")
    @classmethod
    def _of_onnx(cls, provider: str | None, info: ValidationInfo) -> str | None:
        backend = info.data.get("backend")
        if backend == "onnx":
            return provider or ("cuda" if info.data.get("dtype") == "fp16" else "cpu")
        if backend is not None and provider is not None:
            instead = "give device instead" if backend == "inductor" else "leave it out"
            _idle(info, f"only the onnx backend has providers; for {backend}, {instead}")
            return None
        return provider

    @field_validator("device")
    @classmethod
    def _of_inductor(cls, device: str | None, info: ValidationInfo) -> str | None:
        backend = info.data.get("backend")
        if device is not None and backend in ("onnx", "eager"):
            instead = "give provider instead" if backend == "onnx" else "name it when the engine is opened"
            _idle(info, f"only the inductor backend compiles for a device; for {backend}, {instead}")
            return None
        return device

    @field_validator("autotune")
    @classmethod
    def _tuned_by_inductor(cls, autotune: bool | None, info: ValidationInfo) -> bool | None:
        known = info.data
        if autotune is None or not {"backend", "dtype", "device", "sizes", "batch"} <= known.keys():
            return autotune
        if known["backend"] != "inductor":
            _idle(info, "only the inductor backend times candidates; leave it out")
            return None
        fixed = not isinstance(known["sizes"], SizeRange) and not isinstance(known["batch"], int)
        if autotune and not fixed and _compiled_for(known["device"], known["dtype"]) == "cpu":
            _idle(
                info,
                "on a CPU it tries the kernels for attention, and those for fixed sizes and batches alone; "
                "give both as lists, or leave it out",
            )
            return None
        return autotune

    @field_validator("kernels")
    @classmethod
    def _chosen_by_inductor(cls, kernels: str | None, info: ValidationInfo) -> str | None:
        known = info.data
        if kernels is None or not {"backend", "dtype", "device", "sizes", "autotune"} <= known.keys():
            return kernels
        why = ""
        if known["backend"] != "inductor":
            why = "only the inductor backend chooses kernels; leave it out"
        elif _compiled_for(known["device"], known["dtype"]) == "cpu":
            why = "sdfast's own are for device cuda; leave it out"
        elif kernels == "auto" and known["autotune"] is False:
            why = "sdfast's own are tried by autotuning, which is off; leave one of the two out"
        elif kernels == "auto" and isinstance(known["sizes"], SizeRange):
            why = "sdfast's own are tried for fixed sizes; give these as a list, or leave it out"
        if why:
            _idle(info, why)
            return None
        return kernels

    @field_validator("winograd")
    @classmethod
    def _where_winograd_is(cls, winograd: bool | None, info: ValidationInfo) -> bool | None:
        if not {"backend", "dtype", "provider"} <= info.data.keys():
            return winograd
        if info.data["provider"] == "cpu":
            return winograd is not False
        if winograd is not None:
            _idle(info, "only graphs for the CPU have it: backend onnx, provider cpu; leave it out")
        return None

    @field_validator("fp8")
    @classmethod
    def _where_fp8_is(cls, fp8: bool, info: ValidationInfo) -> bool:
        if not fp8 or not {"backend", "dtype"} <= info.data.keys():  # or else those are told of
            return fp8
        if info.data["backend"] == "onnx":
            raise ValueError("the onnx backend has none; take backend inductor, or eager for checks")
        if info.data["dtype"] != "fp16":
            raise ValueError("the rest of the networks must be fp16; take dtype fp16")
        if info.data["backend"] == "inductor" and info.data.get("device") == "cpu":
            raise ValueError("compiled for device cuda alone; on a CPU take backend eager, for checks")
        return fp8

    @field_validator("int8")
    @classmethod
    def _where_int8_is(cls, int8: bool, info: ValidationInfo) -> bool:
        if not int8 or not {"backend", "dtype", "provider"} <= info.data.keys():  # or else those are told of
            return int8
        on_gpu = "a GPU has FP8 instead: backend inductor, dtype fp16 and fp8"
        if info.data["backend"] == "inductor":
            raise ValueError(f"the inductor backend has none; take backend onnx for the CPU; {on_gpu}")
        if info.data["provider"] in ("cuda", "tensorrt"):
            raise ValueError(f"only graphs for the CPU have it; take provider cpu and dtype fp32; {on_gpu}")
        if info.data["dtype"] != "fp32":
            raise ValueError("the rest of the networks must be fp32; take dtype fp32")
        return int8

    @field_validator("long_prompts")
    @classmethod
    def _compiled_beside(cls, long_prompts: bool | None, info: ValidationInfo) -> bool | None:
        backend = info.data.get("backend")
        if long_prompts is not None and backend in ("onnx", "eager"):
            _idle(info, f"{backend} engines take long prompts anyway; leave it out")
            return None
        return long_prompts

    @field_validator("vae_dtype")
    @classmethod
    def _where_vae_may_differ(cls, vae_dtype: str | None, info: ValidationInfo) -> str | None:
        if not {"backend", "dtype"} <= info.data.keys():
            return vae_dtype
        if info.data["dtype"] == "fp16":
            return vae_dtype or "auto"
        if vae_dtype is not None:
            _idle(info, "only fp16 engines choose it, and this one is fp32 as a whole; leave it out")
        return None

    @field_validator("cache_branch")
    @classmethod
    def _without_controlnet(cls, branch: int | None, info: ValidationInfo) -> int | None:
        if branch is not None and info.data.get("controlnet"):
            raise ValueError(
                "a ControlNet adds to what lies deep in the U-Net, and shallow steps would not run it; leave "
                "one of the two out"
            )
        return branch

    @classmethod
    def make(cls, **fields: Any) -> Self:
        """A checked recipe. Raises `ExportError` naming the field."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ExportError(f"recipe: {_explain(error)}") from None

    @classmethod
    def read(cls, path: str | Path, **overrides: Any) -> Self:
        """The recipe in a TOML file, some fields replaced. Raises `ExportError`."""
        try:
            fields = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"{path}: not a recipe that can be read: {error}") from error
        try:
            return cls(**{**fields, **overrides})
        except ValidationError as error:
            raise ExportError(f"{path}: {_explain(error)}") from None

    @classmethod
    def recorded(cls, fields: Mapping[str, Any]) -> Self:
        """The recipe that an engine's manifest holds. Raises `ExportError`.

        Those of older engines may hold fields that had no use there, which are left out, and call the VAE's
        precision `vae`.
        """
        told = dict(fields)
        if told.get("vae") in _PRECISIONS:
            told["vae_dtype"] = told.pop("vae")
        try:
            return cls.model_validate(told, context=_RECORDED)
        except ValidationError as error:
            raise ExportError(f"recipe: {_explain(error)}") from None

    @property
    def target_device(self) -> str:
        return _compiled_for(self.device, self.dtype)

    @property
    def max_images(self) -> int:
        return self.batch if isinstance(self.batch, int) else max(self.batch)

    def unet_batches(self, guided: Sequence[int] = (2,)) -> list[Span]:
        """The U-Net's batches: a picture takes one of these numbers of rows with guidance, one without."""
        if isinstance(self.batch, int):
            return [Span(low=1, high=max(guided) * self.batch)]
        return [Span.exactly(rows) for rows in sorted({n * m for n in self.batch for m in (1, *guided)})]

    def prompt_lengths(self) -> list[Span]:
        """The tokens of the prompts that the U-Net is told of, a form for each span."""
        if self.backend != "inductor":
            return [LONG_PROMPTS]
        longer = Span(low=ONE_CHUNK.high + 1, high=LONG_PROMPTS.high)
        return [ONE_CHUNK, longer] if self.long_prompts else [ONE_CHUNK]

    def size_spans(self, default: int) -> list[tuple[Span, Span]]:
        """The (height, width) spans to compile. `default`: the checkpoint's own side in pixels."""
        if isinstance(self.sizes, SizeRange):
            return [self.sizes.spans]
        pairs = [sides(size) for size in self.sizes or (f"{default}x{default}",)]
        return [(Span.exactly(height), Span.exactly(width)) for height, width in dict.fromkeys(pairs)]


def _compiled_for(device: str | None, dtype: str) -> str:
    return device or ("cuda" if dtype == "fp16" else "cpu")


def _idle(info: ValidationInfo, why: str) -> None:
    """What becomes of a field without use: it is refused, or left out of a recipe that was recorded."""
    if info.context is not _RECORDED:
        raise ValueError(why)


def _explain(error: ValidationError) -> str:
    """One line on the error that lies deepest: of the alternatives, the one that was meant."""
    deepest = max(error.errors(), key=lambda found: (len(found["loc"]), found["type"] == "value_error"))
    field, message = deepest["loc"][0], deepest["msg"].removeprefix("Value error, ")
    if deepest["type"] == "extra_forbidden":
        parts: dict[Any, type[BaseModel]] = {
            "sizes": SizeRange,
            "loras": LoraSetting,
            "controlnet": ControlNetSetting,
            "vae": VAESetting,
            "embeddings": EmbeddingSetting,
            "ip_adapters": IPAdapterSetting,
        }
        known = ", ".join(parts.get(field, Recipe).model_fields)
        return f"{field}: unknown field {deepest['loc'][-1]!r}; there are: {known}"
    if deepest["type"] == "missing":
        return f"{field}: {deepest['loc'][-1]!r} is missing"
    message = message.replace("Input should be", "must be").replace("a valid tuple", "a list")
    return f"{field}: {message} (got {deepest['input']!r:.60})"
