"""The server and the good inputs, once per worker."""

import pytest

from tests.attack.inputs import run_commands, write_inputs
from tests.attack.runner import Server


@pytest.fixture(scope="session")
def server():
    """See :mod:`tests.attack.server`."""
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="session")
def good(tmp_path_factory, server):
    """Folder of good inputs."""
    folder = tmp_path_factory.mktemp("attack") / "good"
    folder.mkdir()
    write_inputs(folder)
    run_commands(folder, server)
    return folder
