"""What the API side and the engine side of the server tell each other.

The API makes a `Job` of a request and hands it to a `Studio`; the studio answers with events, of which the
last is `Done` or `Failed`. Nothing else crosses between the two, so that they may live in two processes.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sdfast.manifest import ImageProcessor
from sdfast.request import Request


@dataclass(frozen=True)
class Refiner:
    """Another engine that goes on with a job's pictures from a share of the denoising on."""

    engine: str
    switch_at: float


@dataclass(frozen=True)
class Origin:
    """Who began the pictures that a job finishes. strength: of the image that they were drawn over."""

    engine: str
    unet_digest: str
    switch_at: float
    strength: float | None


@dataclass(frozen=True)
class Job:
    """One generation request that was checked.

    id: unique among those under way. engine: the name of the engine that runs it. deadline: seconds by
    `time.monotonic()`, after which a job that still waits is not begun. previews: how many pictures of the
    current estimate are wanted on the way, evenly spread over the steps of the first image; `Studio.preview`
    asks for others.
    image: what is drawn over, as `request.strength` says: bytes of RGB pixels [height, width, 3] uint8, of
    the request's size. mask: what of it is drawn anew: bytes [height, width] uint8, 255 there, 0 where the
    image stays; with an image only. control: the control images of an engine with ControlNets, each as
    `image`, one after the other; beside the others or alone. ip_adapter: the images of an engine with
    IP-Adapters, made ready for its image encoder: bytes [S, S, 3] uint8 of each, one after the other. Of
    files, and of what is inside them, the engine side knows nothing.

    refiner: who goes on with its pictures; the studio makes a job of each engine's part. The first one's
    hands_over, so that it ends with what the second's is handed (see `handover`) in place of PNGs; origin:
    of the second, what the first was, which the pictures' parameters tell.
    """

    id: str
    engine: str
    request: Request
    deadline: float | None = None
    previews: int = 0
    image: bytes | None = None
    mask: bytes | None = None
    control: bytes | None = None
    ip_adapter: bytes | None = None
    handed: bytes | None = None
    refiner: Refiner | None = None
    hands_over: bool = False
    origin: Origin | None = None

    @property
    def over(self) -> bool:
        """Whether it is drawn over something."""
        return self.image is not None or self.handed is not None


@dataclass(frozen=True)
class Queued:
    """The job waits. position: how many jobs come before it."""

    position: int


@dataclass(frozen=True)
class Begun:
    """The job waits no more: its prompts are being encoded."""


@dataclass(frozen=True)
class Step:
    """Network evaluations done of all that the job needs, summed over its images."""

    done: int
    total: int


@dataclass(frozen=True)
class Preview:
    """A picture of the estimate of the clean latents: PNG bytes, of the first image that is still drawn.

    index counts the job's previews from 0.
    """

    index: int
    png: bytes


@dataclass(frozen=True)
class Done:
    """The pictures, in the request's order, each a PNG with its parameters inside.

    truncated: the text that was cut from each prompt, "" for none. seconds: by stage: "waiting", "encoding",
    "denoising", "decoding". tokens: how many were read of all prompts, negative ones among them.
    """

    pngs: tuple[bytes, ...]
    seeds: tuple[int, ...]
    truncated: tuple[str, ...]
    seconds: Mapping[str, float]
    tokens: int = 0


FailureKind = Literal["request", "numerical", "memory", "timeout", "cancelled", "engine"]


@dataclass(frozen=True)
class Failed:
    """The job ends without pictures.

    kind: "request" (it asks for what this engine cannot), "numerical" (what came out is no number), "memory"
    (the device has too little), "timeout" (its deadline passed while it waited), "cancelled", or "engine"
    (the engine failed: whatever else was under way failed with it).
    """

    kind: FailureKind
    message: str


Event = Queued | Begun | Step | Preview | Done | Failed


class QueueFull(Exception):
    """There is no place for another job. retry_after: seconds after which there may be one."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineInfo:
    """What the API must know of an engine. sizes: "WIDTHxHEIGHT" or ranges, for people and messages.

    checkpoint_digest: hex SHA-256 over the digests of its weights. unet_digest: hex SHA-256 of its U-Net's,
    by which a picture's parameters name the model. vae: name and hex SHA-256 of the VAE that is in the place
    of the checkpoint's own. edits: whether it takes a job's image. embeddings: by
    their tokens, of how many vectors they are; text_width: of one, for all text encoders together.
    controlnets: names of its ControlNets, in their order, by which AUTOMATIC1111's clients know them. loras:
    names of the LoRAs that requests choose. ip_adapters: those of its IP-Adapters, as of ControlNets;
    image_processor: how images are made ready for them.
    step_cache: whether it takes a `cache_interval`. pag: whether it takes a `pag_scale`. refines: whether it
    is SDXL's refiner, whose jobs all have an image. instructed: whether its jobs all have one to edit, and
    `image_guidance_scale`.
    """

    name: str
    family: str
    default_height: int
    default_width: int
    sizes: tuple[str, ...]
    max_images: int
    checkpoint: str
    checkpoint_digest: str
    edits: bool = False
    unet_digest: str = ""
    vae: tuple[str, str] | None = None
    embeddings: Mapping[str, int] = field(default_factory=dict)
    text_width: int = 0
    controlnets: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    image_processor: ImageProcessor | None = None
    step_cache: bool = False
    pag: bool = False
    refines: bool = False
    instructed: bool = False

    @property
    def controlled(self) -> bool:
        """Whether every job needs control images; without a ControlNet none takes one."""
        return bool(self.controlnets)


TICK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""The bounds by which ticks are counted."""


@dataclass(frozen=True)
class Load:
    """What an engine has to do, and what it has done since its process began.

    rows: that are being denoised. waiting_steps, running_steps: network evaluations that pictures without
    and with a row still need. ticks: how many took up to each of `TICK_SECONDS`, and how many longer;
    tick_seconds: all of them together. memory: bytes by kind: "allocated" and "reserved" of a CUDA device,
    or "resident" of the process.
    """

    rows: int = 0
    waiting_steps: int = 0
    running_steps: int = 0
    ticks: tuple[int, ...] = (0,) * (len(TICK_SECONDS) + 1)
    tick_seconds: float = 0.0
    memory: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistics:
    """An engine's numbers. up: whether it is at work. restarts: of its process. waiting: jobs."""

    up: bool
    restarts: int
    waiting: int
    load: Load


class Studio(Protocol):
    """Where jobs are run. All methods are called from the API's event loop."""

    @property
    def engines(self) -> Mapping[str, EngineInfo]: ...

    @property
    def ready(self) -> bool:
        """Whether every engine is loaded, warmed up and at work."""
        ...

    def check_size(self, engine: str, request: Request) -> None:
        """Raises `RequestError` for an engine that is not here, and for a size that it does not have: before
        anybody makes images ready for it."""
        ...

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Take the job in. Closing the iterator before its end cancels the job. The first event does not wait
        for other jobs: it tells the place in the queue, or why the engine cannot do this one.

        Raises `QueueFull`, at once; `RequestError` for what no engine here can do (an unknown engine, a size
        that it does not have), at once.
        """
        ...

    def cancel(self, job_id: str) -> bool:
        """End a job that waits or runs, at the next step at the latest; False when there is none."""
        ...

    def preview(self, job_id: str) -> bool:
        """Ask for a `Preview` after a job's next step; False when the job is not there. To ask twice before
        it came is to ask once."""
        ...

    def waiting(self) -> int:
        """How many jobs are queued."""
        ...

    def running(self) -> int:
        """How many rows are being denoised."""
        ...

    def statistics(self) -> Mapping[str, Statistics]:
        """The numbers of every engine, by its name."""
        ...
