"""The sides: who opens the checkpoint, and how each runs the parts that are measured.

This file is read in every peer's environment, so that a side imports what it runs on itself, and no more.
Every peer is given what serves it best of what its documentation offers: fixed shapes, threads, float32.
"""

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.peers.task import ASKED, Task


@dataclass(frozen=True)
class Measured:
    """Seconds, what was computed, and of a picture also the median seconds between two of its steps."""

    seconds: float
    output: Any
    step_seconds: float | None = None


def clocked(work: Callable[[], Any]) -> Measured:
    start = time.perf_counter()
    output = work()
    return Measured(time.perf_counter() - start, output)


def between(ends: Sequence[float]) -> float | None:
    """The median seconds between two of the moments at which steps ended, or None of less than two."""
    return median(later - sooner for sooner, later in pairwise(ends)) if len(ends) > 1 else None


class Side(ABC):
    """packages: whose versions a result tells. modules: what is imported before opening is timed.
    measures: what of `ASKED` it can measure: a method of that name each."""

    packages: tuple[str, ...]
    modules: tuple[str, ...]
    measures: tuple[str, ...] = ASKED

    @classmethod
    def left_out(cls, task: Task) -> str | None:
        """Why it cannot run this checkpoint, whatever is installed; None if it can."""
        return None

    def imports(self) -> None:
        for name in self.modules:
            import_module(name)

    @abstractmethod
    def prepare(self, task: Task) -> None:
        """Make of the checkpoint what the side runs."""

    def open(self, task: Task) -> None:
        self.task = task
        self.inputs = load_file(task.inputs)
        self.pipe = self.load(task)

    @abstractmethod
    def load(self, task: Task) -> Any:
        """The pipeline, ready to be called."""

    def facts(self) -> dict[str, Any]:
        """What a result tells of the side."""
        return {"versions": {name: version(name) for name in self.packages}}

    @abstractmethod
    def picture(self) -> Measured:
        """Prompt to picture [1, H, W, 3] in [0, 1]."""

    def export_folder(self, task: Task, name: str, make: Callable[[Path], object]) -> Path:
        """A folder that `make` writes, whole or not at all; kept if it is there."""
        folder = Path(task.exports) / name
        if not folder.exists():
            part = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            part.rename(folder)
        return folder


class InParts(Side):
    """A pipeline that is called as diffusers' are, and whose networks can be run alone."""

    def open(self, task: Task) -> None:
        super().open(task)
        self.pipe.scheduler = scheduler_of(task)
        self.pipe.set_progress_bar_config(disable=True)

    @abstractmethod
    def text(self) -> Measured:
        """The text encoder's last hidden states [1, 77, D] of the prompt."""

    @abstractmethod
    def unet(self) -> Measured:
        """The U-Net's output [2, C, h, w] of two rows."""

    @abstractmethod
    def vae(self) -> Measured:
        """The picture [1, 3, H, W] in [0, 1] of one row of latents."""

    def picture(self) -> Measured:
        ends: list[float] = []

        def at_step_end(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ends.append(time.perf_counter())
            return {}

        call = {**self.task.call(), "latents": self.inputs["latents"].clone()}
        found = clocked(lambda: self.pipe(**call, callback_on_step_end=at_step_end).images)
        return Measured(found.seconds, found.output, between(ends))


class DiffusersLike(InParts):
    """A pipeline with diffusers' parts, called as its pipelines call them."""

    def text(self) -> Measured:
        ids = self.inputs["ids"]
        found = clocked(lambda: self.pipe.text_encoder(ids))
        return Measured(found.seconds, found.output[0])

    def unet(self) -> Measured:
        sample, hidden = self.inputs["sample"].clone(), self.inputs["hidden"]  # optimum writes into its input
        step = torch.tensor(self.task.timestep)
        told = {"encoder_hidden_states": hidden, "return_dict": False}
        found = clocked(lambda: self.pipe.unet(sample, step, **told))
        return Measured(found.seconds, found.output[0].clone())

    def vae(self) -> Measured:
        latents = self.inputs["sample"][:1] / self.pipe.vae.config.scaling_factor
        found = clocked(lambda: self.pipe.vae.decode(latents, return_dict=False))
        return Measured(found.seconds, (found.output[0] / 2 + 0.5).clamp(0, 1))


class Stock(DiffusersLike):
    """diffusers as it comes, eager, in float32."""

    packages = ("torch", "diffusers", "transformers")
    modules = ("diffusers", "transformers")

    def prepare(self, task: Task) -> None:
        """Nothing: it runs the checkpoint."""

    def load(self, task: Task) -> Any:
        import diffusers

        return diffusers.StableDiffusionPipeline.from_pretrained(task.checkpoint, torch_dtype=torch.float32)


class StockChannelsLast(Stock):
    """The same with its U-Net and its VAE laid out channels last."""

    def load(self, task: Task) -> Any:
        pipe = super().load(task)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        return pipe


class Sdfast(InParts):
    """An `onnx` engine of this very size, for up to two rows."""

    packages = ("sdfast", "torch", "onnxruntime")
    modules = ("sdfast.pipeline", "sdfast.backends.onnx", "onnx", "onnxruntime", "diffusers")

    def prepare(self, task: Task) -> None:
        from sdfast.export.build import export
        from sdfast.export.recipe import Recipe

        recipe = Recipe.make(sizes=(f"{task.width}x{task.height}",), batch=1)
        export(task.checkpoint, self._folder(task), recipe)

    def load(self, task: Task) -> Any:
        from sdfast.engine import Engine
        from sdfast.pipeline import Pipeline

        self.engine = Engine.open(self._folder(task), load=True)
        return Pipeline(self.engine)

    def _folder(self, task: Task) -> Path:
        return Path(task.exports) / f"sdfast-{task.width}x{task.height}"

    def text(self) -> Measured:
        ids = {"input_ids": self.inputs["ids"]}
        found = self._clocked(lambda: self.engine.call("text_encoder", ids))
        return Measured(found.seconds, found.output["hidden_states"][:, -1])

    def unet(self) -> Measured:
        """What is bound once for a picture, as the loop has it, is not measured."""
        run, output = self._bound
        found = self._clocked(run)
        return Measured(found.seconds, output.clone())

    @cached_property
    def _bound(self) -> tuple[Callable[[], None], torch.Tensor]:
        sample, engine = self.inputs["sample"], self.engine
        times = {"timesteps": torch.full((2,), float(self.task.timestep))}
        given = {
            "sample": sample,
            "time_shift": engine.call("time_shift", times)["time_shift"],
            "context": engine.call("context", {"hidden_states": self.inputs["hidden"]})["context"],
        }
        output = torch.empty_like(sample)
        return engine.bind("unet", given, {"output": output}, self.task.height, self.task.width), output

    def vae(self) -> Measured:
        given, size = {"latents": self.inputs["sample"][:1]}, (self.task.height, self.task.width)
        found = self._clocked(lambda: self.engine.call("vae_decoder", given, *size))
        return Measured(found.seconds, found.output["image"])

    def picture(self) -> Measured:
        from sdfast.prompts import Prompts

        self.pipe.prompts = Prompts(self.engine)  # it remembers prompts, and peers do not
        return super().picture()

    def _clocked(self, work: Callable[[], Any]) -> Measured:
        with self.engine.running():
            return clocked(work)


class OptimumOnnx(DiffusersLike):
    """optimum-onnx: its own export and its `ORTStableDiffusionPipeline`, on ONNX Runtime's CPU provider.

    Its sessions get the number of threads, and are told to stop spinning when a call ends, as sdfast's are:
    what spins on would take the processor from its own next session, and from the other sides.
    """

    packages = ("torch", "optimum", "optimum-onnx", "onnxruntime", "diffusers", "transformers")
    modules = ("optimum.onnxruntime", "diffusers", "transformers")

    def prepare(self, task: Task) -> None:
        def make(folder: Path) -> None:
            from optimum.onnxruntime import ORTStableDiffusionPipeline

            ORTStableDiffusionPipeline.from_pretrained(task.checkpoint, export=True).save_pretrained(folder)

        self.export_folder(task, "optimum-onnx", make)

    def load(self, task: Task) -> Any:
        import onnxruntime
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = task.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        folder = Path(task.exports) / "optimum-onnx"
        return ORTStableDiffusionPipeline.from_pretrained(folder, export=False, session_options=options)


class OpenVino(DiffusersLike):
    """optimum-intel's `OVStableDiffusionPipeline` on OpenVINO's CPU plugin, reshaped to the size, in float32.

    Without the hint the plugin computes in bfloat16 on processors that have it, which is another picture.
    """

    packages = ("torch", "optimum", "optimum-intel", "openvino", "diffusers", "transformers")
    modules = ("optimum.intel", "openvino", "diffusers", "transformers")

    def prepare(self, task: Task) -> None:
        def make(folder: Path) -> None:
            from optimum.intel import OVStableDiffusionPipeline

            options = {"export": True, "compile": False, "load_in_8bit": False}
            OVStableDiffusionPipeline.from_pretrained(task.checkpoint, **options).save_pretrained(folder)

        self.export_folder(task, "openvino", make)

    def load(self, task: Task) -> Any:
        from optimum.intel import OVStableDiffusionPipeline

        config = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(task.threads),
        }
        folder = Path(task.exports) / "openvino"
        pipe = OVStableDiffusionPipeline.from_pretrained(folder, compile=False, ov_config=config)
        pipe.reshape(batch_size=1, height=task.height, width=task.width, num_images_per_prompt=1)
        pipe.compile()
        return pipe

    def facts(self) -> dict[str, Any]:
        import openvino

        own = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
        used = self.pipe.unet.request.get_property("INFERENCE_PRECISION_HINT")
        precision = {"used": used.get_type_name(), "without_the_hint": own.get_type_name()}
        return {**super().facts(), "precision": precision}


class StableDiffusionCpp(Side):
    """stable-diffusion.cpp, by its Python bindings: networks in C++ on ggml, compiled for this processor.

    It reads the diffusers folder itself. Its call takes a prompt and gives a picture, so that no network is
    measured alone. Weights are in float32 but for those of convolutions, which it holds and computes in
    float16 whatever it is told. Its options for the CPU are off, which is fastest: on a core of an Ice Lake
    a guided step of SD 1.5 at 256x256 takes twice as long with `diffusion_flash_attn`, and as long with
    `diffusion_conv_direct`; `vae_conv_direct` makes the decoder slower by a fifth or more.

    Its generator `cpu` is like torch's, so that it begins with the task's latents. Its picture cannot be as
    near to stock's as the others' are, as the result notes.
    """

    packages = ("stable-diffusion-cpp-python", "torch")
    modules = ("stable_diffusion_cpp",)
    measures = ("picture",)
    NOTE = (
        "its picture has 8 bits, which alone is a PSNR of 58.9 dB; its sampler multiplies the first latents "
        "by sigma, not by sqrt(sigma^2 + 1), and evaluates the U-Net at fractions of timesteps"
    )

    @classmethod
    def left_out(cls, task: Task) -> str | None:
        """Its networks are those of published checkpoints, whatever a folder's configs say."""
        own = {"unet": [320, 640, 1280, 1280], "vae": [128, 256, 512, 512]}
        for component, widths in own.items():
            found = config_of(task, component)["block_out_channels"]
            if found != widths:
                return f"its {component} is written for blocks of {widths} channels; this has {found}"
        return None

    def prepare(self, task: Task) -> None:
        """Nothing: it reads the checkpoint."""

    def load(self, task: Task) -> Any:
        from stable_diffusion_cpp import StableDiffusion

        return StableDiffusion(
            model_path=task.checkpoint,
            prediction=PREDICTIONS[config_of(task, "scheduler")["prediction_type"]],
            vae_decode_only=True,
            n_threads=task.threads,
            wtype="f32",
            rng_type="cpu",
            sampler_rng_type="cpu",
        )

    def facts(self) -> dict[str, Any]:
        import stable_diffusion_cpp

        return {
            **super().facts(),
            "precision": {"used": "float32, convolutions float16"},
            "built_for": " ".join(stable_diffusion_cpp.sd_get_system_info().decode().split()),
            "note": self.NOTE,
        }

    def picture(self) -> Measured:
        ends: list[float] = []

        def at_progress(step: int, _steps: int, _seconds: float) -> None:
            if step > 0:  # before the first step it tells 0
                ends.append(time.perf_counter())

        task = self.task
        call = {
            "prompt": task.prompt,
            "width": task.width,
            "height": task.height,
            "cfg_scale": task.guidance,
            "sample_method": "dpm++2m",
            "scheduler": "karras",
            "sample_steps": task.steps,
            "seed": task.seed,
        }
        found = clocked(lambda: self.pipe.generate_image(**call, progress_callback=at_progress)[0])
        rgb = np.asarray(found.output.convert("RGB"), dtype=np.float32)
        return Measured(found.seconds, rgb[None] / 255, between(ends))


PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
"""diffusers' names of what a U-Net predicts, and stable-diffusion.cpp's."""


def config_of(task: Task, component: str) -> dict[str, Any]:
    """The JSON config of a component of the checkpoint."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = Path(task.checkpoint) / component / name
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def scheduler_of(task: Task) -> Any:
    """DPM++ 2M Karras of the checkpoint's own config."""
    import diffusers

    config = diffusers.DPMSolverMultistepScheduler.load_config(task.checkpoint, subfolder="scheduler")
    return diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)


SIDES: Mapping[str, type[Side]] = {
    "sdfast": Sdfast,
    "diffusers": Stock,
    "diffusers-channels-last": StockChannelsLast,
    "optimum-onnx": OptimumOnnx,
    "openvino": OpenVino,
    "stable-diffusion.cpp": StableDiffusionCpp,
}
