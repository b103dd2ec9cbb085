"""A job that two engines share, such as SDXL's base and its refiner: the one's part, then the other's.

To whoever asked it is one job, with one end and one bar over both parts.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from sdfast.errors import BackendError, RequestError
from sdfast.experts import halves
from sdfast.manifest import Model
from sdfast.server.jobs import Done, EngineInfo, Event, Failed, Job, Origin, Preview, QueueFull, Step
from sdfast.server.worker.supervisor import Supervisor

PAUSE = 0.2  # seconds, before a full queue is asked again


def parts_of(job: Job, base: EngineInfo, refiner: Model) -> tuple[Job, Job]:
    """The base's part and the refiner's; what that is handed comes later. Raises `RequestError`."""
    if job.refiner is None:
        raise ValueError("one engine draws this job")
    switch_at, request = job.refiner.switch_at, job.request
    begun, finished = halves(request, switch_at, refiner)
    origin = Origin(base.name, base.unet_digest, switch_at, request.strength)
    second = replace(
        job,
        engine=job.refiner.engine,
        request=finished,
        previews=0,
        image=None,
        control=None,
        ip_adapter=None,
    )
    return (
        replace(job, request=begun, refiner=None, hands_over=True),
        replace(second, refiner=None, origin=origin),
    )


async def in_turn(
    events: AsyncIterator[Event], finished: Job, refiner: Supervisor
) -> AsyncGenerator[Event, None]:
    """The events of both parts. events: the base's; it was taken in."""
    origin, left, steps, previews = finished.origin, None, 0, 0
    async for event in events:
        if isinstance(event, Done):
            left = event
        elif isinstance(event, Step) and origin is not None:  # how many follow, the refiner will say
            steps = event.total
            yield Step(event.done, max(event.total + 1, round(event.total / origin.switch_at)))
        else:
            previews += isinstance(event, Preview)
            yield event
    if left is None:
        return
    taken = await _taken_in(replace(finished, handed=b"".join(left.pngs)), refiner)
    if isinstance(taken, Failed):
        yield taken
        return
    async for event in taken:
        if isinstance(event, Step):
            yield Step(steps + event.done, steps + event.total)
        elif isinstance(event, Preview):
            yield replace(event, index=previews + event.index)
        elif isinstance(event, Done):
            seconds = {stage: event.seconds[stage] + left.seconds.get(stage, 0.0) for stage in event.seconds}
            yield replace(event, truncated=left.truncated, seconds=seconds, tokens=left.tokens + event.tokens)
        elif isinstance(event, Failed):
            yield event


async def _taken_in(job: Job, refiner: Supervisor) -> AsyncIterator[Event] | Failed:
    """The refiner's events, once it has a place; or why it has none."""
    while True:
        try:
            return refiner.submit(job)
        except QueueFull:
            if job.deadline is not None and time.monotonic() > job.deadline:
                return Failed("timeout", "the job waited for its refiner until its deadline")
            await asyncio.sleep(PAUSE)
        except BackendError as error:
            return Failed("engine", str(error))
        except RequestError as error:
            return Failed("request", str(error))
