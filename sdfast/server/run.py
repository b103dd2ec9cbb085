"""Running the app on a socket until a signal ends it."""

from typing import TYPE_CHECKING

from sdfast.server.app import create_app
from sdfast.server.jobs import Studio
from sdfast.server.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Lifespan


def serve(studio: Studio, settings: Settings, lifespan: "Lifespan[FastAPI] | None" = None) -> bool:
    """Serve until SIGTERM or SIGINT; whether all work that was under way was finished.

    After the signal `/health/ready` says 503 and nothing new is begun. A second signal, or the end of
    `settings.drain` seconds, ends what still runs. lifespan: as `create_app` takes it. Raises `SettingsError`
    when the address cannot be listened on.
    """
    app = create_app(studio, settings, lifespan)
    from sdfast.server import logs
    from sdfast.server.listening import Server, configuration, listen

    logs.set_up()
    server = Server(configuration(app, settings), app, settings.drain)
    with listen(settings) as socket:
        server.run(sockets=[socket])
    return not server.cut_short
