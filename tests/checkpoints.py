"""Tiny random checkpoints in diffusers layout, made with the stock classes: the real thing, but small.

Pictures are 64x64 (latents 8x8), text is 77 tokens of a byte-level CLIP vocabulary made here, and a whole
checkpoint is built in about a second. Weights are random yet not degenerate: norms and biases too.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

_PAIRS = (
    "th",
    "in",
    "er",
    "an",
    "on",
    "re",
    "he",
    "at",
    "en",
    "ou",
    "es",
    "or",
    "nd",
    "it",
    "is",
    "ar",
    "te",
)
_WORDS = ("the", "a", "in", "of", "and", "cabin", "sea", "style", "misty", "mountain", "boat", "forest")
# The configuration of a VAE of two levels, for pictures of 16x16.
SMALL_VAE: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP vocabulary (token -> id) and its merges: all bytes, some pairs, some words; 0 is "!"."""
    letters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    tokens = [*letters, *(letter + "</w>" for letter in letters)]

    def merge(left: str, right: str) -> str:
        if (left, right) not in merges:
            merges.append((left, right))
            tokens.append(left + right)
        return left + right

    for pair in _PAIRS:
        merge(pair[0], pair[1])
    for word in _WORDS:
        token = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            token = merge(letter, token)
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def save_tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> int:
    """Write a tokenizer folder as the checkpoints on the Hub have it; returns the size of its vocabulary."""
    vocab, merges = vocabulary()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    (folder / "special_tokens_map.json").write_text(json.dumps(special), "utf-8")
    config = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return len(vocab)


def build_sd(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    in_channels: int = 4,
    seed: int = 0,
    pipeline: str = "StableDiffusionPipeline",
    variant: str | None = None,
    max_shard_size: str = "10GB",
    text_layers: int = 3,
    vae: Mapping[str, Any] = MappingProxyType({}),
    **unet: Any,
) -> Path:
    """Write a tiny SD 1.x checkpoint into `folder` and return it. `vae` and `unet` override their configs."""
    torch.manual_seed(seed)
    save = {"variant": variant, "max_shard_size": max_shard_size}
    size = save_tokenizer(folder / "tokenizer")
    text = _text_encoder("CLIPTextModel", size, seed, width=32, layers=text_layers)
    text.save_pretrained(folder / "text_encoder", **save)
    _unet(seed, in_channels=in_channels, **unet).save_pretrained(folder / "unet", **save)
    _vae(seed, **vae).save_pretrained(folder / "vae", **save)
    _save_scheduler(folder, prediction_type)
    entries = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    return _save_index(folder, pipeline, entries)


def build_shallow_sd(folder: Path, *, seed: int = 0, levels: int = 2, in_channels: int = 4) -> Path:
    """An SD 1.x checkpoint with one or two of each kind of layer, for what takes its time over each layer.

    Its pictures are 16x16, of which the latents are 8x8. levels: of its U-Net, one or two.
    """
    return build_sd(
        folder,
        seed=seed,
        in_channels=in_channels,
        text_layers=1,
        vae=SMALL_VAE,
        block_out_channels=(32, 64)[-levels:],
        down_block_types=("DownBlock2D",) * levels,  # attention is in the middle alone
        up_block_types=("UpBlock2D",) * levels,
    )


def build_flat_sd(folder: Path, *, seed: int = 0) -> Path:
    """The same with a U-Net of one level, for what takes its time over each operation."""
    return build_shallow_sd(folder, seed=seed, levels=1)


def build_sdxl(
    folder: Path,
    *,
    seed: int = 0,
    pipeline: str = "StableDiffusionXLPipeline",
    force_zeros_for_empty_prompt: bool = True,
    vae: Mapping[str, Any] = MappingProxyType({}),
    **unet: Any,
) -> Path:
    """Write a tiny SDXL checkpoint into `folder` and return it: two text encoders, text_time conditioning.

    `vae` and `unet` override their configs.
    """
    torch.manual_seed(seed)
    size = save_tokenizer(folder / "tokenizer")
    save_tokenizer(folder / "tokenizer_2", pad="!")
    first = _text_encoder("CLIPTextModel", size, seed, width=32)
    second = _text_encoder("CLIPTextModelWithProjection", size, seed + 1, width=48, hidden_act="gelu")
    first.save_pretrained(folder / "text_encoder")
    second.save_pretrained(folder / "text_encoder_2")
    sdxl = {
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [2, 4],
    }
    _unet(seed, **{**sdxl, **unet}).save_pretrained(folder / "unet")
    _vae(seed, **{"scaling_factor": 0.13025, **vae}).save_pretrained(folder / "vae")
    _save_scheduler(folder, "epsilon")
    entries = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": force_zeros_for_empty_prompt,
    }
    return _save_index(folder, pipeline, entries)


def build_refiner(
    folder: Path, *, seed: int = 7, vae: Mapping[str, Any] = MappingProxyType({}), **unet: Any
) -> Path:
    """Write a tiny SDXL refiner into `folder` and return it: the second text encoder alone, and a score.

    `vae` and `unet` override their configs.
    """
    torch.manual_seed(seed)
    size = save_tokenizer(folder / "tokenizer_2", pad="!")
    text = _text_encoder("CLIPTextModelWithProjection", size, seed, width=48, hidden_act="gelu")
    text.save_pretrained(folder / "text_encoder_2")
    refiner = {
        "cross_attention_dim": 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 5 * 8,
        "transformer_layers_per_block": 2,
        "attention_head_dim": [2, 4],
    }
    _unet(seed, **{**refiner, **unet}).save_pretrained(folder / "unet")
    _vae(seed, **{"scaling_factor": 0.13025, **vae}).save_pretrained(folder / "vae")
    _save_scheduler(folder, "epsilon")
    entries = {
        "text_encoder": [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
    }
    return _save_index(folder, "StableDiffusionXLImg2ImgPipeline", entries)


def build_controlnet(folder: Path, checkpoint: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny ControlNet for the U-Net of a tiny checkpoint into `folder` and return it.

    What a ControlNet begins with at zero, so that it adds nothing, is random here; and the weights of the
    control image's embedding are large enough for the image to matter.
    """
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(seed + 5)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(checkpoint / "unet"))
    names = inspect.signature(ControlNetModel.__init__).parameters.keys() & unet.config.keys()
    config = {name: unet.config[name] for name in names} | {
        "in_channels": 4,
        "conditioning_embedding_out_channels": (4, 8, 12, 16),
    }
    made = ControlNetModel(**{**config, **overrides})
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            embeds = name.startswith("controlnet_cond_embedding.")
            if tensor.ndim == 4 and (embeds or not tensor.any()):
                tensor.copy_(torch.randn(tensor.shape) * (1.8 if embeds else 1.0) / tensor[0].numel() ** 0.5)
    _stir(made, seed + 4).save_pretrained(folder)
    return folder


def build_image_encoder(folder: Path, *, seed: int = 0, width: int = 32, projection: int = 24) -> Path:
    """Write a tiny CLIP image encoder, of images of 30x30 in 9 patches, into `folder` and return it."""
    import transformers

    torch.manual_seed(seed + 6)
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=30,
        patch_size=10,
        projection_dim=projection,
        hidden_act="gelu",
    )
    _stir(transformers.CLIPVisionModelWithProjection(config), seed + 6).save_pretrained(folder)
    return folder


def build_ip_adapter(
    path: Path, checkpoint: Path, form: str = "plain", *, seed: int = 0, encoder: Path | None = None
) -> Path:
    """Write an IP-Adapter of a form for the U-Net of a checkpoint to a .safetensors file, and return that.

    An image encoder is written beside it, or is that in the folder `encoder`. Its tensors have the names and
    shapes of the released ones, and numbers that make an image matter.
    """
    from diffusers import UNet2DConditionModel

    generator = torch.Generator().manual_seed(seed + 7)
    encoder = encoder or build_image_encoder(path.parent / "image_encoder")
    seen = json.loads((encoder / "config.json").read_text("utf-8"))
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(checkpoint / "unet"))
    width, hidden, inner = unet.config.cross_attention_dim, 40, 128
    shapes: dict[str, tuple[int, ...]] = {}
    if form == "plain":
        shapes |= {"proj.weight": (4 * width, seen["projection_dim"]), "proj.bias": (4 * width,)}
        shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    elif form == "full":
        side = seen["hidden_size"]
        shapes |= {"proj.0.weight": (side, side), "proj.0.bias": (side,)}
        shapes |= {"proj.2.weight": (width, side), "proj.2.bias": (width,)}
        shapes |= {"proj.3.weight": (width,), "proj.3.bias": (width,)}
    else:
        shapes |= {"latents": (1, 5, hidden), "proj_in.weight": (hidden, seen["hidden_size"])}
        shapes |= {"proj_in.bias": (hidden,), "proj_out.weight": (width, hidden), "proj_out.bias": (width,)}
        shapes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
        for layer in (f"layers.{number}" for number in range(4)):
            norms = (f"{layer}.0.norm1", f"{layer}.0.norm2", f"{layer}.1.0")
            shapes |= {f"{norm}.{leaf}": (hidden,) for norm in norms for leaf in ("weight", "bias")}
            shapes |= {
                f"{layer}.0.to_q.weight": (inner, hidden),
                f"{layer}.0.to_kv.weight": (2 * inner, hidden),
            }
            shapes |= {f"{layer}.0.to_out.weight": (hidden, inner)}
            shapes |= {
                f"{layer}.1.1.weight": (4 * hidden, hidden),
                f"{layer}.1.3.weight": (hidden, 4 * hidden),
            }
    shapes = {f"image_proj.{name}": shape for name, shape in shapes.items()}
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            rows = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            shapes |= {f"ip_adapter.{number}.to_{one}_ip.weight": (rows, width) for one in "kv"}
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensor = 0.1 * tensor + (1.0 if name.endswith("weight") else 0.0)
        tensors[name] = tensor / shape[-1] ** 0.5 if len(shape) == 2 else tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def _text_encoder(
    name: str, vocabulary_size: int, seed: int, *, width: int, hidden_act: str = "quick_gelu", layers: int = 3
) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=hidden_act,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=1,
    )
    return _stir(getattr(transformers, name)(config), seed + 1)


def _unet(seed: int, **overrides: Any) -> Any:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    }
    return _stir(UNet2DConditionModel(**{**config, **overrides}), seed + 2)


def _vae(seed: int, **overrides: Any) -> Any:
    from diffusers import AutoencoderKL

    config = {
        "sample_size": 64,
        "latent_channels": 4,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return _stir(AutoencoderKL(**{**config, **overrides}), seed + 3)


def _stir(model: Any, seed: int) -> Any:
    """Move what initialization leaves at zero or one, so that a lost bias or norm would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model.eval()


def _save_scheduler(folder: Path, prediction_type: str) -> None:
    from diffusers import PNDMScheduler

    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    path = folder / "scheduler" / "scheduler_config.json"  # SD 1.5's own also holds what PNDM does not read
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "clip_sample": False}), "utf-8")


def _save_index(folder: Path, pipeline: str, entries: dict[str, Any]) -> Path:
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **entries,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return folder


def build_vae(folder: Path, *, seed: int = 3, **overrides: Any) -> Path:
    """Write another VAE for the tiny checkpoints, of SD's latents, into `folder` and return it."""
    torch.manual_seed(seed)
    _vae(seed, **overrides).save_pretrained(folder)
    return folder


def build_tiny_vae(folder: Path, *, levels: int = 4, channels: int = 8, seed: int = 4, **config: Any) -> Path:
    """Write a tiny VAE (TAESD's network, narrower) of so many levels into `folder` and return it."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    widths = (channels,) * levels
    blocks = {
        "num_encoder_blocks": (1, *(2,) * (levels - 1)),
        "num_decoder_blocks": (*(2,) * (levels - 1), 1),
    }
    sides = {f"{side}_block_out_channels": widths for side in ("encoder", "decoder")}
    made = AutoencoderTiny(**{**blocks, **sides, **config})
    with torch.no_grad():
        for name, tensor in made.named_parameters():  # neither fading nor growing from layer to layer
            fan = tensor[0].numel() if tensor.ndim == 4 else 1
            gain = 0.5 if ".conv." in name else 1.2
            tensor.copy_(torch.randn(tensor.shape) * (gain / fan**0.5 if tensor.ndim == 4 else 0.05))
        made.decoder.layers[-1].bias.fill_(0.5)
    made.save_pretrained(folder)
    return folder
