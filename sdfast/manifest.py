"""The schema of `manifest.json`: what an engine is, every file it holds, and the proof that came with it.

The manifest is read from a directory that somebody else may have written, so every field is checked and
unknown fields are refused. A seal (a digest over the rest of the document) shows damage to the manifest
itself. It proves integrity, not origin.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdfast.errors import EngineError, RequestError
from sdfast.tokenizer import SETTINGS_FILE, VOCABULARY_FILE

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MODULES = {"context", "time_shift", "unet", "vae_decoder"}  # what no engine can do without
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # nor without the first; SDXL's refiner has the second
CONTROL = "control_embedding"  # nor one with a ControlNet without this
SHALLOW = "unet_shallow"  # nor one with a cache branch without this
IMAGE_ENCODER = "image_encoder"  # nor one with IP-Adapters without this, and a module of each's own


def _inside(path: str) -> str:
    """A relative POSIX path that cannot leave the engine's directory."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or "\0" in path or ".." in parts:
        raise ValueError(f"{path!r} is not a path inside the engine")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LoraName = Annotated[str, Field(pattern=r"^[^\s<>:=,\"]([^<>:=,\"\r\n\t]*[^\s<>:=,\"])?$", max_length=100)]
"""A name that fits into `<lora:NAME:1>` and NAME=1."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Span(_Part):
    """The values an axis may take: `low` to `high`, both included; equal for a fixed axis."""

    low: int = Field(ge=1)
    high: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Span":
        if self.low > self.high:
            raise ValueError(f"{self.low} is above {self.high}")
        return self

    @property
    def fixed(self) -> bool:
        return self.low == self.high

    def __contains__(self, value: int) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return str(self.low) if self.fixed else f"{self.low}..{self.high}"

    @classmethod
    def exactly(cls, value: int) -> "Span":
        return cls(low=value, high=value)


TIME_IDS, SCORED_TIME_IDS = 6, 5
"""Original size, crop and target size in pixels; or original size and crop, and an aesthetic score."""
CHUNK = 77
"""Tokens that CLIP's text encoders read at a time, start and end among them."""
ONE_CHUNK = Span.exactly(CHUNK)
LONG_PROMPTS = Span(low=CHUNK, high=12 * CHUNK)
"""The prompts of engines that take long ones: any two of up to four chunks can be repeated to one length."""


class File(_Part):
    """One file of the engine."""

    path: RelativePath
    size: int = Field(ge=0)  # bytes
    sha256: Digest


class Variant(_Part):
    """One compiled form of a module, and the sizes it serves. Sizes are those of the picture, in pixels.

    tokens: of the prompts that the U-Net is told of; older engines take those of one chunk alone.
    attention: what computes each shape of it, where an export measured that. kernels: likewise of group norms
    and gated products: an own kernel, or the compiler's. Older engines do not say.
    """

    file: RelativePath
    batch: Span
    height: Span | None = None
    width: Span | None = None
    tokens: Span = ONE_CHUNK
    attention: dict[str, str] = {}
    kernels: dict[str, str] = {}

    def fits(self, height: int | None, width: int | None, tokens: int | None = None) -> bool:
        """Whether this form takes pictures of `height` × `width`, and prompts of so many tokens."""
        if tokens is not None and tokens not in self.tokens:
            return False
        if self.height is None or self.width is None:
            return True
        return height is not None and width is not None and height in self.height and width in self.width


Rounding = Literal["FP8", "INT8"]


class HalfRange(_Part):
    """How a half of the VAE came to fit float16, or why it did not and is float32.

    largest: the largest magnitude between its norms, in float32 on the export's probes. scale: the power of
    two by which its weights make that smaller, without changing what it computes; 1 where it fits as it is.
    """

    dtype: Literal["fp32", "fp16"]
    largest: float = Field(ge=0)
    scale: float = Field(default=1.0, gt=0, le=1)
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.dtype}: {self.reason}"
        told = f"{self.dtype}; the largest number on probes is {self.largest:.3g}"
        return told if self.scale == 1.0 else f"{told}, held as 1/{round(1 / self.scale)} of itself"


class Module(_Part):
    """One compiled function of the engine: its inputs and outputs by name, in order.

    fp8, int8: names of its layers that are in FP8, or in INT8. half_range: of a half of the VAE, where an
    fp16 engine was to have it in float16; older engines have none, nor has one whose recipe asks for float32.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    variants: tuple[Variant, ...] = Field(min_length=1)
    files: tuple[RelativePath, ...]
    fingerprint: Digest  # of everything the files depend on: a rebuild keeps what has not changed
    fp8: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()
    half_range: HalfRange | None = None


class StepCache(_Part):
    """What a shallow step takes from a whole one, the U-Net's second output `deep`, [B, channels, h / scale,
    w / scale] of latents of h × w, rounded up. branch: the skip up to which a shallow step goes."""

    branch: int = Field(ge=0)
    channels: int = Field(ge=1)
    scale: int = Field(ge=1)

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """That of one row's, for latents of this size."""
        return self.channels, -(-height // self.scale), -(-width // self.scale)


class ImageProcessor(_Part):
    """How an image is made ready for an image encoder: its shorter side becomes `resize` pixels, bicubic, of
    which a square of `crop` in the middle is kept; each channel, in [0, 1], less mean is divided by std."""

    resize: int = Field(ge=1)
    crop: int = Field(ge=1)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


class IPAdapter(_Part):
    """One that images are told to the U-Net by. module: that makes their context. tokens: of each image.
    reads: the output of the image encoder that it takes."""

    module: str
    tokens: int = Field(ge=1)
    reads: Literal["image_embeds", "hidden_states"]


class Transformer(_Part):
    """Cross-attention layers of the U-Net that follow one another, in the order in which the context has
    them. name: their place, as diffusers' scales of IP-Adapters name it. channels: of each's keys, and of
    its values, which follow those."""

    name: str
    channels: int = Field(ge=1)
    layers: int = Field(ge=1)


class Model(_Part):
    """What the loop must know of the networks."""

    family: Literal["sd", "sdxl"]
    in_channels: int = Field(ge=1)
    latent_channels: int = Field(ge=1)
    vae_scale_factor: int = Field(ge=1)  # pixels a latent
    side_multiple: int | None = Field(default=None, ge=1)  # of sides in pixels, where that is another number
    default_height: int = Field(ge=1)  # pixels
    default_width: int = Field(ge=1)
    text_width: int = Field(ge=1)  # D of the text encoders' joined hidden states [B, L, D]
    context_width: int = Field(ge=1)  # KV of the packed context [B, L, KV]
    # T of the time projections, of ControlNets' and LoRAs' scales, and of which rows are perturbed
    time_shift_width: int = Field(ge=1)
    control_channels: int | None = None  # of the embedded control images, all together, with ControlNets
    controlnets: int = Field(default=0, ge=0)
    control_layers: int = Field(default=0, ge=0)  # to how many layers each adds, and has a scale for
    pooling_controlnets: tuple[int, ...] = ()  # places of those that average what they add over the picture
    pooled_width: int | None = None  # P of the pooled text embedding that SDXL adds to the time embedding
    guidance_embedding: int | None = None  # W of an LCM's guidance embedding
    zero_empty_negative: bool = False  # SDXL: a missing negative prompt is a context of zeros, not of ""
    step_cache: StepCache | None = None  # of engines that were exported with a cache branch
    scored: bool = False  # SDXL's refiner: the U-Net is told a score in place of the target size
    loras: tuple[str, ...] = ()  # that requests choose: their names, in the order of their scales
    # InstructPix2Pix: what the latents of the image that it edits are multiplied by for the U-Net; else None
    image_latents_scale: float | None = Field(default=None, gt=0)
    ip_adapters: tuple[IPAdapter, ...] = ()
    image_processor: ImageProcessor | None = None  # with IP-Adapters
    transformers: tuple[Transformer, ...] = ()  # with IP-Adapters: of the U-Net, of all its context
    pag: tuple[str, ...] = ()  # which layers requests may have perturbed, as diffusers names them

    @model_validator(mode="after")
    def _scaled_by_layer(self) -> "Model":
        if self.controlnets and not self.control_layers:
            raise ValueError("its ControlNets have one scale for all layers, as an earlier sdfast made them")
        return self

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net is told, beside the latents, of a mask and of the latents of the masked image."""
        return self.in_channels == 2 * self.latent_channels + 1

    @property
    def instructed(self) -> bool:
        """Whether the U-Net edits an image as the prompt says: it is told its latents beside its own."""
        return self.image_latents_scale is not None

    @property
    def draws_over(self) -> bool:
        """Whether all that it draws is drawn over an image, or edits one."""
        return self.inpaints or self.scored or self.instructed

    @property
    def time_ids(self) -> int:
        """How many numbers SDXL's U-Net is told of a picture: sizes and crop, or crop and score."""
        return SCORED_TIME_IDS if self.scored else TIME_IDS

    @property
    def image_context(self) -> tuple[int, int]:
        """The shape [I, KV] of what a row's images are told to the U-Net by, those of all IP-Adapters."""
        width = sum(2 * run.channels * run.layers for run in self.transformers)
        return sum(adapter.tokens for adapter in self.ip_adapters), width

    @property
    def controlled(self) -> bool:
        """Whether pictures are drawn under the guidance of control images."""
        return self.controlnets > 0


class FromFile(_Part):
    """What came from a file beside the checkpoint.

    file: which one of a folder or Hub repository; None where the source is the file itself.
    """

    source: str
    file: str | None = None
    revision: str | None = None
    digest: Digest

    @property
    def name(self) -> str:
        return self.source if self.file is None else f"{self.source.rstrip('/')}/{self.file}"

    @property
    def named(self) -> str:
        """With the beginning of the commit, where it is of the Hub."""
        return self.name if self.revision is None else f"{self.name} at {self.revision[:8]}"


class MergedLora(FromFile):
    """A LoRA that was merged into the weights."""

    scale: float = Field(allow_inf_nan=False)

    def __str__(self) -> str:
        return f"{self.named}, scale {self.scale:g}"


class ChosenLora(FromFile):
    """A LoRA that requests choose. called: what they call it."""

    called: LoraName

    def __str__(self) -> str:
        return f"{self.called}, of {self.named}, as requests choose"


class AddedEmbedding(FromFile):
    """An embedding that the text encoders were given: its token, and of how many vectors it is."""

    token: str = Field(min_length=1)
    vectors: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.token} ({self.vectors} vector{'s' * (self.vectors != 1)}) of {self.named}"


class OfComponent(_Part):
    """A network with a source of its own. weights: as those of a checkpoint."""

    source: str
    revision: str | None = None
    weights: dict[str, Digest]

    def __str__(self) -> str:
        return self.source if self.revision is None else f"{self.source} at {self.revision[:8]}"


class AddedControlNet(OfComponent):
    """A ControlNet beside the checkpoint's U-Net."""


class UsedVAE(OfComponent):
    """A VAE in the place of the checkpoint's own."""

    @property
    def name(self) -> str:
        """The last part of its source."""
        return PurePosixPath(self.source.replace("\\", "/")).name

    @property
    def digest(self) -> str:
        """Of its weights, by which pictures name it."""
        return min(self.weights.items())[1]


class UsedImageEncoder(OfComponent):
    """What IP-Adapters see images with."""


class AddedIPAdapter(FromFile):
    """An IP-Adapter beside the checkpoint's U-Net."""

    form: Literal["plain", "plus", "full"]

    def __str__(self) -> str:
        return f"{self.named}, {self.form}"


class Source(_Part):
    """The checkpoint the engine was made from; what was merged into its weights and added to its tokens, in
    this order; and what was put beside its U-Net. chosen: the LoRAs that requests choose, beside its layers.

    graphs: who exported its networks as graphs, of which the engine is made; None: its weights were exported.
    """

    source: str
    revision: str | None = None
    weights: dict[str, Digest]  # file name in the checkpoint → sha256
    settings: Digest | None = None  # of its tokenizers and its scheduler config
    loras: tuple[MergedLora, ...] = ()
    chosen: tuple[ChosenLora, ...] = ()
    controlnets: tuple[AddedControlNet, ...] = ()
    embeddings: tuple[AddedEmbedding, ...] = ()
    ip_adapters: tuple[AddedIPAdapter, ...] = ()
    image_encoder: UsedImageEncoder | None = None  # that those read
    vae: UsedVAE | None = None  # None: its own
    graphs: Literal["optimum"] | None = None

    @property
    def beside(self) -> tuple[FromFile, ...]:
        """What came from files beside the checkpoint."""
        return *self.loras, *self.chosen, *self.embeddings, *self.ip_adapters


class Target(_Part):
    """The machine that native code was compiled for.

    architecture: of the GPU ("sm_90"), or of the processor with its vector instructions ("x86_64 avx2 …").
    driver: the newest CUDA version that the driver knows, as CUDA counts them (13000 is 13.0).
    """

    device: Literal["cpu", "cuda"]
    architecture: str
    torch: str
    cuda: str | None = None
    driver: int | None = None


class Builder(_Part):
    """The versions that built the engine."""

    sdfast: str
    python: str
    packages: dict[str, str]  # torch, onnx, onnxruntime, diffusers, transformers
    target: Target | None = None  # set by backends whose code is bound to a machine


class Validation(_Part):
    """The figures of the last validation against the stock pipeline."""

    passed: bool
    created: str
    report: RelativePath
    figures: dict[str, float]


class Manifest(_Part):
    """Everything that is known of an engine."""

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    created: str
    backend: Literal["onnx", "eager", "inductor"]
    dtype: Literal["fp32", "fp16"]
    checkpoint: Source
    recipe: dict[str, Any]
    model: Model
    max_images: int = Field(ge=1)  # pictures of one call into the networks; larger requests take several
    modules: dict[str, Module]
    tokenizers: tuple[RelativePath, ...]
    scheduler_config: RelativePath
    files: tuple[File, ...]
    builder: Builder
    validation: Validation | None = None
    seal: str = ""

    @model_validator(mode="after")
    def _whole(self) -> "Manifest":
        """Nothing is missing, and what is loaded is listed, so that its digest is checked first."""
        if self.backend == "inductor" and self.builder.target is None:
            raise ValueError("native code, but no target that it was compiled for")
        needed = MODULES | ({CONTROL} if self.model.controlled else set())
        needed |= {SHALLOW} if self.model.step_cache else set()
        needed |= {TEXT_ENCODERS[self.model.scored]}
        if adapters := self.model.ip_adapters:
            needed |= {IMAGE_ENCODER, *(adapter.module for adapter in adapters)}
            if self.model.image_processor is None:
                raise ValueError("IP-Adapters, but no image_processor")
            widths = self.model.image_context[1]
            if not 0 < widths <= self.model.context_width:
                raise ValueError(
                    f"transformers of {widths} numbers in a context of {self.model.context_width}"
                )
        if missing := sorted(needed - set(self.modules)):
            raise ValueError(f"no module {missing[0]!r}")
        listed = {file.path for file in self.files}
        loaded = {self.scheduler_config}
        for module in self.modules.values():
            loaded.update(module.files, (variant.file for variant in module.variants))
        for name in self.tokenizers:
            loaded.update((f"{name}/{VOCABULARY_FILE}", f"{name}/{SETTINGS_FILE}"))
        if unlisted := sorted(loaded - listed):
            raise ValueError(f"{unlisted[0]!r} is used, but not among the files")
        return self

    @property
    def provider(self) -> str | None:
        """The execution provider that an ONNX engine was exported for; older ones were all for the CPU."""
        return str(self.recipe.get("provider", "cpu")) if self.backend == "onnx" else None

    def check_size(self, height: int, width: int) -> None:
        """Raises `RequestError` listing the engine's sizes when `height` × `width` pixels is none of them."""
        variants = self.modules["unet"].variants
        factor = self.model.side_multiple or self.model.vae_scale_factor
        if any(variant.fits(height, width) for variant in variants):
            if height % factor or width % factor:
                raise RequestError(f"size {width}x{height}: sides of this engine are multiples of {factor}")
            return
        sizes = sorted({f"{variant.width}x{variant.height}" for variant in variants})
        raise RequestError(
            f"size {width}x{height} is not one of this engine's (width x height: {', '.join(sizes)}); "
            "ask for one of these, or export an engine with that size"
        )

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Their names, in the order of the tokenizers."""
        return tuple(name for name in TEXT_ENCODERS if name in self.modules)

    @property
    def max_tokens(self) -> int:
        """The longest prompts that the U-Net takes, in tokens, start and end of each chunk among them."""
        return max(form.tokens.high for form in self.modules["unet"].variants)

    @property
    def edits(self) -> bool:
        """Whether the engine takes images to draw over; older ones have no encoder for them."""
        return "vae_encoder" in self.modules

    @property
    def draws_latents(self) -> bool:
        """Whether an image's latents are drawn from around a mean; those of a tiny VAE are what they are."""
        return self.edits and "std" in self.modules["vae_encoder"].outputs

    @property
    def fp8(self) -> tuple[str, ...]:
        """The layers of the U-Net that are in FP8; none where that was not asked for."""
        return self.modules["unet"].fp8

    @property
    def int8(self) -> tuple[str, ...]:
        """The layers of the U-Net that are in INT8; none where that was not asked for."""
        return self.modules["unet"].int8

    @property
    def rounding(self) -> Rounding | None:
        """What those layers of the U-Net are in that are approximated."""
        return "FP8" if self.fp8 else "INT8" if self.int8 else None

    @property
    def vae_dtype(self) -> str | None:
        """What the recipe asks for of the VAE's precision; older ones called it otherwise."""
        asked = self.recipe.get("vae_dtype", self.recipe.get("vae"))
        return asked if isinstance(asked, str) else None

    def remedy(self, name: str) -> str:
        """What to do when the half `name` of the VAE gives numbers that are not finite."""
        half = self.modules[name].half_range
        dtype = self.dtype if half is None else half.dtype
        if dtype == "fp32" or self.vae_dtype == "fp32":
            return "the VAE is float32 already: check the checkpoint's VAE weights"
        return "the VAE is float16: export the engine with --vae-dtype fp32"

    def sealed(self) -> "Manifest":
        """The same manifest with its seal set."""
        return self.model_copy(update={"seal": _seal(self.model_dump(mode="json"))})

    def to_json(self) -> str:
        return json.dumps(self.sealed().model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def _seal(document: dict[str, Any]) -> str:
    return json_digest({key: value for key, value in document.items() if key != "seal"})


def json_digest(value: Any) -> str:
    """SHA-256 in hex of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the engine in `folder`.

    Raises `EngineError` when there is none, or it cannot be read, is damaged, or is of another version.
    """
    path = folder / MANIFEST_NAME
    document = _document(folder, path)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise EngineError(
            f"{path}: schema version {version!r}, but this sdfast reads version {SCHEMA_VERSION}; "
            "export the engine again"
        )
    if document.get("seal") != _seal(document):
        raise EngineError(f"{path}: does not match its seal: it was changed after the export; export again")
    try:
        return Manifest.model_validate_json(json.dumps(_counted(document)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        message = first["msg"].removeprefix("Value error, ")
        raise EngineError(f"{path}: {where}: {message}; export the engine again") from error


def _counted(document: dict[str, Any]) -> dict[str, Any]:
    """The document of an older engine, which has one ControlNet at most, as newer ones tell of several."""
    made_of, model = document.get("checkpoint"), document.get("model")
    if not isinstance(made_of, dict) or not isinstance(model, dict) or "controlnet" not in made_of:
        return document
    one = made_of["controlnet"]
    rest = {name: value for name, value in made_of.items() if name != "controlnet"}
    added = [] if one is None else [one]
    return {
        **document,
        "checkpoint": {**rest, "controlnets": added},
        "model": {**model, "controlnets": len(added)},
    }


def _document(folder: Path, path: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise EngineError(f"{folder}: no such engine; make one with `sdfast export SOURCE -o {folder}`")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineError(
            f"{folder}: not an engine (no {MANIFEST_NAME}); make one with `sdfast export SOURCE -o DIR`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); export the engine again") from error
    if not isinstance(document, dict):
        raise EngineError(f"{path}: not a manifest; export the engine again")
    return document
