"""Makes the built-in checkpoint from nothing: `python -m sdfast.landscapes.train --work FOLDER`.

Stages: pictures, tokenizer, text encoder, autoencoder, latents, denoiser, checkpoint, judge, figures. A stage
whose result lies in the work folder is not done again. Training needs the `export` extra.
"""

import argparse
import json
import shutil
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdfast.landscapes import autoencoder, checkpoint_folder, denoiser, judge, tokenizer
from sdfast.landscapes.autoencoder import Budget
from sdfast.landscapes.captions import caption
from sdfast.landscapes.encoder import fit_transform
from sdfast.landscapes.evaluate import evaluate
from sdfast.landscapes.pictures import draw_training_set, read_labels, read_pictures, scene_of
from sdfast.landscapes.text import CAPTIONS, train_text_encoder

PICTURES = 24000


class Workshop:
    """The work folder, and the stages that fill it."""

    def __init__(self, work: Path, decoder_seconds: float, unet_seconds: float) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.decoder_budget = Budget(autoencoder.STEPS, decoder_seconds)
        self.unet_budget = Budget(denoiser.STEPS, unet_seconds)

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
                autoencoder.train_autoencoder(self.pictures(), folder, log, self.decoder_budget)
        return AutoencoderKL.from_pretrained(folder).eval()

    def latents(self) -> Tensor:
        """The latents of the training pictures, [24000, 12, 16, 16], of unit deviation."""
        path = self.work / "latents.pt"
        if not path.exists():
            pictures = self.pictures()
            transform = fit_transform(pictures[: autoencoder.FITTED])
            groups = [pictures[i : i + 500] for i in range(0, len(pictures), 500)]
            torch.save(torch.cat([transform.latents(group) for group in groups]), path)
        latents: Tensor = torch.load(path, weights_only=True)
        return latents

    def denoiser(self) -> UNet2DConditionModel:
        """The U-Net."""
        folder = self.work / "unet"
        if not folder.exists():
            words = tokenizer.Tokenizer(self.tokenizer())
            examples = denoiser.Examples(self.latents(), self.text_encoder(), words, seed=3)
            with (self.work / "unet.log").open("w") as log:
                denoiser.train_denoiser(examples, folder, log, self.unet_budget)
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
    for config in folder.glob(
        "*/config.json"
    ):  # diffusers notes where it loaded a part from; nobody needs it
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n")
    for file in words.iterdir():  # transformers 5 writes tokenizer.json only; older readers want these
        shutil.copyfile(file, folder / "tokenizer" / file.name)


def make(workshop: Workshop, folder: Path) -> dict[str, Any]:
    """All stages; returns the measured figures and writes them to `figures.json` in the work folder."""
    workshop.checkpoint(folder)
    figures = evaluate(folder, workshop.judge())
    (workshop.work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sdfast.landscapes.train", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, logs and parts (4 GB)")
    parser.add_argument(
        "--checkpoint", type=Path, help="where the checkpoint goes (default: into the package)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads for training")
    parser.add_argument("--decoder-minutes", type=float, default=inf, help="stop training the decoder then")
    parser.add_argument("--unet-minutes", type=float, default=inf, help="stop training the U-Net then")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workshop = Workshop(options.work, 60 * options.decoder_minutes, 60 * options.unet_minutes)
    print(json.dumps(make(workshop, options.checkpoint or checkpoint_folder()), indent=2))


if __name__ == "__main__":
    main()
