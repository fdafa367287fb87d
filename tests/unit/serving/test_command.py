"""What the command refuses before it listens, and a worker that does not come up."""

import socket
import sys

import pytest

from opensora.config import load_config
from opensora.config.commands import ServeOptions
from opensora.serving import supervisor as of_supervisor
from opensora.serving.command import check_address, listen, main, with_key
from opensora.serving.desk import check_served
from opensora.serving.folders import READY, Folders
from opensora.serving.jobs import FAILED, IN_PROGRESS, QUEUED, JobStore, new_id
from opensora.serving.run import serve
from opensora.serving.supervisor import MOST_STARTS, Supervisor
from opensora.utils.claims import claimed
from opensora.utils.errors import UserError
from tests.helpers.serving import until


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])
def test_others_need_a_key(tiny_config, host):
    with pytest.raises(UserError, match="--api-key"):
        check_address(load_config(tiny_config, ServeOptions, {"host": host}))
    check_address(load_config(tiny_config, ServeOptions, {"host": host, "api_key": "long enough"}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_needs_none(tiny_config, host):
    check_address(load_config(tiny_config, ServeOptions, {"host": host}))


def test_keys_come_from_a_file(tiny_config, tmp_path):
    (tmp_path / "key").write_text("from-a-file\n")
    cfg = with_key(load_config(tiny_config, ServeOptions, {"api_key_file": str(tmp_path / "key")}))
    assert cfg.api_key == "from-a-file"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": "short"}, "at least 8"),
        ({"api_key": "with\nbreaks-in-it"}, "without line breaks"),
        ({"api_key_file": "/nowhere/key"}, "cannot be read"),
        ({"api_key_file": "/nowhere/key", "api_key": "long enough"}, "give --api-key or"),
    ],
)
def test_keys_that_are_none(tiny_config, changes, message):
    with pytest.raises(UserError, match=message):
        with_key(load_config(tiny_config, ServeOptions, changes))


@pytest.mark.parametrize(
    "changes", [{"prompt": "a"}, {"num_sample": 2}, {"dry_run": True}, {"save_latents": True}, {"data_dir": "a;b"}]
)
def test_keys_that_requests_say_are_refused(tiny_config, changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        check_served(load_config(tiny_config, ServeOptions, changes))


def test_places_that_are_not_there_are_refused(tiny_config, tmp_path):
    (tmp_path / "other.csv").write_text("prompt\na\n")
    (tmp_path / "none.csv").write_text('text\n" "\n')
    for key, name, said in (
        ("lora_dir", "gone", "lora_dir .*gone: no such folder"),
        ("examples", "gone.csv", "gone.csv: no such file"),
        ("examples", "other.csv", "missing column 'text'"),
        ("examples", "none.csv", "no text"),
    ):
        with pytest.raises(UserError, match=said):
            check_served(load_config(tiny_config, ServeOptions, {key: str(tmp_path / name)}))


def test_a_port_that_is_taken_and_a_folder_in_use(tiny_config_file, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            listen("127.0.0.1", port)
    with claimed(tmp_path / "data"), pytest.raises(UserError, match="another --data-dir"):
        main([str(tiny_config_file), "--data-dir", str(tmp_path / "data")])


class Failing(Supervisor):
    """Its worker starts a job and dies."""

    def _command(self):
        code = (
            "import sys; from pathlib import Path; from opensora.serving.jobs import JobStore; "
            "JobStore(Path(sys.argv[1])).take(); sys.exit(3)"
        )
        return [sys.executable, "-c", code, str(self.folders.database)]


def test_a_worker_that_keeps_dying_takes_no_job_along_for_ever(tiny_config, tmp_path):
    cfg = load_config(tiny_config, ServeOptions, {"data_dir": str(tmp_path), "api_key": "secret-secret"})
    folders = Folders(tmp_path)
    store = JobStore(folders.database)
    job = store.add(new_id(), "", "a", {"prompt": "a"}, {"seed": 1}, 1, 9)
    supervisor = Failing(cfg, folders, store)
    supervisor.start()
    until(lambda: store[job.id].status == FAILED)
    supervisor.stop()
    assert (store[job.id].attempts, store[job.id].error["code"]) == (2, "worker_ended")
    assert 2 <= supervisor.failures <= supervisor.starts
    assert "secret" not in folders.settings.read_text()


class Ending(Supervisor):
    """Its worker ends like a line of the shell."""

    line = ""

    def _command(self):
        return ["sh", "-c", self.line, "sh", str(self.folders.root / READY)]


@pytest.mark.parametrize(
    ("line", "starts"), [("exit 2", 1), ("exit 70", MOST_STARTS), ('[ ! -e "$1" ] && kill -9 $$', MOST_STARTS)]
)
def test_a_worker_that_never_comes_up_is_given_up(line, starts, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(of_supervisor, "LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(of_supervisor, "SETTLED", 0.0)  # however long a start took
    folders, calls = Folders(tmp_path), []
    cfg = load_config(tiny_config, ServeOptions, {"data_dir": str(tmp_path)})
    supervisor = Ending(cfg, folders, JobStore(folders.database))
    supervisor.line, supervisor.at_giving_up = line, lambda: calls.append(supervisor.given_up)
    supervisor.start()
    until(lambda: supervisor.given_up)
    supervisor.stop()
    assert supervisor.starts == starts
    assert len(calls) == 1
    assert "never ready" in calls[0]


def test_one_that_came_up_is_started_for_ever(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(of_supervisor, "LONGEST_PAUSE", 0.0)
    folders = Folders(tmp_path)
    cfg = load_config(tiny_config, ServeOptions, {"data_dir": str(tmp_path)})
    supervisor = Ending(cfg, folders, JobStore(folders.database))
    supervisor.line = 'touch "$1"; exit 2'
    supervisor.start()
    until(lambda: supervisor.starts > MOST_STARTS)
    supervisor.stop()
    assert not supervisor.given_up
    assert supervisor.failures >= MOST_STARTS


class Sleeping(Supervisor):
    """Its worker starts a job and hangs."""

    def _command(self):
        code = (
            "import sys, time; from pathlib import Path; from opensora.serving.jobs import JobStore; "
            "JobStore(Path(sys.argv[1])).take(); time.sleep(600)"
        )
        return [sys.executable, "-c", code, str(self.folders.database)]


def test_a_stop_gives_the_job_back(tiny_config, tmp_path):
    folders = Folders(tmp_path)
    store = JobStore(folders.database)
    job = store.add(new_id(), "", "a", {"prompt": "a"}, {"seed": 1}, 1, 9)
    supervisor = Sleeping(load_config(tiny_config, ServeOptions, {"data_dir": str(tmp_path)}), folders, store)
    supervisor.start()
    until(lambda: store[job.id].status == IN_PROGRESS)
    supervisor.stop()
    assert (store[job.id].status, store[job.id].attempts) == (QUEUED, 0)


def test_a_service_that_cannot_start_says_so(tiny_config, tmp_path):
    cfg = load_config(tiny_config, ServeOptions, {"data_dir": str(tmp_path), "page": False, "device": "cpu"})
    (tmp_path / "worker.json").mkdir()  # where the worker's settings go
    with listen("127.0.0.1", 0) as place, pytest.raises(OSError, match=r"worker\.json"):
        serve(cfg, place, {})
