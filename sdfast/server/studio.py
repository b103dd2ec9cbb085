"""Engines as a `Studio`: for each a worker process, and its supervisor here.

Nothing of this imports torch: the server starts at once, and stays small beside its workers.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from sdfast.errors import EngineError, RequestError
from sdfast.experts import check_alike
from sdfast.infotext import unet_digest
from sdfast.manifest import AddedControlNet, AddedIPAdapter, Manifest, read_manifest
from sdfast.request import Request
from sdfast.server.in_turn import in_turn, parts_of
from sdfast.server.jobs import EngineInfo, Event, Job, Statistics
from sdfast.server.settings import Settings
from sdfast.server.worker.supervisor import Patience, Supervisor, command


@dataclass(frozen=True)
class Post:
    """An engine, and who keeps it at work."""

    manifest: Manifest
    supervisor: Supervisor


class WorkerStudio:
    """Engines in worker processes, which are at work from `run` to `close`."""

    def __init__(self, posts: Sequence[Post]) -> None:
        self._posts = {post.manifest.name: post for post in posts}
        self._engines = {name: info_of(post.manifest) for name, post in self._posts.items()}
        self._runs: list[asyncio.Task[None]] = []

    @classmethod
    def of(cls, folders: Sequence[Path], settings: Settings, device: str | None = None) -> "WorkerStudio":
        """The engines in some directories. Reads their manifests; raises `EngineError` for what is no engine,
        and for two of one name."""
        found: dict[str, Path] = {}
        posts = []
        for folder in folders:
            manifest = read_manifest(folder)
            if manifest.name in found:
                raise EngineError(
                    f"{folder}: {found[manifest.name]} has the name {manifest.name!r} too; rename one of them"
                )
            found[manifest.name] = folder
            start = command(
                folder,
                device,
                max_rows=settings.max_rows,
                max_queue=settings.queue,
                previews=settings.previews,
            )
            patience = Patience(step_timeout=settings.step_timeout)
            supervisor = Supervisor(manifest.name, start, max_queue=settings.queue, patience=patience)
            posts.append(Post(manifest, supervisor))
        return cls(posts)

    async def run(self) -> None:
        """Have every engine at work. Raises why one of them cannot be; the others go on."""
        self._runs = [asyncio.create_task(post.supervisor.run()) for post in self._posts.values()]
        await asyncio.gather(*self._runs)

    async def close(self) -> None:
        """End the workers, with whatever still runs there."""
        for run in self._runs:
            run.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)

    @property
    def engines(self) -> Mapping[str, EngineInfo]:
        return self._engines

    @property
    def ready(self) -> bool:
        return all(post.supervisor.ready for post in self._posts.values())

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """As `Studio.submit`. That its scheduler cannot do the run, the worker tells in the first event."""
        post = self._post(job.engine, job.request)
        if job.refiner is None:
            return post.supervisor.submit(job)
        second, model = self._post(job.refiner.engine, job.request), post.manifest.model
        check_alike(model, second.manifest.model)
        begun, finished = parts_of(job, self._engines[job.engine], second.manifest.model)
        return in_turn(post.supervisor.submit(begun), finished, second.supervisor)

    def check_size(self, engine: str, request: Request) -> None:
        self._post(engine, request)

    def _post(self, engine: str, request: Request) -> Post:
        """Raises `RequestError` for an engine that is not here, or of other sizes."""
        post = self._posts.get(engine)
        if post is None:
            raise RequestError(f"engine {engine!r} is not here; there are: {', '.join(self._posts)}")
        for one in request.passes:
            post.manifest.check_size(one.height, one.width)
        return post

    def cancel(self, job_id: str) -> bool:
        return any(post.supervisor.cancel(job_id) for post in self._posts.values())

    def preview(self, job_id: str) -> bool:
        return any(post.supervisor.preview(job_id) for post in self._posts.values())

    def waiting(self) -> int:
        return sum(numbers.waiting for numbers in self.statistics().values())

    def running(self) -> int:
        return sum(numbers.load.rows for numbers in self.statistics().values())

    def statistics(self) -> Mapping[str, Statistics]:
        return {name: post.supervisor.statistics() for name, post in self._posts.items()}


def info_of(manifest: Manifest) -> EngineInfo:
    vae = manifest.checkpoint.vae
    weights = sorted({**manifest.checkpoint.weights, **(vae.weights if vae else {})}.items())
    digest = hashlib.sha256(repr(weights).encode()).hexdigest()
    forms = manifest.modules["unet"].variants
    return EngineInfo(
        name=manifest.name,
        family=manifest.model.family,
        default_height=manifest.model.default_height,
        default_width=manifest.model.default_width,
        sizes=tuple(dict.fromkeys(f"{form.width}x{form.height}" for form in forms)),
        max_images=manifest.max_images,
        checkpoint=manifest.checkpoint.source,
        checkpoint_digest=digest,
        unet_digest=unet_digest(manifest.checkpoint.weights) or digest,
        vae=(vae.name, vae.digest) if vae else None,
        edits=manifest.edits,
        controlnets=tuple(map(controlnet_name, manifest.checkpoint.controlnets)),
        loras=manifest.model.loras,
        ip_adapters=tuple(map(ip_adapter_name, manifest.checkpoint.ip_adapters)),
        image_processor=manifest.model.image_processor,
        embeddings={one.token: one.vectors for one in manifest.checkpoint.embeddings},
        text_width=manifest.model.text_width,
        step_cache=manifest.model.step_cache is not None,
        pag=bool(manifest.model.pag),
        refines=manifest.model.scored,
        instructed=manifest.model.instructed,
    )


def controlnet_name(controlnet: AddedControlNet) -> str:
    """As sd-webui-controlnet lists ControlNets: the file's or folder's name, and how its digest begins."""
    digest, source = min(controlnet.weights.items())[1], PurePath(controlnet.source)
    return f"{source.stem if source.suffix == '.safetensors' else source.name} [{digest[:8]}]"


def ip_adapter_name(adapter: AddedIPAdapter) -> str:
    """As it lists IP-Adapters."""
    return f"{PurePath(adapter.file or adapter.source).stem} [{adapter.digest[:8]}]"
