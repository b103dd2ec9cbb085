"""sdfast: export Stable Diffusion once, serve it fast, prove it is the same picture.

The names below load on first use, so that importing sdfast costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdfast.drop_in import (
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionControlNetPAGInpaintPipeline,
        StableDiffusionControlNetPAGPipeline,
        StableDiffusionControlNetPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPAGImg2ImgPipeline,
        StableDiffusionPAGInpaintPipeline,
        StableDiffusionPAGPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
        StableDiffusionXLControlNetPAGImg2ImgPipeline,
        StableDiffusionXLControlNetPAGPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLInstructPix2PixPipeline,
        StableDiffusionXLPAGImg2ImgPipeline,
        StableDiffusionXLPAGInpaintPipeline,
        StableDiffusionXLPAGPipeline,
        StableDiffusionXLPipeline,
    )
    from sdfast.engine import Engine
    from sdfast.errors import (
        BackendError,
        CheckpointError,
        DependencyError,
        EngineError,
        ExportError,
        NumericalError,
        RequestError,
        SdfastError,
        SettingsError,
        ValidationFailed,
    )
    from sdfast.export.build import export
    from sdfast.pipeline import Pipeline
    from sdfast.validation import validate

_HOMES = {
    "Engine": "sdfast.engine",
    "Pipeline": "sdfast.pipeline",
    "StableDiffusionPipeline": "sdfast.drop_in",
    "StableDiffusionXLPipeline": "sdfast.drop_in",
    "StableDiffusionImg2ImgPipeline": "sdfast.drop_in",
    "StableDiffusionInpaintPipeline": "sdfast.drop_in",
    "StableDiffusionInstructPix2PixPipeline": "sdfast.drop_in",
    "StableDiffusionXLImg2ImgPipeline": "sdfast.drop_in",
    "StableDiffusionXLInpaintPipeline": "sdfast.drop_in",
    "StableDiffusionXLInstructPix2PixPipeline": "sdfast.drop_in",
    "StableDiffusionPAGPipeline": "sdfast.drop_in",
    "StableDiffusionXLPAGPipeline": "sdfast.drop_in",
    "StableDiffusionPAGImg2ImgPipeline": "sdfast.drop_in",
    "StableDiffusionPAGInpaintPipeline": "sdfast.drop_in",
    "StableDiffusionXLPAGImg2ImgPipeline": "sdfast.drop_in",
    "StableDiffusionXLPAGInpaintPipeline": "sdfast.drop_in",
    "StableDiffusionControlNetPAGPipeline": "sdfast.drop_in",
    "StableDiffusionControlNetPAGInpaintPipeline": "sdfast.drop_in",
    "StableDiffusionXLControlNetPAGPipeline": "sdfast.drop_in",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": "sdfast.drop_in",
    "StableDiffusionControlNetPipeline": "sdfast.drop_in",
    "StableDiffusionXLControlNetPipeline": "sdfast.drop_in",
    "StableDiffusionControlNetImg2ImgPipeline": "sdfast.drop_in",
    "StableDiffusionControlNetInpaintPipeline": "sdfast.drop_in",
    "StableDiffusionXLControlNetImg2ImgPipeline": "sdfast.drop_in",
    "StableDiffusionXLControlNetInpaintPipeline": "sdfast.drop_in",
    "export": "sdfast.export.build",
    "validate": "sdfast.validation",
    "SdfastError": "sdfast.errors",
    "RequestError": "sdfast.errors",
    "CheckpointError": "sdfast.errors",
    "ExportError": "sdfast.errors",
    "EngineError": "sdfast.errors",
    "BackendError": "sdfast.errors",
    "DependencyError": "sdfast.errors",
    "NumericalError": "sdfast.errors",
    "SettingsError": "sdfast.errors",
    "ValidationFailed": "sdfast.errors",
}

__all__ = [
    "BackendError",
    "CheckpointError",
    "DependencyError",
    "Engine",
    "EngineError",
    "ExportError",
    "NumericalError",
    "Pipeline",
    "RequestError",
    "SdfastError",
    "SettingsError",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPipeline",
    "ValidationFailed",
    "export",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdfast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
