"""The server from outside: OpenAI's client, many clients at once, and requests that are wrong."""

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from pathlib import Path

import openai
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
from starlette.testclient import TestClient

from opensora.serving.http import create_app
from opensora.serving.jobs import COMPLETED, QUEUED
from opensora.utils.video import read_video
from tests.conftest import tiny_inference_config
from tests.helpers.serving import finished, listening, served, until, working

PICTURE = Path(__file__).parents[2] / "assets" / "demo" / "blue_square.png"
SMALL = {"num_frames": 5, "num_inference_steps": 1}
KEY = "a-key-of-some-length"


# ------------------------------------------------------------------------------------------------------ OpenAI's client


@pytest.fixture
def client(demo_server):
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # the client's: its own service ends
    return openai.OpenAI(base_url=f"{demo_server[1]}/v1", api_key="none", max_retries=0)


def test_openai_makes_polls_and_downloads(client, tmp_path):
    video = client.videos.create(prompt="a red circle", extra_body={**SMALL, "seed": 7})
    assert (video.object, video.status, video.progress) == ("video", "queued", 0)
    video = client.videos.poll(video.id)
    assert (video.status, video.progress, video.model, video.size) == ("completed", 100, "demo", "64x64")
    assert video.seconds == "0.625"
    assert video.expires_at > video.completed_at >= video.created_at
    client.videos.download_content(video.id).write_to_file(tmp_path / "a.mp4")
    assert read_video(tmp_path / "a.mp4")[0].shape == (5, 64, 64, 3)
    for variant, size in (("thumbnail", (64, 64)), ("spritesheet", (256, 128))):
        content = client.videos.download_content(video.id, variant=variant).read()
        assert Image.open(io.BytesIO(content)).size == size


def test_openai_sends_a_picture(client):
    with PICTURE.open("rb") as picture:
        video = client.videos.create_and_poll(
            prompt="a blue square", input_reference=picture, seconds="1", model="sora-2", poll_interval_ms=50,
            extra_body={"num_inference_steps": 2},
        )  # fmt: skip
    assert (video.status, video.seconds, video.cond_type) == ("completed", "1.125", "i2v_head")


def test_openai_lists_and_deletes(client, demo_server):
    service, _ = demo_server
    made = [client.videos.create(prompt=f"number {n}", extra_body=SMALL).id for n in range(3)]
    listed = [video.id for video in client.videos.list(limit=2)]  # more than one page
    assert listed[:3] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc", after=made[0])][:2] == made[1:]
    for id in made:
        assert client.videos.delete(id).deleted
    until(lambda: not any(service.folders.of(id).exists() for id in made))  # the worker may be at one of them
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made[0])
    assert not set(made) & {video.id for video in client.videos.list()}


def test_openai_lists_the_model(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "opensora"


def test_what_is_not_offered_says_so(client):
    for ask in (
        lambda: client.videos.remix("x", prompt="a"),
        lambda: client.videos.edit(prompt="a", video=b"x"),
        lambda: client.videos.extend(prompt="a", seconds="4", video=b"x"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert caught.value.code == "not_supported"


# ----------------------------------------------------------------------------------------------------------- plain HTTP


def get(address, **headers):
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=300)


def post(address, body=b"", kind="application/json"):
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(address, content, {"Content-Type": kind}, method="POST")
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def test_events_tell_of_every_change_until_the_end(demo_server):
    _, address = demo_server
    id = post(f"{address}/v1/videos", {"prompt": "a", "num_frames": 5, "num_inference_steps": 20})["id"]
    with get(f"{address}/v1/videos/{id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        blocks = stream.read().decode().strip().split("\n\n")
    events = [block.split("\n")[0].removeprefix("event: ") for block in blocks]
    said = [json.loads(block.split("\ndata: ")[1]) for block in blocks]
    assert (events[0], events[-1]) == ("progress", "completed")
    assert [video["progress"] for video in said] == sorted(video["progress"] for video in said)
    assert said[-1]["progress"] == 100


def test_a_job_is_cancelled_while_it_is_made_and_shows_what_it_is(demo_server):
    service, address = demo_server
    id = post(f"{address}/v1/videos", {"prompt": "a", "num_inference_steps": 100})["id"]
    end = time.monotonic() + 300
    while not (service.folders.of(id) / "preview.webp").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    with get(f"{address}/v1/videos/{id}/preview") as answer:
        assert Image.open(io.BytesIO(answer.read())).n_frames == 5
    assert post(f"{address}/v1/videos/{id}/cancel")["status"] == "cancelled"
    with pytest.raises(urllib.error.HTTPError, match="409"):
        post(f"{address}/v1/videos/{id}/cancel")
    step = service.store[id].step
    after = post(f"{address}/v1/videos", {"prompt": "a", **SMALL})["id"]
    assert finished(service.store, after).status == COMPLETED  # the worker goes on
    assert service.store[id].step == step < 100


def test_parts_of_a_video_and_its_settings(demo_server):
    service, address = demo_server
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    body = {"prompt": "a", **SMALL, "input_reference": {"image_url": f"data:image/png;base64,{data}"}}
    id = post(f"{address}/v1/videos", body)["id"]
    assert finished(service.store, id).status == COMPLETED
    with get(f"{address}/v1/videos/{id}/content", Range="bytes=4-7") as answer:
        assert (answer.status, answer.read()) == (206, b"ftyp")
    with get(f"{address}/v1/videos/{id}/settings") as answer:
        text = answer.read().decode()
    settings = json.loads(text)
    assert (settings["prompt"], settings["cond_type"]) == ("a", "i2v_head")
    assert len(settings["weights"]["model"]["sha256"]) == 64
    assert str(service.folders.root) not in text
    assert "assets" not in text


def test_metrics_and_health(demo_server):
    _, address = demo_server
    with get(f"{address}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    assert lines["opensora_queue_length"] == "0.0"
    assert float(lines['opensora_jobs_finished_total{status="completed"}']) >= 1
    assert float(lines['opensora_stage_seconds_sum{stage="denoise"}']) > 0
    with get(f"{address}/health") as answer:
        assert json.load(answer)["status"] == "ok"


# --------------------------------------------------------------------------------------------------------- many clients


def test_200_requests_of_20_clients_each_make_one_video(tmp_path):
    service = served(tiny_inference_config(), tmp_path, page=False, batch_size=20)
    answers, wrong = [], []

    def client(number):
        for request in range(10):
            try:
                fields = {"prompt": f"{number} {request}", **SMALL, "seed": number * 100 + request}
                answers.append(post(f"{address}/v1/videos", fields))
            except OSError as error:
                wrong.append(error)

    with working(service) as worker, listening(service) as address:
        taken = []
        take = worker.store.take
        worker.store.take = lambda most: [taken.append(job.id) or job for job in take(most)]
        threads = [threading.Thread(target=client, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        jobs = [finished(service.store, answer["id"]) for answer in answers]
    assert wrong == []
    assert len({job.id for job in jobs}) == len(taken) == len(set(taken)) == 200
    assert Counter(job.status for job in jobs) == {COMPLETED: 200}
    assert {job.request["prompt"] for job in jobs} == {f"{n} {r}" for n in range(20) for r in range(10)}
    assert all(service.folders.result(job.id) for job in jobs)


# --------------------------------------------------------------------------------------------------------- bad requests

MULTIPART = "multipart/form-data; boundary=xx"


def part(name, content, file=None):
    head = f'--xx\r\nContent-Disposition: form-data; name="{name}"' + (f'; filename="{file}"' if file else "")
    return f"{head}\r\n\r\n".encode() + (content if isinstance(content, bytes) else content.encode()) + b"\r\n"


def form(*parts):
    return b"".join(parts) + b"--xx--\r\n"


def bad_values():
    """A good request with one field that cannot be, and the field that the answer names."""
    wrong = {
        "prompt": ["", "   ", ["a"], {"a": 1}, "a\0b", "x" * 4001],
        "negative_prompt": ["x" * 4001, ["a"]],
        "num_frames": [0, -5, 6, 2.5, "many", 10**30, [5], True, 100001],
        "num_inference_steps": [0, -1, "x", 10**9, 1.5, {}],
        "fps": [0, -8, 1001, "fast", [8]],
        "seed": [-1, 2**63, "x", 1.5, True, [1]],
        "guidance_scale": ["x", 1e9, -1e9, [1]],
        "width": [0, 10**9, "x"],
        "size": ["x", "0x0", "64", "64x", "-64x64", "99999x99999", 64, ["64x64"]],
        "seconds": [0, -1, "x", 10**9, [4]],
        "resolution": ["0px", "big", "99999px", 256, "64px; rm -rf /"],
        "aspect_ratio": ["1:0", "x", "7:1", ":"],
        "flow_shift": [0, -1, "x"],
        "solver": ["gone", 3],
        "cond_type": ["i2v", "i2v_head", "v2v_head", "../t2v"],
        "motion_score": ["wild", "nan", [4], 99, -1],
        "refine_prompt": ["perhaps", 7],
        "lora": ["gone", "../../etc", "/etc/passwd", "a\0b"],
        "lora_strength": [11, "x"],
        "model": [["demo"]],
        "input_reference": ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "https://example.com/a.png",
                            "data:image/png;base64,!!", "data:text/plain,hi", {"file_id": "x"}, {"image_url": 3}, 7,
                            "assets/demo/blue_square.png", "~/.ssh/id_rsa"],
        "unknown_field": [1],
        "stepss": [1],
        "__proto__": ["x"],
    }  # fmt: skip
    for field, values in wrong.items():
        for value in values:
            yield pytest.param({"prompt": "a", **SMALL, field: value}, id=f"{field}={str(value)[:24]!r}")


@pytest.fixture(scope="module")
def bad_client(tmp_path_factory):
    """Of a server that nobody works for, with small limits."""
    folder = tmp_path_factory.mktemp("bad")
    service = served(tiny_inference_config(), folder, page=False, max_upload=0.25, max_queue=4)
    with TestClient(create_app(service), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client, service


@pytest.fixture(autouse=True)
def no_jobs_left(request):
    yield
    if "bad_client" in request.fixturenames:
        _, service = request.getfixturevalue("bad_client")
        for id in service.store.ids():
            service.remove(id)


def left_of(service):
    folder = service.folders.jobs
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def check_refusal(answer, status, service):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["code"]
    assert str(service.folders.root) not in answer.text
    assert "Traceback" not in answer.text
    assert left_of(service) == []
    assert service.store.counts()[QUEUED] == 0


@pytest.mark.parametrize("fields", bad_values())
def test_bad_values(bad_client, fields):
    client, service = bad_client
    answer = client.post("/v1/videos", json=fields)
    check_refusal(answer, 400, service)


BODIES = {
    "no body": (b"", "application/json", 400),
    "no type": (b"{}", "", 415),
    "another type": (b"<a/>", "application/xml", 415),
    "no JSON": (b"{prompt: a}", "application/json", 400),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', "application/json", 400),
    "half": (b'{"prompt": "a"', "application/json", 400),
    "a list": (b'["a"]', "application/json", 400),
    "a number": (b"3", "application/json", 400),
    "deep": (b'{"prompt":' + b"[" * 100_000, "application/json", 400),
    "digits": (b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", "application/json", 400),
    "NaN": (b'{"prompt": "a", "guidance_scale": NaN}', "application/json", 400),
    "surrogate": (b'{"prompt": "\\ud800"}', "application/json", 400),
    "huge JSON": (b'{"prompt": "' + b"a" * 2**21 + b'"}', "application/json", 413),
    "huge file": (form(part("prompt", "a"), part("input_reference", b"x" * 2**21, "a.png")), MULTIPART, 413),
    "no boundary": (form(part("prompt", "a")), "multipart/form-data", 400),
    "another boundary": (form(part("prompt", "a")), "multipart/form-data; boundary=yy", 400),
    "garbage": (b"\0\1\2" * 1000, MULTIPART, 400),
    "unfinished": (part("prompt", "a")[:30], MULTIPART, 400),
    "no name": (b"--xx\r\nContent-Disposition: form-data\r\n\r\na\r\n--xx--\r\n", MULTIPART, 400),
    "twice": (form(part("prompt", "a"), part("prompt", "b")), MULTIPART, 400),
    "many fields": (form(*(part(f"f{n}", "a") for n in range(99))), MULTIPART, 400),
    "many files": (form(*(part("input_reference", b"a", "a") for _ in range(9))), MULTIPART, 400),
    "a file as text": (form(part("prompt", "a", "a.txt")), MULTIPART, 400),
    "no picture": (form(part("prompt", "a"), part("input_reference", b"text", "a.png")), MULTIPART, 400),
    "empty picture": (form(part("prompt", "a"), part("input_reference", b"", "a.png")), MULTIPART, 400),
    "playlist": (form(part("prompt", "a"), part("input_reference", b"#EXTM3U\n/etc/passwd", "a.mp4")), MULTIPART, 400),
    "damaged picture": (
        form(part("prompt", "a"), part("input_reference", PICTURE.read_bytes()[:60], "a.png")), MULTIPART, 400,
    ),
    "damaged clip": (
        form(part("prompt", "a"), part("input_reference", b"\0\0\0\x20ftypisom" * 9, "a")), MULTIPART, 400,
    ),
    "picture and t2v": (
        form(part("prompt", "a"), part("cond_type", "t2v"), part("input_reference", PICTURE.read_bytes(), "a")),
        MULTIPART, 400,
    ),
    "path as name": (form(part("prompt", "a"), part("../../x", b"x", "../../../etc/cron.d/x")), MULTIPART, 400),
    "nested": (form(part("prompt[a]", "a")), MULTIPART, 400),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_bad_bodies(bad_client, name):
    client, service = bad_client
    content, kind, status = BODIES[name]
    check_refusal(client.post("/v1/videos", content=content, headers={"content-type": kind}), status, service)


NOBODYS = "video_" + "0" * 32
PATHS = [
    ("GET", "/v1/videos/gone", 404),
    ("GET", f"/v1/videos/{NOBODYS}", 404),
    ("GET", "/v1/videos/..%2f..%2fjobs.sqlite/content", 404),
    ("GET", "/v1/videos/%2e%2e/content", 404),
    ("GET", "/v1/videos/../../jobs.sqlite", 404),
    ("GET", "/v1/videos/a%00b", 404),
    ("GET", "/v1/videos/" + "a" * 5000, 404),
    ("DELETE", "/v1/videos/gone", 404),
    ("POST", "/v1/videos/gone/cancel", 404),
    ("GET", "/v1/videos/gone/content?variant=all", 400),
    ("GET", "/v1/videos/gone/events", 404),
    ("GET", "/v1/videos/gone/preview", 404),
    ("GET", "/v1/videos?limit=0", 400),
    ("GET", "/v1/videos?limit=101", 400),
    ("GET", "/v1/videos?limit=many", 400),
    ("GET", "/v1/videos?order=best", 400),
    ("GET", "/v1/videos?after=gone", 400),
    ("PUT", "/v1/videos", 405),
    ("PATCH", "/v1/videos/gone", 405),
    ("GET", "/v1/videos/gone/cancel", 405),
    ("GET", "/v1/nothing", 404),
    ("GET", "/v1/models/gone", 404),
    ("POST", "/v1/videos/gone/remix", 400),
    ("GET", "/docs", 404),
    ("GET", "/openapi.json", 404),
]


@pytest.mark.parametrize(("method", "path", "status"), PATHS)
def test_bad_paths(bad_client, method, path, status):
    client, service = bad_client
    check_refusal(client.request(method, path), status, service)


def test_another_model_is_not_found(bad_client):
    client, service = bad_client
    answer = client.post("/v1/videos", json={"prompt": "a", "model": "gpt-4o"})
    check_refusal(answer, 404, service)
    assert answer.json()["error"]["code"] == "model_not_found"


def test_work_beyond_the_limit_is_refused_with_the_numbers(bad_client):
    client, service = bad_client
    answer = client.post("/v1/videos", json={"prompt": "a", "size": "1024x1024", "num_frames": 129})
    check_refusal(answer, 400, service)
    assert "1024 x 1024 pixels x 129 frames x 4 steps" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "10.0.0.1", "localhost.evil.example", ""])
def test_other_names_of_this_machine_are_not_answered(bad_client, host):
    client, service = bad_client
    check_refusal(client.get("/v1/videos", headers={"host": host}), 403, service)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1"])
def test_pages_of_other_sites_send_nothing(bad_client, origin):
    client, service = bad_client
    check_refusal(client.post("/v1/videos", json={"prompt": "a"}, headers={"origin": origin}), 403, service)


def test_the_queue_has_an_end_and_the_server_is_alive_after_all(bad_client):
    client, service = bad_client
    answers = [
        client.post("/v1/videos", json={"prompt": "a"}, headers={"origin": "http://localhost"}) for _ in range(5)
    ]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429]
    assert answers[-1].json()["error"]["code"] == "queue_full"
    for answer in answers[:4]:
        id = answer.json()["id"]
        assert client.get(f"/v1/videos/{id}/content").json()["error"]["code"] == "video_not_ready"
        assert client.post(f"/v1/videos/{id}/cancel").json()["status"] == "cancelled"
        assert client.get(f"/v1/videos/{id}/content").json()["error"]["code"] == "video_failed"
        assert client.delete(f"/v1/videos/{id}").json()["deleted"]
    assert left_of(service) == []
    assert client.get("/health").status_code == 200


def test_a_full_disk_takes_no_more(tmp_path):
    service = served(tiny_inference_config(), tmp_path, page=False, max_disk=1e-9)
    with TestClient(create_app(service), base_url="http://localhost") as client:
        answer = client.post("/v1/videos", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "no_room")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    service = served(tiny_inference_config(), tmp_path_factory.mktemp("keyed"), page=False, api_key=KEY)
    with TestClient(create_app(service), base_url="http://any.example") as client:
        yield client


BASIC = base64.b64encode(f"me:{KEY}".encode()).decode()


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer {KEY}", f"Basic {BASIC}"])
def test_the_key_opens(keyed, given):
    assert keyed.get("/v1/videos", headers={"authorization": given}).status_code == 200
    assert keyed.get("/metrics", headers={"authorization": given}).status_code == 200


WRONG_KEYS = ["", "Bearer", "Bearer x", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, f"Token {KEY}", "Basic ***",
              f"Basic {base64.b64encode(b'me:x').decode()}", "Bearer ÿ".encode("latin-1")]  # fmt: skip


@pytest.mark.parametrize("given", WRONG_KEYS)
def test_without_it_all_but_health_is_shut(keyed, given):
    headers = {"authorization": given} if given else {}
    for path in ("/v1/videos", "/v1/videos/x/content", "/metrics", "/", "/gradio_api/info"):
        answer = keyed.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "www-authenticate" in answer.headers
    assert keyed.get("/health", headers=headers).status_code == 200
