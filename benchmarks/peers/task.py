"""What every side is to do: the same work on the same numbers. Read in every peer's environment too."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

MEASURES = {
    "text": "text encoder",
    "unet": "U-Net, 2 rows",
    "vae": "VAE decoder",
    "step": "guided step",
    "picture": "whole picture",
}
"""What is measured, by the names that a worker is asked for. A step is measured as part of a picture."""
ASKED = ("text", "unet", "vae", "picture")


@dataclass(frozen=True)
class Task:
    """checkpoint: a diffusers folder. exports: where each side has a folder for what it makes of it.
    inputs: a file of tensors: `ids` [1, 77] int64, `sample` [2, C, h, w], `hidden` [2, 77, D] and `latents`
    [1, C, h, w] float32. outputs: where each side has a folder for what it computes. seed: of torch's
    generator on the CPU that the latents are drawn with, for sides that draw them themselves.
    """

    checkpoint: str
    exports: str
    inputs: str
    outputs: str
    height: int
    width: int
    steps: int
    threads: int
    prompt: str = "a cabin in misty mountains, watercolor style"
    guidance: float = 7.0
    timestep: int = 500
    seed: int = 42

    @classmethod
    def read(cls, path: str | Path) -> Self:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        return path

    def call(self) -> dict[str, Any]:
        """The arguments of the pipelines, of which all have diffusers' signature, without the latents."""
        return {
            "prompt": self.prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "output_type": "np",
        }
