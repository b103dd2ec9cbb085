"""IP-Adapters and their image encoder, as an engine is exported with them: where they lie, and what they are.

Files have the layout of the authors: `image_proj.…`, the projection, and `ip_adapter.N.to_k_ip.weight` and
`to_v_ip`, the weights of each cross-attention layer, which N counts with the self-attention between them.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export import layout
from sdfast.export.added import Added, digests_of
from sdfast.export.checkpoint import Checkpoint, Component, Progress, component_of, silent
from sdfast.export.files import Files, load_tensors, tensor_shapes
from sdfast.export.lora_keys import family_of
from sdfast.export.one_file import Found, Wanted, find
from sdfast.export.recipe import IPAdapterSetting
from sdfast.manifest import AddedIPAdapter, ImageProcessor, UsedImageEncoder
from sdfast.models.config import UNetConfig
from sdfast.models.ip_adapter import HEAD, IPAdapterConfig, layer_keys

WANTED = Wanted("an", "IP-Adapter", "ip_adapter.safetensors", "ip_adapters")
ENCODER_CLASS = "CLIPVisionModelWithProjection"
_PROJECTION, _LAYERS = "image_proj.", "ip_adapter."
_PREPROCESSOR = "preprocessor_config.json"
_SUPPORTED = "supported: the plain, the plus and the full-face IP-Adapters of SD 1.x, SD 2.x and SDXL"
# The resampler's layers as diffusers names them, in files of some trainers.
_RENAMED = (
    (re.compile(r"^(layers\.\d+)\.attn\."), r"\1.0."),
    (re.compile(r"^(layers\.\d+)\.ln0\."), r"\1.0.norm1."),
    (re.compile(r"^(layers\.\d+)\.ln1\."), r"\1.0.norm2."),
    (re.compile(r"^(layers\.\d+)\.ff\.0\."), r"\1.1.0."),
    (re.compile(r"^(layers\.\d+)\.ff\.1\.net\.0\.proj\."), r"\1.1.1."),
    (re.compile(r"^(layers\.\d+)\.ff\.1\.net\.2\."), r"\1.1.3."),
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ImageEncoderSource(Added):
    """The image encoder on this disk, verified as far as its headers go.

    source: the folder, or a folder within a Hub repository. processor: how images are made ready for it.
    """

    processor: ImageProcessor

    def record(self) -> UsedImageEncoder:
        """What an engine's manifest tells of it."""
        return UsedImageEncoder(source=self.source, revision=self.revision, weights=dict(self.digests))

    @property
    def parts(self) -> int:
        """That it sees in an image: the class token, and the patches."""
        config = self.component.config
        return (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1

    def width(self, reads: str) -> int:
        """Of what it gives."""
        return int(self.component.config["projection_dim" if reads == "image_embeds" else "hidden_size"])


@dataclass(frozen=True)
class IPAdapterSource(Found):
    """An adapter whose header has been looked at. names: by which `ImageContext` knows its tensors."""

    config: IPAdapterConfig
    names: Mapping[str, str]
    shapes: Shapes

    @property
    def component(self) -> Component:
        return Component("ip_adapter", "IPAdapter", self.config.as_dict(), (self.path,))

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of its file, by the file's name."""
        return {self.path.name: self.digest}

    def state_dict(self) -> dict[str, Tensor]:
        tensors = load_tensors(self.path, self.name)
        return {theirs: tensors[name] for name, theirs in self.names.items()}

    def record(self) -> AddedIPAdapter:
        """What an engine's manifest tells of it."""
        return AddedIPAdapter(
            source=self.source,
            file=self.file,
            revision=self.revision,
            digest=self.digest,
            form=self.config.form,
        )

    def check_fits(self, unet: UNetConfig) -> None:
        """Raises `CheckpointError` naming the first thing in which it was made for another U-Net."""
        needed = layer_keys(unet)
        own = {name: shape for name, shape in self.shapes.items() if name.startswith(_LAYERS)}
        if self.config.outputs != unet.cross_attention_dim:
            raise self._unfit(
                f"its tokens are for {family_of(self.config.outputs)} ({self.config.outputs} numbers each), "
                f"and this checkpoint's U-Net is of {family_of(unet.cross_attention_dim)}"
            )
        if len(own) != len(needed):
            raise self._unfit(
                f"it has weights for {len(own) // 2} cross-attention layers, and this checkpoint's U-Net has "
                f"{len(needed) // 2}"
            )
        for name, rows in needed:
            shape = own.get(f"{name}.weight")
            if shape != (rows, unet.cross_attention_dim):
                told = "is not there" if shape is None else f"has shape {list(shape)}"
                raise self._unfit(f"{name}.weight {told}; {[rows, unet.cross_attention_dim]} is needed")

    def check_reads(self, encoder: ImageEncoderSource) -> None:
        """Raises `CheckpointError` where it reads what another image encoder gives."""
        given = encoder.width(self.config.reads)
        if given != self.config.inputs:
            raise self._unfit(
                f"it reads {self.config.inputs} numbers of the image encoder, and {encoder.source} gives "
                f"{given}",
                "the image encoder that it was trained with: --image-encoder FOLDER",
            )

    def _unfit(
        self, why: str, instead: str = "one that was made for this kind of checkpoint"
    ) -> CheckpointError:
        return CheckpointError(f"IP-Adapter {self.name} does not fit: {why}; give {instead}")


def with_ip_adapters(
    checkpoint: Checkpoint,
    settings: Sequence[IPAdapterSetting],
    encoder: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """The checkpoint with IP-Adapters and the image encoder that they read.

    encoder: its folder on this disk, or within the first adapter's repository; by default the checkpoint's
    own, or else the folder `image_encoder` beside the first adapter's file, as with diffusers.

    Raises `CheckpointError` for one that cannot be found or read, or does not fit the encoder. Whether it
    fits the U-Net is seen when the networks' configs are read.
    """
    if not settings:
        if encoder is not None:
            raise CheckpointError("image_encoder: is for IP-Adapters, and there are none; leave it out")
        return checkpoint
    tell = progress or silent
    found = [find(setting.as_file(), WANTED, tell) for setting in settings]
    source = _encoder(checkpoint, found[0], encoder, tell)
    adapters = tuple(_read(one, source) for one in found)
    for adapter in adapters:
        adapter.check_reads(source)
    return replace(checkpoint, ip_adapters=adapters, image_encoder=source)


# ---------------------------------------------------------------- the adapter's file


def _read(found: Found, encoder: ImageEncoderSource) -> IPAdapterSource:
    shapes, _ = tensor_shapes(found.path, found.name)
    _check_kind(shapes, found.name)
    names = {name: _renamed(name) for name in shapes}
    own = {theirs: shapes[name] for name, theirs in names.items()}
    try:
        config = _config(own, encoder.parts)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{found.name}: a tensor of the image projection is missing or has too few axes ({error}); "
            "download it again"
        ) from error
    return IPAdapterSource(**vars(found), config=config, names=names, shapes=own)


def _check_kind(shapes: Shapes, name: str) -> None:
    """Raises `CheckpointError` for what is no IP-Adapter, and for one of another kind."""
    strange = sorted(key for key in shapes if not key.startswith((_PROJECTION, _LAYERS)))
    there = {key.removeprefix(_PROJECTION) for key in shapes if key.startswith(_PROJECTION)}
    if strange or not there or len(there) == len(shapes):
        what = f"holds {strange[0]}" if strange else "has no image_proj and ip_adapter tensors"
        raise CheckpointError(f"{name}: {what}, so it is no IP-Adapter; {_SUPPORTED}")
    face = "perceiver_resampler.proj_in.weight" in there or any("_lora." in key for key in shapes)
    plain, full = "proj.weight" in there, "proj.3.weight" in there
    if face or not (plain or full or "latents" in there):
        raise CheckpointError(
            f"{name}: is an IP-Adapter FaceID, or of a kind that is not known: a FaceID reads the embedding "
            f"of a face by insightface, which sdfast does not have; {_SUPPORTED}"
        )


def _renamed(name: str) -> str:
    if not name.startswith(_PROJECTION):
        return name
    bare = name.removeprefix(_PROJECTION)
    for pattern, by in _RENAMED:
        bare = pattern.sub(by, bare)
    return f"{_PROJECTION}{bare}"


def _config(shapes: Shapes, parts: int) -> IPAdapterConfig:
    """parts: that the image encoder sees in an image."""
    outputs = shapes["ip_adapter.1.to_k_ip.weight"][1]

    def shape(name: str) -> tuple[int, ...]:
        return shapes[f"{_PROJECTION}{name}"]

    if f"{_PROJECTION}proj.weight" in shapes:
        rows, inputs = shape("proj.weight")[:2]
        return IPAdapterConfig("plain", rows // outputs, inputs, outputs)
    if f"{_PROJECTION}proj.3.weight" in shapes:
        return IPAdapterConfig("full", parts, shape("proj.0.weight")[1], outputs)
    layers = {match[1] for name in shapes if (match := re.match(r"image_proj\.layers\.(\d{1,3})\.", name))}
    _, tokens, hidden = shape("latents")[:3]
    inner = shape("layers.0.0.to_q.weight")[0]
    if inner % HEAD:
        raise KeyError("layers.0.0.to_q.weight")
    return IPAdapterConfig("plus", tokens, shape("proj_in.weight")[1], outputs, inner, hidden, len(layers))


# ---------------------------------------------------------------- the image encoder


def _encoder(
    checkpoint: Checkpoint, first: Found, given: str | None, progress: Progress
) -> ImageEncoderSource:
    if given is not None and Path(given).expanduser().is_dir():
        return _read_encoder(Files(Path(given).expanduser().resolve(), given), None)
    own = checkpoint.folder / layout.IMAGE_ENCODER
    if given is None and (own / "config.json").is_file():
        files = Files(own, f"{checkpoint.source}/{layout.IMAGE_ENCODER}", checkpoint.folder)
        return _read_encoder(files, checkpoint.revision)
    beside = PurePosixPath(first.file or "").parent / layout.IMAGE_ENCODER
    folder = (beside if given is None else PurePosixPath(given)).as_posix()
    source = f"{first.source}/{folder}"
    if first.revision is not None:  # it is of the Hub
        from sdfast.export import hub

        snapshot, commit = hub.download_image_encoder(
            first.source, folder, revision=first.revision, progress=progress
        )
        return _read_encoder(Files(snapshot / folder, source, snapshot), commit)
    here = first.path.parent / layout.IMAGE_ENCODER
    if given is None and here.is_dir():
        return _read_encoder(Files(here.resolve(), str(here)), None)
    what = f"{given}: no such folder" if given is not None else f"{here}: no such folder"
    raise CheckpointError(
        f"IP-Adapter {first.name}: no image encoder: {what}; give the one that it was trained with: "
        "--image-encoder FOLDER, a folder with config.json and model.safetensors"
    )


def _read_encoder(files: Files, revision: str | None) -> ImageEncoderSource:
    layout.check_image_encoder(files.names, files.source)
    config = files.json("config.json")
    kind, classes = config.get("model_type", "clip_vision_model"), config.get("architectures")
    if kind != "clip_vision_model" or classes not in (None, [ENCODER_CLASS]) or "auto_map" in config:
        raise CheckpointError(
            f"{files.source}: is a {kind} ({classes}); the image encoder of an IP-Adapter is a "
            f"{ENCODER_CLASS}"
        )
    for name in ("image_size", "patch_size", "hidden_size", "projection_dim"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise CheckpointError(
                f"{files.source}: config.json gives {name} as {config.get(name)!r}; download it again"
            )
    component = component_of(files, layout.IMAGE_ENCODER, ENCODER_CLASS, config, None)
    digests = digests_of(component, files.source)
    given = files.json(_PREPROCESSOR) if _PREPROCESSOR in files.names else {}
    processor = _processor(given, config["image_size"], files.source)
    return ImageEncoderSource(files.source, revision, component, digests, processor=processor)


def _processor(given: Mapping[str, Any], side: int, source: str) -> ImageProcessor:
    """How images are made ready, of a `preprocessor_config.json`; by default as CLIP's are, for that side."""
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        if given.get(name, True) is not True:
            raise _unprocessed(source, name, given[name])
    if given.get("resample", 3) != 3:  # bicubic
        raise _unprocessed(source, "resample", given["resample"])
    size, crop = given.get("size", side), given.get("crop_size", side)
    short = size.get("shortest_edge") if isinstance(size, Mapping) else size
    sides = set(crop.values()) if isinstance(crop, Mapping) else {crop}
    if sides != {side}:
        raise _unprocessed(source, "crop_size", crop)
    if type(short) is not int or short < side:
        raise _unprocessed(source, "size", size)
    usual = ImageProcessor(resize=short, crop=side)
    numbers = {"mean": given.get("image_mean", usual.mean), "std": given.get("image_std", usual.std)}
    for name, values in numbers.items():
        if not _three(values, above=0 if name == "std" else -1):
            raise _unprocessed(source, f"image_{name}", values)
    return usual.model_copy(update={name: tuple(map(float, values)) for name, values in numbers.items()})


def _three(values: Any, above: float) -> bool:
    return (
        isinstance(values, Collection)
        and len(values) == 3
        and all(isinstance(one, (int, float)) and one > above for one in values)
    )


def _unprocessed(source: str, name: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{source}: {_PREPROCESSOR} has {name}={value!r}, and images are made ready as CLIP's are: the "
        "shorter side is resized, bicubic, then cropped to the encoder's image_size and normalised"
    )
