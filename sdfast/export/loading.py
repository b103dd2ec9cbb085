"""Loading a checkpoint's networks on its weights, one at a time.

The weights of a U-Net are those of several modules, and so are a VAE's: each time the part that one module
has of them is made, so that no more than one network is in memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdfast.errors import CheckpointError
from sdfast.export.checkpoint import Checkpoint
from sdfast.export.ip_adapter import ImageEncoderSource
from sdfast.export.magnitudes import DoesNotFit, check_tiny, extents, largest_of, scales_for
from sdfast.export.networks import Networks
from sdfast.manifest import HalfRange
from sdfast.models.config import controlnet_names
from sdfast.models.controlnet import (
    Controlled,
    ControlledContext,
    ControlledTimeShift,
    ControlledUNet,
    load_controlled,
)
from sdfast.models.half_range import rescale
from sdfast.models.lora import attach, attach_to_step, attach_to_text_model
from sdfast.models.pag import perturb
from sdfast.models.rounded import rounded
from sdfast.models.step_cache import ShallowUNet
from sdfast.models.text import TextEncoder
from sdfast.models.tiny_vae import TinyDecoder, TinyEncoder
from sdfast.models.unet import Context, TimeShift, UNet, load_unet
from sdfast.models.vae import AnyDecoder, AnyEncoder, VAEDecoder, VAEEncoder, load_vae

V = TypeVar("V", bound=VAEDecoder | VAEEncoder | TinyDecoder | TinyEncoder)


class UNetParts:
    """The modules that the weights of a U-Net and of its ControlNets are dealt out to, loaded one at a time.

    components: which of these there are. fp8: the U-Net's layers that are put into FP8; fp8_convolutions:
    those that may be later, see `ModuleSpec`. int8: those that are put into INT8.
    """

    def __init__(
        self,
        networks: Networks,
        dtype: torch.dtype,
        fp8: tuple[str, ...],
        fp8_convolutions: tuple[str, ...] = (),
        int8: tuple[str, ...] = (),
    ) -> None:
        self._networks = networks
        self._dtype = dtype
        self.fp8, self.fp8_convolutions, self.int8 = fp8, fp8_convolutions, int8
        self.components = ("unet", *controlnet_names(len(networks.controlnets)))

    def _load(self) -> tuple[UNet, TimeShift, Context] | Controlled:
        unet, added = self._networks.unet, self._networks.controlnets
        tokens = self._networks.image_tokens
        weights = self._networks.checkpoint.state_dict("unet")
        if not added:
            cache = self._networks.step_cache
            own = load_unet(unet, weights, self._dtype, cache.branch if cache else None, tokens)
            return self._with_loras(own)
        theirs = [one.state_dict() for one in self._networks.checkpoint.controlnets]
        controlled = load_controlled(unet, weights, added, theirs, self._dtype, tokens)
        self._with_loras((controlled.unet.unet, controlled.time_shift.unet, controlled.context.unet))
        return controlled

    def _with_loras(self, own: tuple[UNet, TimeShift, Context]) -> tuple[UNet, TimeShift, Context]:
        """The U-Net's modules, once their layers have the LoRAs beside them that requests choose, and those
        to be perturbed are."""
        checkpoint = self._networks.checkpoint
        count, found = len(checkpoint.chosen), checkpoint.low_rank("unet")
        attach_to_step(own[0], count, found, self._dtype)
        perturb(own[0], self._networks.perturbed)
        for outside in own[1:]:
            attach(outside, count, found, self._dtype)
        return own

    def unet(self) -> UNet | ControlledUNet:
        return rounded(self._load()[0], self.fp8, self.int8)

    def shallow(self, branch: int) -> ShallowUNet:
        weights = self._networks.checkpoint.state_dict("unet")
        tokens = self._networks.image_tokens
        own = load_unet(self._networks.unet, weights, self._dtype, image_tokens=tokens)
        layers = (self.of_shallow(branch, names) for names in (self.fp8, self.int8))
        return rounded(ShallowUNet.of(self._with_loras(own)[0], branch), *layers)

    def of_shallow(self, branch: int, layers: tuple[str, ...]) -> tuple[str, ...]:
        """Of these layers those that shallow steps have."""
        with torch.device("meta"):
            own = {name for name, _ in ShallowUNet(self._networks.unet, branch).named_modules()}
        return tuple(name for name in layers if name in own)

    def time_shift(self) -> TimeShift | ControlledTimeShift:
        return self._load()[1]

    def context(self) -> Context | ControlledContext:
        return self._load()[2]


class VAEHalves:
    """The two modules that a VAE's weights are dealt out to, loaded one at a time.

    half: in float16, where that can hold their numbers. decoder_range, encoder_range: how each came to fit
    it, or why not; known once it was loaded.
    """

    def __init__(self, networks: Networks, half: bool) -> None:
        self._networks = networks
        self._half = half
        self.decoder_range: HalfRange | None = None
        self.encoder_range: HalfRange | None = None

    def decoder(self) -> AnyDecoder:
        decoder, self.decoder_range = self._fitted(self._load()[0])
        return decoder

    def encoder(self) -> AnyEncoder:
        encoder = self._load()[1]
        if encoder is None:
            source = self._networks.checkpoint.source
            raise CheckpointError(f"{source}: its VAE's encoder is not there any more")
        encoder, self.encoder_range = self._fitted(encoder)
        return encoder

    def _load(self) -> tuple[AnyDecoder, AnyEncoder | None]:
        checkpoint = self._networks.checkpoint
        try:
            return load_vae(self._networks.vae, checkpoint.state_dict("vae"), torch.float32)
        except CheckpointError as error:
            if checkpoint.vae is None:
                raise
            raise CheckpointError(f"{checkpoint.vae.source}: {error}") from error

    def _fitted(self, vae: V) -> tuple[V, HalfRange | None]:
        """The network in float16 if that holds it, else as it is."""
        if not self._half:
            return vae, None
        found = _in_half(vae)
        if found.dtype == "fp16":
            vae.half()
        return vae, found


def _in_half(vae: VAEDecoder | VAEEncoder | TinyDecoder | TinyEncoder) -> HalfRange:
    """How a half of a VAE fits float16, or why it does not. One that can be written so that it does, is."""
    if isinstance(vae, TinyDecoder | TinyEncoder):
        largest = largest_of(vae)
        try:
            check_tiny(vae, largest)
        except DoesNotFit as reason:
            return HalfRange(dtype="fp32", largest=largest, reason=str(reason))
        return HalfRange(dtype="fp16", largest=largest)
    found = extents(vae)
    try:
        scales = scales_for(vae, found)
    except DoesNotFit as reason:
        return HalfRange(dtype="fp32", largest=found.largest, reason=str(reason))
    rescale(vae, scales)
    return HalfRange(dtype="fp16", largest=found.largest, scale=scales.smallest)


def load_text_model(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    """transformers' own CLIP text model on the checkpoint's weights."""
    import transformers

    component = checkpoint.components[name]
    cls = getattr(transformers, component.class_name, None)
    if component.class_name not in ("CLIPTextModel", "CLIPTextModelWithProjection") or cls is None:
        raise CheckpointError(
            f"{checkpoint.source}: {name} is a {component.class_name}; "
            "CLIPTextModel and CLIPTextModelWithProjection are supported"
        )
    config = transformers.CLIPTextConfig(**component.config)
    return _load_clip(cls, config, checkpoint.state_dict(name), dtype, f"{checkpoint.source}: {name}")


def load_image_model(encoder: ImageEncoderSource, dtype: torch.dtype) -> Any:
    """transformers' own CLIP image model on its weights."""
    import transformers

    config = transformers.CLIPVisionConfig(**encoder.component.config)
    cls = transformers.CLIPVisionModelWithProjection
    return _load_clip(cls, config, encoder.state_dict(), dtype, encoder.source)


def _load_clip(cls: Any, config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype, source: str) -> Any:
    try:
        with _no_progress_bar():
            model = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(weights),
                dtype=dtype,
                attn_implementation="eager",
            )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: its weights do not fit its config: {error}") from error
    return model.eval()


def load_text_encoder(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> TextEncoder:
    """A text encoder as an engine needs it, with the LoRAs beside its layers that requests choose."""
    model = load_text_model(checkpoint, name, dtype)
    loras = attach_to_text_model(model, len(checkpoint.chosen), checkpoint.low_rank(name), dtype)
    return TextEncoder(model, checkpoint.family == "sd", loras)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers shows a bar for every loaded model; an export has a display of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
