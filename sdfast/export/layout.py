"""The diffusers layout of a checkpoint, as rules on names: what is supported, where the weights lie.

Everything here works on file names and parsed JSON alone, so that the same rules judge a folder on disk and
the file listing of a repository that is still to be downloaded.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from sdfast.errors import CheckpointError

Family = Literal["sd", "sdxl"]

PIPELINES: Mapping[str, Family] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
    "StableDiffusionInstructPix2PixPipeline": "sd",
    "StableDiffusionPAGPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "LatentConsistencyModelImg2ImgPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionXLInstructPix2PixPipeline": "sdxl",
    "StableDiffusionXLPAGPipeline": "sdxl",
}

COMPONENTS: Mapping[Family, tuple[str, ...]] = {
    "sd": ("text_encoder", "unet", "vae"),
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae"),
}
TOKENIZERS: Mapping[Family, tuple[str, ...]] = {"sd": ("tokenizer",), "sdxl": ("tokenizer", "tokenizer_2")}

_REFINERS = ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
"""What draws with SDXL's refiner, which has the second of SDXL's text encoders alone."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
TRUSTED_LIBRARIES = ("diffusers", "transformers")
"""Where a component's class may come from. Any other name means code that ships with the checkpoint."""

_STEMS = {
    "text_encoder": "text_encoder/model",
    "text_encoder_2": "text_encoder_2/model",
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
}
CONTROLNET = "controlnet"
IMAGE_ENCODER = "image_encoder"
VAE_ALONE = "a VAE of its own"
_ALONE = {
    CONTROLNET: "diffusion_pytorch_model",
    IMAGE_ENCODER: "model",
    VAE_ALONE: "diffusion_pytorch_model",
}
"""Components that are no part of a pipeline's folder, but have one of their own."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

CONVERT = (
    "sdfast reads safetensors only, because a pickle can run code when it is read: where you trust the file, "
    "load it with diffusers and save it again with pipe.save_pretrained(FOLDER), then give that folder"
)


def config_files(variant: str | None) -> list[str]:
    """What a checkpoint may have beside its weights: small, and all of it to be fetched where it is there."""
    return [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{name}/config.json" for name in _STEMS),
        *(_index_name(name, variant) for name in _STEMS),
        *(f"{name}/{file}" for name in TOKENIZERS["sdxl"] for file in _TOKENIZER_FILES),
    ]


def controlnet_config_files(variant: str | None) -> list[str]:
    """The same of a ControlNet."""
    return ["config.json", _index_name(CONTROLNET, variant)]


def check_controlnet(names: Collection[str], source: str) -> None:
    """Refuse a folder that is not a ControlNet's."""
    if "config.json" not in names:
        files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
        instead = f"the file itself: {files[0]}" if files else "the folder that save_pretrained() wrote"
        raise CheckpointError(f"{source}: no config.json, so not a ControlNet's folder; give {instead}")


def image_encoder_config_files() -> list[str]:
    """The same of the image encoder that IP-Adapters read."""
    return ["config.json", "preprocessor_config.json", _index_name(IMAGE_ENCODER, None)]


def check_image_encoder(names: Collection[str], source: str) -> None:
    """Refuse a folder that is not an image encoder's."""
    if "config.json" not in names:
        raise CheckpointError(
            f"{source}: no config.json, so not an image encoder's folder; give one with config.json and "
            "model.safetensors: --image-encoder FOLDER"
        )


def vae_config_files(variant: str | None) -> list[str]:
    """The same of a VAE, which may be a part of a checkpoint."""
    own = ["config.json", _index_name(VAE_ALONE, variant)]
    return ["model_index.json", *own, *(f"vae/{name}" for name in own)]


def vae_folder(names: Collection[str], source: str) -> str:
    """Where in a folder a VAE lies: "" of its own, "vae" of a checkpoint. Refuses what holds none."""
    if "model_index.json" not in names and "config.json" in names:
        return ""
    if "vae/config.json" in names:
        return "vae"
    files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    instead = f"the file itself: {files[0]}" if files else "the folder that save_pretrained() wrote"
    raise CheckpointError(f"{source}: no config.json, so not a VAE's folder; give {instead}")


def check_index(index: Mapping[str, Any], source: str) -> Family:
    """The family of the pipeline in a `model_index.json`; what is not supported is refused by name."""
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{source}: model_index.json names a custom pipeline ({name!r}); sdfast runs no code from a "
            f"checkpoint. Supported: {', '.join(PIPELINES)}"
        )
    if "custom_pipeline" in index or "auto_map" in index:
        raise CheckpointError(
            f"{source}: model_index.json asks for custom code; sdfast runs no code from a checkpoint. "
            f"Save the pipeline again with one of the stock classes: {', '.join(PIPELINES)}"
        )
    if name not in PIPELINES:
        raise CheckpointError(
            f"{source}: {name} is not supported; sdfast runs the U-Net family: {', '.join(PIPELINES)}"
        )
    if is_refiner(index) and name not in _REFINERS:
        raise CheckpointError(
            f"{source}: requires_aesthetics_score: {name} tells its U-Net no score; what draws with SDXL's "
            f"refiner is {' or '.join(_REFINERS)}"
        )
    for component in (*components(index), *tokenizers(index), "scheduler"):
        _check_component(index, component, source)
    for component in ("text_encoder", "tokenizer"):
        if is_refiner(index) and index.get(component) not in (None, [None, None]):
            raise CheckpointError(
                f"{source}: requires_aesthetics_score, and a {component}: SDXL's refiner has text_encoder_2 "
                "and tokenizer_2 alone, and no other U-Net that is told a score is supported"
            )
    return PIPELINES[name]


def is_refiner(index: Mapping[str, Any]) -> bool:
    """Whether it is SDXL's refiner: its U-Net is told an aesthetic score."""
    return bool(index.get("requires_aesthetics_score"))


def components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The networks of a pipeline of a supported class."""
    return COMPONENTS[PIPELINES[index["_class_name"]]][is_refiner(index) :]


def tokenizers(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Its tokenizers likewise."""
    return TOKENIZERS[PIPELINES[index["_class_name"]]][is_refiner(index) :]


def _check_component(index: Mapping[str, Any], component: str, source: str) -> None:
    """Refuse a component that is absent, comes with its own code, or is of a class sdfast does not have."""
    entry = index.get(component)
    if entry is None or entry == [None, None]:
        raise CheckpointError(
            f"{source}: model_index.json names no {component}, which {index['_class_name']} needs "
            "(a part of a pipeline cannot be exported); give the whole pipeline"
        )
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)):
        raise CheckpointError(
            f"{source}: model_index.json gives {component} as {entry!r}, not [library, class]"
        )
    library, name = entry
    if library not in TRUSTED_LIBRARIES:
        raise CheckpointError(
            f"{source}: {component} is {library}.{name}, code outside of {' and '.join(TRUSTED_LIBRARIES)}; "
            "sdfast runs no code from a checkpoint: save it again with a stock class"
        )
    allowed = CLASSES.get(component)
    if allowed and name not in allowed:
        raise CheckpointError(f"{source}: {component} is a {name}; supported: {', '.join(allowed)}")


def weights_file(names: Collection[str], component: str, variant: str | None, source: str) -> str:
    """The one file that leads to a component's weights: its safetensors, or the index of its shards.

    `names` are relative POSIX paths. A variant is taken from its own files and nowhere else: nothing falls
    back to another precision silently.
    """
    single = f"{_stem(component)}{_dotted(variant)}.safetensors"
    index = _index_name(component, variant)
    found = [name for name in (single, index) if name in names]
    if len(found) == 2:
        raise CheckpointError(f"{source}: both {single} and {index} are there; remove the one that is stale")
    if not found:
        raise CheckpointError(f"{source}: {_why_no_weights(names, component, variant)}")
    return found[0]


def _stem(component: str) -> str:
    return _STEMS.get(component) or _ALONE[component]


def _index_name(component: str, variant: str | None) -> str:
    return f"{_stem(component)}.safetensors.index{_dotted(variant)}.json"


def _dotted(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def _why_no_weights(names: Collection[str], component: str, variant: str | None) -> str:
    folder = PurePosixPath(_stem(component)).parent
    here = sorted(name for name in names if PurePosixPath(name).parent == folder)
    variants = _variants(here, component)
    if variants:
        wanted = f"variant {variant!r}" if variant else "default variant"
        offers = " or ".join(f"variant={name!r}" if name else "no variant" for name in variants)
        return f"{component} has no weights of the {wanted}; it has others: ask for {offers}"
    pickles = [name for name in here if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return f"the weights of {component} are a pickle only ({pickles[0]}). {CONVERT}"
    expected = f"{_stem(component)}.safetensors"
    return f"the weights of {component} are missing: expected {expected} (or its .index.json and shards)"


def _variants(here: Collection[str], component: str) -> list[str]:
    """The variants that a component's file names offer; "" stands for the default one."""
    stem = re.escape(_stem(component))
    single = re.compile(rf"{stem}(?:\.([\w-]+))?\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index(?:\.([\w-]+))?\.json")
    matches = (single.fullmatch(name) or index.fullmatch(name) for name in here)
    return sorted({match.group(1) or "" for match in matches if match})


def why_no_index(names: Collection[str]) -> str:
    """What a folder without a model_index.json seems to be, and what to give instead."""
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    singles = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if singles:
        return f"no model_index.json, so not a diffusers folder; give the file itself: {singles[0]}"
    if pickles:
        return f"no model_index.json, and a pickle ({pickles[0]}). {CONVERT}"
    return "no model_index.json, so not a diffusers folder; give the folder that pipe.save_pretrained() wrote"


def shard_files(index: Mapping[str, Any], index_name: str, source: str) -> dict[str, set[str]]:
    """The shards that an index names, each with its tensors: relative file name -> tensor names.

    A shard must be a plain safetensors name beside its index: no folder, no `..`, no absolute path.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{source}: {index_name} has no weight_map; download it again")
    folder = PurePosixPath(index_name).parent
    shards: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise CheckpointError(
                f"{source}: {index_name} names {file!r} for {tensor!r}; a shard must be a plain "
                ".safetensors file beside its index. Do not trust this checkpoint"
            )
        shards.setdefault(str(folder / file), set()).add(tensor)
    return shards
