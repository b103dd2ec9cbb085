"""Makes the built-in checkpoint from nothing: `python -m sdfast.landscapes.train --work FOLDER`.

Stages: pictures, tokenizer, text encoder, autoencoder, latents, denoiser, checkpoint, judge, figures. A stage
whose result lies in the work folder is not done again. Training needs the `export` extra and, for
torch.compile, a C++ compiler.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdfast.landscapes import autoencoder, checkpoint_folder, denoiser, judge, tokenizer
from sdfast.landscapes.captions import caption
from sdfast.landscapes.evaluate import evaluate
from sdfast.landscapes.pictures import draw_training_set, read_labels, read_pictures, scene_of
from sdfast.landscapes.text import CAPTIONS, train_text_encoder

PICTURES = 24000
LATENTS = 8000


class Workshop:
    """The work folder, and the stages that fill it."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work

    def pictures(self) -> NDArray[np.uint8]:
        """The training pictures [24000, 128, 128, 3]."""
        return read_pictures(draw_training_set(self.work / "pictures", PICTURES))

    def tokenizer(self) -> Path:
        """The folder of the tokenizer."""
        folder = self.work / "tokenizer"
        if not folder.exists():
            texts = [caption(scene_of(i), np.random.default_rng([3, i])) for i in range(CAPTIONS)]
            tokenizer.save(tokenizer.learn_merges(texts), folder)
        return folder

    def text_encoder(self) -> CLIPTextModel:
        """The frozen text encoder."""
        folder = self.work / "text_encoder"
        if not folder.exists():
            with (self.work / "text.log").open("w") as log:
                train_text_encoder(self.tokenizer(), folder, log)
        return CLIPTextModel.from_pretrained(folder).eval()

    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder, with its scaling factor."""
        folder = self.work / "vae"
        if not folder.exists():
            with (self.work / "vae.log").open("w") as log:
                autoencoder.train_autoencoder(self.pictures(), folder, log, autoencoder.BUDGET)
        return AutoencoderKL.from_pretrained(folder).eval()

    def latents(self) -> Tensor:
        """The latents of the training pictures, scaled to unit deviation, [8000, 8, 16, 16]."""
        path = self.work / "latents.pt"
        if not path.exists():
            model = self.autoencoder()
            torch.save(
                autoencoder.encode(model, self.pictures()[:LATENTS]) * model.config.scaling_factor, path
            )
        latents: Tensor = torch.load(path, weights_only=True)
        return latents

    def denoiser(self) -> UNet2DConditionModel:
        """The U-Net."""
        folder = self.work / "unet"
        if not folder.exists():
            words = tokenizer.Tokenizer(self.tokenizer())
            examples = denoiser.Examples(self.latents(), self.text_encoder(), words, seed=3)
            with (self.work / "unet.log").open("w") as log:
                denoiser.train_denoiser(examples, folder, log, denoiser.BUDGET)
        return UNet2DConditionModel.from_pretrained(folder)

    def judge(self) -> judge.Judge:
        """The judge of pictures."""
        path = self.work / "judge.safetensors"
        if not path.exists():
            with (self.work / "judge.log").open("w") as log:
                judge.train_judge(self.pictures(), read_labels(PICTURES), self.autoencoder(), path, log)
        return judge.load_judge(path)

    def checkpoint(self, folder: Path) -> None:
        """Put the parts together as a diffusers folder, replacing an older one in one step."""
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        assemble(self.tokenizer(), self.text_encoder(), self.denoiser(), self.autoencoder(), part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def assemble(
    words: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, vae: AutoencoderKL, folder: Path
) -> None:
    """Save a diffusers folder: U-Net and autoencoder in half precision, the text encoder in single.

    `from_pretrained` without a dtype loads the two diffusers models as float32 whatever the file holds, but
    gives a transformers model the file's dtype; stored so, all three come out as float32.
    """
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.float(),
        tokenizer=CLIPTokenizer.from_pretrained(words),
        unet=unet.half(),
        scheduler=DDIMScheduler(**denoiser.SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    for file in words.iterdir():  # transformers 5 writes tokenizer.json only; older readers want these
        shutil.copyfile(file, folder / "tokenizer" / file.name)


def make(work: Path, folder: Path) -> dict[str, Any]:
    """All stages; returns the measured figures and writes them to `figures.json` in the work folder."""
    workshop = Workshop(work)
    workshop.checkpoint(folder)
    figures = evaluate(folder, workshop.judge())
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sdfast.landscapes.train", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, logs and parts (4 GB)")
    parser.add_argument(
        "--checkpoint", type=Path, help="where the checkpoint goes (default: into the package)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads for training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(make(options.work, options.checkpoint or checkpoint_folder()), indent=2))


if __name__ == "__main__":
    main()
