"""What an engine is, for a person: its manifest, a line a fact."""

import re
from collections import Counter
from collections.abc import Mapping

from sdfast.manifest import Manifest


def summary(manifest: Manifest) -> str:
    """The manifest for a person: a line a fact."""
    unet = manifest.modules["unet"].variants
    sizes = dict.fromkeys(f"{form.width}x{form.height}" for form in unet)
    packages, size = manifest.builder.packages, sum(file.size for file in manifest.files)
    facts = {
        "engine": manifest.name,
        "created": manifest.created,
        "checkpoint": " ".join(filter(None, [manifest.checkpoint.source, manifest.checkpoint.revision])),
        **_graphs(manifest),
        **_beside(manifest),
        "family": "sdxl refiner" if manifest.model.scored else manifest.model.family,
        "backend": " ".join(filter(None, [manifest.backend, manifest.dtype, manifest.provider])),
        **_measured(manifest),
        **_approximated(manifest),
        **_vae(manifest),
        "sizes": ", ".join(sizes),
        "pictures": f"up to {manifest.max_images} a call",
        "files": f"{len(manifest.files)}, {size / 1e6:,.1f} MB, verified",
        "built with": ", ".join(f"{name} {version}" for name, version in packages.items()),
        **_compiled_for(manifest),
        "validation": _verdict(manifest),
    }
    return "\n".join(f"{name:<12} {value}" for name, value in facts.items())


def _graphs(manifest: Manifest) -> dict[str, str]:
    """Where the networks are somebody else's graphs."""
    if manifest.checkpoint.graphs is None:
        return {}
    return {"graphs": f"{manifest.checkpoint.graphs}'s, given sdfast's inputs and outputs; not sdfast's own"}


def _beside(manifest: Manifest) -> dict[str, str]:
    """The LoRAs, the embeddings, the ControlNets and the IP-Adapters, where there are any."""
    made_of = manifest.checkpoint
    several = "s" * (len(made_of.controlnets) > 1)
    told = {
        "LoRAs": (*made_of.loras, *made_of.chosen),
        "embeddings": made_of.embeddings,
        f"ControlNet{several}": made_of.controlnets,
        "IP-Adapters": made_of.ip_adapters,
        "sees with": [made_of.image_encoder] if made_of.image_encoder else [],
        "VAE of": [made_of.vae] if made_of.vae else [],
    }
    return {name: "; ".join(map(str, found)) for name, found in told.items() if found}


def _compiled_for(manifest: Manifest) -> dict[str, str]:
    target = manifest.builder.target
    if target is None:
        return {}
    versions = f"torch {target.torch}" + (f", CUDA {target.cuda}" if target.cuda else "")
    return {"compiled for": f"{target.architecture.split()[0]} ({target.device}), {versions}"}


def _measured(manifest: Manifest) -> dict[str, str]:
    """How many shapes each kernel that an export took computes; `to_json` has each."""
    forms = [form for module in manifest.modules.values() for form in module.variants]
    told = {
        "attention": {what: kind for form in forms for what, kind in form.attention.items()},
        "kernels": {what: kind for form in forms for what, kind in form.kernels.items()},
    }
    return {name: _kinds(taken) for name, taken in told.items() if taken}


def _approximated(manifest: Manifest) -> dict[str, str]:
    """The layers in FP8 or INT8 by their own names, without where they are; `to_json` has each. And the
    branch of step caching, and the layers to be perturbed, for which a request asks."""
    told = {}
    if manifest.rounding is not None:
        names = manifest.fp8 or manifest.int8
        kinds = Counter(_layer_kind(name) for name in names)
        layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        told[f"in {manifest.rounding}"] = f"{len(names)} layers of the U-Net: {layers}"
    if manifest.model.step_cache is not None:
        told["step cache"] = f"branch {manifest.model.step_cache.branch}, for requests with a cache_interval"
    if manifest.model.pag:
        told["PAG"] = f"{', '.join(manifest.model.pag)}, for requests with a pag_scale"
    return told


def _vae(manifest: Manifest) -> dict[str, str]:
    """The precision of each half of the VAE, where it is not simply that of the engine."""
    names = ("vae_decoder", "vae_encoder")
    found = {name: manifest.modules[name].half_range for name in names if name in manifest.modules}
    told = {name: str(half) for name, half in found.items() if half is not None}
    if not told and manifest.dtype == "fp16" and manifest.vae_dtype == "fp32":
        return {"VAE": "fp32, as the recipe asks"}
    return told


def _verdict(manifest: Manifest) -> str:
    last = manifest.validation
    if last is None:
        return "never validated; run `sdfast validate`"
    figures = ", ".join(f"{name} {value:.3g}" for name, value in last.figures.items())
    return f"{'passed' if last.passed else 'FAILED'} on {last.created}: {figures}"


def _kinds(taken: Mapping[str, str]) -> str:
    """ "flash for 12 shapes, sdpa for 1": of what was taken for each shape, the most frequent first."""
    kinds = Counter(taken.values()).most_common()
    return ", ".join(f"{kind} for {count} shape{'s' * (count != 1)}" for kind, count in kinds)


def _layer_kind(name: str) -> str:
    """ "attn1.to_qkv" of "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_qkv"."""
    return re.sub(r".*\b((down|up)_blocks|resnets|attentions|transformer_blocks)\.\d+\.", "", name)
