"""The networks of a checkpoint: their configs, and what the manifest says of them."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from sdfast.errors import CheckpointError, ExportError
from sdfast.export.checkpoint import Checkpoint
from sdfast.export.controlnet import ControlNetSource
from sdfast.manifest import (
    SCORED_TIME_IDS,
    TIME_IDS,
    ImageProcessor,
    IPAdapter,
    Model,
    StepCache,
    Transformer,
)
from sdfast.models.config import adapter_names
from sdfast.models.controlnet import ControlledUNet, ControlNet, ControlNetConfig, control_layers
from sdfast.models.fp8 import MULTIPLE, fp8_convolutions, fp8_layers
from sdfast.models.int8 import int8_layers
from sdfast.models.ip_adapter import IPAdapterConfig, transformers
from sdfast.models.lora import attach_to_step, empty_of
from sdfast.models.pag import matching, perturb
from sdfast.models.unet import (
    Context,
    TimeShift,
    UNet,
    UNetConfig,
    context_parts,
    rungs,
    shift_parts,
    skip_levels,
)
from sdfast.models.vae import AnyVAEConfig, vae_config


@dataclass(frozen=True)
class Configs:
    """The configs of a checkpoint's networks, whether it holds weights or graphs."""

    checkpoint: Checkpoint
    unet: UNetConfig
    vae: AnyVAEConfig
    text: tuple[str, ...]  # names of the text encoders

    @property
    def factor(self) -> int:
        """Pixels a latent, in each direction."""
        return self.vae.scale

    @property
    def default_side(self) -> int:
        """The side in pixels of the pictures that the checkpoint was trained on."""
        return self.checkpoint.sample_size * self.factor

    @property
    def pooled_width(self) -> int | None:
        """See `Model`."""
        return self.unet.pooled_dim(SCORED_TIME_IDS if self.checkpoint.scored else TIME_IDS)

    def _model(
        self,
        *,
        text_width: int,
        context_width: int,
        time_shift_width: int,
        side_multiple: int | None = None,
        control_channels: int | None = None,
        controlnets: int = 0,
        control_layers: int = 0,
        pooling_controlnets: tuple[int, ...] = (),
        step_cache: StepCache | None = None,
        loras: tuple[str, ...] = (),
        ip_adapters: tuple[IPAdapter, ...] = (),
        image_processor: ImageProcessor | None = None,
        transformers: tuple[Transformer, ...] = (),
        pag: tuple[str, ...] = (),
    ) -> Model:
        """What the manifest says of the networks."""
        return Model(
            family=self.checkpoint.family,
            in_channels=self.unet.in_channels,
            latent_channels=self.vae.latent_channels,
            vae_scale_factor=self.factor,
            side_multiple=side_multiple,
            default_height=self.default_side,
            default_width=self.default_side,
            text_width=text_width,
            context_width=context_width,
            time_shift_width=time_shift_width,
            control_channels=control_channels,
            controlnets=controlnets,
            control_layers=control_layers,
            pooling_controlnets=pooling_controlnets,
            pooled_width=self.pooled_width,
            guidance_embedding=self.unet.time_cond_proj_dim,
            zero_empty_negative=self.checkpoint.zero_empty_negative,
            step_cache=step_cache,
            scored=self.checkpoint.scored,
            image_latents_scale=self._image_latents_scale(),
            loras=loras,
            ip_adapters=ip_adapters,
            image_processor=image_processor,
            transformers=transformers,
            pag=pag,
        )

    def _image_latents_scale(self) -> float | None:
        """See `Model`. InstructPix2Pix is told the VAE's own latents, CosXL's edit model scaled ones."""
        if self.unet.in_channels != 2 * self.vae.latent_channels:
            return None
        return 1.0 if self.checkpoint.index.get("is_cosxl_edit") else 1 / self.vae.scaling_factor


@dataclass(frozen=True)
class Networks(Configs):
    """The configs of the networks that are built on a checkpoint's weights."""

    controlnets: tuple[ControlNetConfig, ...] = ()
    ip_adapters: tuple[IPAdapterConfig, ...] = ()
    step_cache: StepCache | None = None
    pag: tuple[str, ...] = ()
    perturbed: tuple[str, ...] = ()  # the layers that those name

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, cache_branch: int | None = None, pag: tuple[str, ...] = ()
    ) -> "Networks":
        """cache_branch, pag: as a recipe's. Raises `ExportError` for those that the U-Net does not have."""
        checkpoint.check_weights()
        parts = checkpoint.components
        unet = UNetConfig.from_diffusers(parts["unet"].config)
        networks = cls(
            checkpoint,
            unet,
            vae_config(parts["vae"].class_name, parts["vae"].config),
            checkpoint.text_encoders,
            step_cache=None if cache_branch is None else _step_cache(unet, cache_branch),
            pag=pag,
            perturbed=_perturbed(unet, pag),
        )
        if pag and networks._image_latents_scale() is not None:
            raise ExportError(
                "pag: an InstructPix2Pix U-Net is guided by the image that it edits; leave it out"
            )
        networks._check_pooled()
        networks._check_alone()
        added = tuple(map(networks._fitting, checkpoint.controlnets))
        if pag and added and added[0].pools:
            raise ExportError(
                f"pag: {checkpoint.controlnets[0].source}: a ControlNet that pools guides the prompt alone, "
                "which perturbed attention does not go with; leave one of the two out"
            )
        for adapter in checkpoint.ip_adapters:
            adapter.check_fits(unet)
        return replace(
            networks,
            controlnets=added,
            ip_adapters=tuple(adapter.config for adapter in checkpoint.ip_adapters),
        )

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Of an image, by each IP-Adapter."""
        return tuple(config.tokens for config in self.ip_adapters)

    def _check_pooled(self) -> None:
        """Raises `CheckpointError` for a U-Net that is told more or fewer numbers than its pipeline tells."""
        given = self.checkpoint.components[self.text[-1]].config.get("projection_dim")
        if self.pooled_width is not None and given is not None and given != self.pooled_width:
            raise CheckpointError(
                f"{self.checkpoint.source}: {self.text[-1]} gives {given} numbers of a prompt, and the U-Net "
                f"takes {self.pooled_width} beside those of sizes; check requires_aesthetics_score in "
                "model_index.json, which is true of SDXL's refiner alone"
            )

    def _check_alone(self) -> None:
        """Raises `CheckpointError` for ControlNets beside an InstructPix2Pix U-Net: no pipeline has both."""
        if self.checkpoint.controlnets and self._image_latents_scale() is not None:
            raise CheckpointError(
                f"{self.checkpoint.source}: an InstructPix2Pix U-Net is guided by the image that it edits; "
                "leave ControlNets out"
            )

    def _fitting(self, added: ControlNetSource) -> ControlNetConfig:
        """The config of a ControlNet. Raises `CheckpointError` for one that does not fit."""
        try:
            config = ControlNetConfig.from_diffusers(added.component.config)
            config.check_fits(self.unet, self.vae.latent_channels, self.factor)
        except CheckpointError as error:
            raise CheckpointError(f"{added.source}: {error}") from error
        return config

    def fp8(self) -> tuple[str, ...]:
        """The linear layers of the U-Net that FP8 is for. Raises `ExportError` when there are none."""
        layers = fp8_layers(self.step())
        if not layers:
            raise ExportError(
                f"fp8: {self.checkpoint.source}: no linear layer of this U-Net has widths that are multiples "
                f"of {MULTIPLE}; leave fp8 out"
            )
        return layers

    def fp8_convolutions(self) -> tuple[str, ...]:
        """The 3×3 convolutions of the U-Net that can be in FP8."""
        return fp8_convolutions(self.step())

    def int8(self) -> tuple[str, ...]:
        """The linear layers of the U-Net that INT8 is for. Raises `ExportError` when there are none."""
        layers = int8_layers(self.step())
        if not layers:
            raise ExportError(
                f"int8: {self.checkpoint.source}: no linear layer of this U-Net is wide enough to gain by it;"
                " leave int8 out"
            )
        return layers

    def step(self) -> UNet | ControlledUNet:
        """The network of a step, without weights."""
        with torch.device("meta"):
            branch = self.step_cache.branch if self.step_cache else None
            unet = UNet(self.unet, branch, self.image_tokens)
            attach_to_step(unet, len(self.checkpoint.chosen), empty_of(unet, self.checkpoint.ranks("unet")))
            perturb(unet, self.perturbed)
            beside = [ControlNet(config.way_down, config.pools) for config in self.controlnets]
            return ControlledUNet(unet, beside) if beside else unet

    def takes_loras(self, module: str) -> bool:
        """Whether a module outside of the loop has layers that LoRAs which requests choose change."""
        ranks = self.checkpoint.ranks(module if module in self.text else "unet")
        if module in self.text or not ranks:
            return bool(ranks)
        with torch.device("meta"):
            step = UNet(self.unet)
            if module == "context":
                return bool(empty_of(Context(self.unet, context_parts(step)), ranks))
            return bool(empty_of(TimeShift(self.unet, shift_parts(step)), ranks))

    def model(self) -> Model:
        """What the manifest says of the networks."""
        step = self.step()
        loras = tuple(lora.called for lora in self.checkpoint.chosen)
        widths = [int(self.checkpoint.components[name].config["hidden_size"]) for name in self.text]
        return self._model(
            text_width=sum(widths),
            context_width=sum(step.context_widths),
            time_shift_width=sum(step.shift_widths) + len(loras) + bool(self.pag),
            control_channels=sum(config.channels for config in self.controlnets) or None,
            controlnets=len(self.controlnets),
            control_layers=control_layers(self.unet) if self.controlnets else 0,
            pooling_controlnets=tuple(i for i, config in enumerate(self.controlnets) if config.pools),
            step_cache=self.step_cache,
            loras=loras,
            pag=self.pag,
            **self._of_images(),
        )

    def _of_images(self) -> dict[str, Any]:
        """What the manifest says of IP-Adapters; nothing where there are none."""
        encoder = self.checkpoint.image_encoder
        if encoder is None:
            return {}
        named = zip(adapter_names(len(self.ip_adapters)), self.ip_adapters, strict=True)
        return {
            "ip_adapters": tuple(
                IPAdapter(module=name, tokens=config.tokens, reads=config.reads) for name, config in named
            ),
            "image_processor": encoder.processor,
            "transformers": tuple(Transformer(**run._asdict()) for run in transformers(self.unet)),
        }


def _perturbed(unet: UNetConfig, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The layers in which one of the patterns is found. Raises `ExportError` for one found in none."""
    if not patterns:
        return ()
    with torch.device("meta"):
        step, found = UNet(unet), set[str]()
    for pattern in patterns:
        try:
            layers = matching(step, pattern)
        except ValueError as error:
            raise ExportError(f"pag: {error}; give a part of a layer's name, such as mid") from None
        if not layers:
            there = ", ".join(dict.fromkeys(name.partition(".attentions")[0] for name in matching(step, "")))
            raise ExportError(
                f"pag: {pattern!r:.60} is in no name of a self-attention layer of this U-Net; they are in: "
                f"{there}"
            )
        found.update(layers)
    return tuple(sorted(found))


def _step_cache(unet: UNetConfig, branch: int) -> StepCache:
    skips = rungs(unet)
    if branch >= len(skips):
        raise ExportError(
            f"cache_branch: {branch}, but this U-Net has branches 0 to {len(skips) - 1}; 0 is the usual one"
        )
    return StepCache(branch=branch, channels=skips[branch].channels, scale=2 ** skip_levels(unet)[branch])
