"""A server whose worker is killed, and which is killed itself: nothing is lost (many moments: ``serving_kills``)."""

import pytest

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
from tests.integration.serving_kills import Server


def test_jobs_outlive_the_worker_and_the_server(tmp_path):
    server = Server(tmp_path)
    try:
        server.survive(server.kill_worker, 0.1)
        server.survive(server.kill_server, 0.2)
    finally:
        server.stop()
