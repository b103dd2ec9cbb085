"""Routes that tell or refuse one fixed thing, most of what AUTOMATIC1111 has and this server has none of."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from sdfast.server.automatic1111.fields import UPSCALERS_HERE
from sdfast.server.jobs import EngineInfo
from sdfast.server.problems import Problem

_NONE: Mapping[str, Any] = {
    "upscalers": [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}
        for name, known in UPSCALERS_HERE.items()
        if not known.startswith("latent")
    ],
    "latent-upscale-modes": [
        {"name": name} for name, known in UPSCALERS_HERE.items() if known.startswith("latent")
    ],
    "sd-modules": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "script-info": [],
    "extensions": [],
    "memory": {"ram": {"error": "is not measured"}, "cuda": {"error": "is not measured"}},
}
"""By its name under /sdapi/v1/, what a GET is answered."""

_NOTHING_NEW = ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings")
"""To look again for what the server draws with, which is settled when it starts, finds nothing new."""

_NO_UPSCALERS = "pictures are enlarged by txt2img with enable_hr only, and faces stay as they are drawn"
_EXPORT = "engines are exported beforehand, with their LoRAs and embeddings; see `sdfast export`"
_STARTED = "engines are loaded when the server starts, and stay"
_REFUSED: Mapping[str, str] = {
    "extra-single-image": _NO_UPSCALERS,
    "extra-batch-images": _NO_UPSCALERS,
    "interrogate": "there is no model here that describes images",
    "unload-checkpoint": _STARTED,
    "reload-checkpoint": _STARTED,
    "create/embedding": _EXPORT,
    "create/hypernetwork": _EXPORT,
    "train/embedding": _EXPORT,
    "train/hypernetwork": _EXPORT,
    "server-kill": "stop it where it was started",
    "server-restart": "stop it where it was started",
    "server-stop": "stop it where it was started",
}
"""By its name under /sdapi/v1/, why a POST is refused."""


def add(router: APIRouter) -> None:
    """They are not in the server's schema, which tells what it does."""
    for name, answer in _NONE.items():
        router.get(f"/sdapi/v1/{name}", include_in_schema=False)(_teller(answer))
    for name in _NOTHING_NEW:
        router.post(f"/sdapi/v1/{name}", include_in_schema=False)(_teller(None))
    for name, reason in _REFUSED.items():
        router.post(f"/sdapi/v1/{name}", include_in_schema=False)(_refuser(name, reason))


def embeddings_of(engine: EngineInfo) -> dict[str, Any]:
    """`GET /sdapi/v1/embeddings`: those of an engine, which does not know how they were trained."""
    untold = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name"))
    loaded = {
        token: {**untold, "shape": engine.text_width, "vectors": vectors}
        for token, vectors in engine.embeddings.items()
    }
    return {"loaded": loaded, "skipped": {}}


def vaes_of(engine: EngineInfo) -> list[dict[str, Any]]:
    """The VAE that the engine has in the place of its checkpoint's own, if it has one."""
    return [] if engine.vae is None else [{"model_name": engine.vae[0], "filename": engine.vae[0]}]


def loras_of(engine: EngineInfo) -> list[dict[str, Any]]:
    """`GET /sdapi/v1/loras`: those of an engine that requests choose."""
    return [{"name": name, "alias": name, "path": "", "metadata": {}} for name in engine.loras]


def _teller(answer: Any) -> Any:
    async def tell() -> Any:
        return answer

    return tell


def _refuser(name: str, reason: str) -> Any:
    async def refuse() -> None:
        raise Problem(501, f"{name} is not supported: {reason}", code="not_supported")

    return refuse
