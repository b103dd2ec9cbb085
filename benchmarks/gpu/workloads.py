"""What is measured: the architecture, the picture's size, the steps and the batches."""

from dataclasses import dataclass, replace

from sdfast.export.recipe import sides as sides_of

PROMPT, GUIDANCE, SEED = "a cabin in misty mountains, watercolor style", 7.0, 0
SCHEDULER = "DPM++ 2M Karras"


@dataclass(frozen=True)
class Draw:
    """One call of a pipeline: so many pictures of one prompt in so many steps.

    guided: with guidance, so two rows of the U-Net a picture; without for few steps, as turbo and LCM
    checkpoints are run.
    """

    steps: int
    batch: int
    guided: bool

    @property
    def rows(self) -> int:
        return self.batch * (2 if self.guided else 1)

    @property
    def guidance(self) -> float:
        return GUIDANCE if self.guided else 0.0

    def __str__(self) -> str:
        return f"{self.steps} step{'s' * (self.steps > 1)}{'' if self.guided else ', no guidance'}"


@dataclass(frozen=True)
class Workload:
    """A benchmark: the real one of a name, or its dry run.

    guided, unguided: steps of whole pictures, the first the one that most matters. step_runs: a step is the
    difference between runs of so many, by the steps that they are apart. rounds: of a comparison, at most;
    limit: the seconds that they may take, from the third on. gemm: side of the square matrices, copy_bytes:
    of the tensor that is copied, for the roofline. weight: how much longer its parts may take than those of
    SD 1.5 at 512x512, before any was measured.
    """

    name: str
    architecture: str
    size: str
    guided: tuple[int, ...]
    unguided: tuple[int, ...] = (1, 4)
    batches: tuple[int, ...] = (1, 4, 8)
    step_runs: tuple[int, int] = (4, 24)
    rounds: int = 9
    limit: float = 40.0
    gemm: int = 8192
    copy_bytes: int = 4 * 2**30
    weight: float = 1.0

    @property
    def height(self) -> int:
        return sides_of(self.size)[0]

    @property
    def width(self) -> int:
        return sides_of(self.size)[1]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2") if self.name == "sdxl" else ("text_encoder",)

    @property
    def first_picture(self) -> int:
        """Steps of the picture that a fresh process draws."""
        return self.guided[0]

    def pictures(self, batch: int) -> list[Draw]:
        guided = [Draw(steps, batch, True) for steps in self.guided]
        return guided + [Draw(steps, batch, False) for steps in self.unguided]


WORKLOADS = {
    "sd15": Workload("sd15", "sd15", "512x512", guided=(20, 50)),
    "sdxl": Workload("sdxl", "sdxl", "1024x1024", guided=(30,), weight=2.0),
}


def workload(name: str, architecture: str | None = None) -> Workload:
    """The workload "sd15" or "sdxl"; of architecture "tiny" its dry run, which a CPU can do in a minute."""
    real = WORKLOADS[name]
    if architecture != "tiny":
        return real
    small = "tiny-xl" if name == "sdxl" else "tiny"
    return replace(
        real,
        architecture=small,
        size="32x32",
        guided=(3, 5)[: len(real.guided)],
        batches=(1, 2),
        step_runs=(2, 6),
        rounds=2,
        limit=3.0,
        gemm=256,
        copy_bytes=2**24,
        weight=0.05,
    )
