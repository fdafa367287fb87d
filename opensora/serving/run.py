"""The server of a checked config: what it is made of, and its life."""

import socket
from collections.abc import Mapping

from opensora.acceleration.devices import pick_device
from opensora.config import naming_places
from opensora.config.commands import ServeOptions
from opensora.serving.desk import Desk, check_served
from opensora.serving.folders import Folders
from opensora.serving.jobs import JobStore
from opensora.serving.service import Service
from opensora.serving.supervisor import Supervisor
from opensora.utils.errors import UserError
from opensora.utils.logging import get_logger

logger = get_logger(__name__)

SECONDS_TO_END = 3  # for answers that are under way when the server ends


def make_service(cfg: ServeOptions, environment: Mapping[str, str], works: bool = True) -> Service:
    """Check all that can be wrong of a config, and make what serves it.

    Args:
        cfg: resolved config.
        environment: where the key of a language model may stand.
        works: look after a worker.

    Raises:
        UserError: says what is wrong.
    """
    check_served(cfg)
    desk = Desk(cfg, pick_device(cfg.device), environment)
    with naming_places(cfg):
        desk.run.check_resources()
    folders = Folders(cfg.data_dir)
    store = JobStore(folders.database)
    supervisor = Supervisor(cfg, folders, store) if works else None
    return Service(cfg, desk, store, folders, supervisor)


def serve(cfg: ServeOptions, listening: socket.socket, environment: Mapping[str, str]) -> None:
    """Serve on a socket until the process is stopped.

    Raises:
        UserError: something is wrong with the config, or the worker never comes up.
    """
    import uvicorn

    from opensora.serving.http import create_app
    from opensora.serving.patience import PatientFor

    service = make_service(cfg, environment)
    app = create_app(service)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("http://%s:%d serves %s; Ctrl-C ends it", shown, port, service.desk.model_name)
    config = uvicorn.Config(
        app,
        http=PatientFor,
        log_level="warning",
        timeout_graceful_shutdown=SECONDS_TO_END,
        server_header=False,
        proxy_headers=False,
    )
    server, supervisor = uvicorn.Server(config), service.supervisor
    assert supervisor is not None
    supervisor.at_giving_up = lambda: setattr(server, "should_exit", True)
    with service.running():
        server.run(sockets=[listening])
    if supervisor.given_up:
        raise UserError(supervisor.given_up)
