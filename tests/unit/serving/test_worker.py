"""The worker on tiny models: what becomes of jobs, and of the models."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.diffusion.decode import DecodeMemoryError
from opensora.serving.jobs import CANCELLED, COMPLETED, FAILED, QUEUED
from opensora.serving.request import BadField
from opensora.utils.errors import UserError
from opensora.utils.video import read_video, save_video
from tests.attack.inputs import write_adapter
from tests.helpers.serving import served, worker_of

SMALL = {"num_frames": "5", "num_inference_steps": "2", "seed": "3"}
PICTURE = Path(__file__).parents[3] / "assets" / "demo" / "blue_square.png"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def adapters(place):
    folder = place / "adapters"
    folder.mkdir()
    write_adapter(folder / "style", width=32)
    write_adapter(folder / "other", width=48)
    from safetensors.torch import load_file, save_file

    file = folder / "style" / "adapter_model.safetensors"
    ones = {name: torch.ones_like(value) for name, value in load_file(file).items()}
    save_file(ones, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def service(place, adapters):
    from tests.conftest import tiny_inference_config

    made = served(tiny_inference_config(), place / "data", lora_dir=str(adapters), batch_size=4, window=9)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def worker(service):
    return worker_of(service)


@pytest.fixture(autouse=True)
def empty(service):
    yield
    for id in service.store.ids():
        service.remove(id)


def ask(service, prompt="a", files=None, **fields):
    return service.create({"prompt": prompt, **SMALL, **fields}, files or {})


def work(worker):
    """Make what waits."""
    while jobs := worker.store.take(4):
        worker.make(jobs)


def frames_of(service, job):
    return read_video(service.folders.result(job.id))[0]


def test_a_job_becomes_a_video_with_its_record(service, worker):
    job = ask(service, "a red circle", negative_prompt="blue", fps="12")
    work(worker)
    job = service.store[job.id]
    assert job.status == COMPLETED
    assert frames_of(service, job).shape == (5, 32, 32, 3)
    assert {"text", "denoise", "decode", "write"} <= job.seconds.keys()
    record = json.loads((service.folders.of(job.id) / "video.json").read_text())
    assert (record["prompt"], record["negative_prompt"], record["seed"]) == ("a red circle", "blue", 3)
    assert record["text"] == "a red circle. 12 FPS."
    assert record["config"]["sampling_option"]["num_steps"] == 2
    left = {path.name for path in service.folders.of(job.id).iterdir()}
    assert left == {"video.mp4", "video.json", "video.txt", "thumbnail.webp", "spritesheet.jpg"}


def test_the_video_is_that_of_the_command_line(service, worker, run_tiny, tmp_path, monkeypatch):
    job = ask(service, "a blue square")
    work(worker)
    run_tiny("--prompt", "a blue square", "--num_frames", "5", "--num_steps", "2", "--sampling_option.seed", "3")
    (made,) = Path.cwd().rglob("*.mp4")
    np.testing.assert_array_equal(read_video(made)[0], frames_of(service, job))


def test_pictures_fix_the_frames_that_they_are_sent_for(service, worker):
    content, both = PICTURE.read_bytes(), ("input_reference", "last_reference")
    mask = io.BytesIO()
    with Image.open(PICTURE) as picture:
        size = picture.size
    half = Image.new("L", size)
    half.paste(255, (0, 0, size[0] // 2, size[1]))
    half.save(mask, "png")
    jobs = {
        "frames": ask(service, files=dict.fromkeys(both, content), places="0;-1", num_frames="9"),
        "region": ask(service, files={"input_reference": content, "mask": mask.getvalue()}, num_frames="9"),
        "extend_left": ask(service, files={"input_reference": content}, cond_type="extend_left", num_frames="9"),
        "i2v_head": ask(service, files={"input_reference": content}),
        "i2v_tail": ask(service, files={"last_reference": content}, num_frames="9"),
        "i2v_loop": ask(service, files={"input_reference": content, "last_reference": content}, num_frames="9"),
    }
    work(worker)
    for cond_type, job in jobs.items():
        assert service.store[job.id].status == COMPLETED
        assert service.store[job.id].facts["cond_type"] == cond_type
    for wrong, message in (
        ({"places": "0"}, "give one for each reference"),
        ({"places": "0;3"}, "last_reference@3: .* use 0 or 4"),
        ({"cond_type": "region"}, "wants a mask"),
        ({"cond_type": "i2v_loop", "places": "0;-1"}, "places are for cond_type frames"),
    ):
        with pytest.raises(UserError, match=message):
            ask(service, files=dict.fromkeys(both, content), num_frames="9", **wrong)


def several(*contents):
    return {f"references[{number}]": content for number, content in enumerate(contents)}


def test_several_references_at_their_places(service, worker):
    picture = PICTURE.read_bytes()
    clip = (service.folders.of("clip")).with_suffix(".mp4")
    clip.parent.mkdir(parents=True, exist_ok=True)
    content = save_video(np.zeros((9, 32, 32, 3), np.uint8), clip, 8).read_bytes()
    clip.unlink()
    data = "data:image/png;base64," + base64.b64encode(picture).decode()
    jobs = [
        ask(
            service,
            files=several(picture, content, picture),
            places="0;4-8;-1",
            num_frames="17",
            num_inference_steps="1",
        ),
        ask(service, references=[{"image_url": data}, data], places="0;-1", num_frames="9"),
        ask(service, files=several(content), cond_type="extend_right", num_frames="9"),
    ]
    work(worker)
    for job, cond_type in zip(jobs, ("frames", "frames", "extend_right")):
        assert service.store[job.id].status == COMPLETED
        assert service.store[job.id].facts["cond_type"] == cond_type
    record = json.loads((service.folders.of(jobs[0].id) / "video.json").read_text())
    assert [given[1:] for given in record["given"]] == [[0, 0], [4, 8], [16, 16]]
    for files, fields, field, message in (
        (several(picture), {}, "references", "say which frames they are"),
        (several(picture, picture), {"cond_type": "i2v_head"}, "references", "takes one reference"),
        (several(picture), {"places": "0;-1"}, "places", "give one for each reference"),
        (several(picture), {"references": "x", "places": "0"}, "references", "a list of at most 8"),
        ({}, {"references": [data] * 9, "places": "0"}, "references", "a list of at most 8"),
    ):
        with pytest.raises(BadField, match=message) as caught:
            ask(service, files=files, num_frames="9", **fields)
        assert caught.value.field == field
    with pytest.raises(UserError, match=r"references\[1\]@3: .* use 0 or 4"):
        ask(service, files=several(picture, picture), places="0;3", num_frames="9")


def test_a_long_video_has_a_prompt_for_each_window(service, worker):
    long = {"num_frames": "17"}
    plain, changed = ask(service, "a", **long), ask(service, "a", next_prompts="something else", **long)
    work(worker)
    frames = [frames_of(service, job).astype(int) for job in (plain, changed)]
    assert abs(frames[0][:5] - frames[1][:5]).max() <= 2
    assert abs(frames[0][9:] - frames[1][9:]).max() > 2
    record = json.loads((service.folders.of(changed.id) / "video.json").read_text())
    assert record["next_prompts"] == ["something else"]
    with pytest.raises(BadField, match=r"num_frames=5 is made at once \(window=9\)"):
        ask(service, next_prompts="b")
    with pytest.raises(BadField, match="next_prompts has 5,000 letters"):
        ask(service, next_prompts="b" * 5000, **long)


def test_a_batch_makes_what_single_jobs_make(service, worker):
    jobs = [ask(service, prompt) for prompt in ("a", "b", "c")]
    worker.make(worker.store.take(4))
    alone = [ask(service, prompt) for prompt in ("a", "b", "c")]
    for _ in alone:
        worker.make(worker.store.take(1))
    for one, other in zip(jobs, alone):
        assert service.store[one.id].status == service.store[other.id].status == COMPLETED
        difference = frames_of(service, one).astype(int) - frames_of(service, other)
        assert abs(difference).max() <= 2  # a batched matrix product rounds otherwise


def test_cancelling_stops_at_the_next_step(service, worker, monkeypatch):
    job = ask(service, num_inference_steps="50")
    advance, steps = worker.store.advance, []

    def cancelled(job, step, total):
        steps.append(step)
        if step == 2:
            service.cancel(job.id)
        advance(job, step, total)

    monkeypatch.setattr(worker.store, "advance", cancelled)
    work(worker)
    assert steps == [1, 2]
    assert service.store[job.id].status == CANCELLED
    assert service.folders.result(job.id) is None


def test_of_a_batch_only_what_is_cancelled_is_left_out(service, worker, monkeypatch):
    wanted, unwanted = ask(service), ask(service)
    advance = worker.store.advance

    def cancelled(job, step, total):
        service.cancel(unwanted.id)
        advance(job, step, total)

    monkeypatch.setattr(worker.store, "advance", cancelled)
    work(worker)
    assert service.store[wanted.id].status == COMPLETED
    assert service.store[unwanted.id].status == CANCELLED
    assert service.folders.result(unwanted.id) is None


def test_a_job_that_is_deleted_meanwhile_leaves_nothing(service, worker, monkeypatch):
    job = ask(service)
    complete = worker.store.complete

    def removed(job, *rest):
        service.remove(job.id)
        complete(job, *rest)

    monkeypatch.setattr(worker.store, "complete", removed)
    work(worker)
    assert service.store.get(job.id) is None
    assert not service.folders.of(job.id).exists()


def test_a_folder_that_goes_while_it_is_written_to_is_no_failure(service, worker, monkeypatch):
    job, later = ask(service), ask(service, num_frames="9")

    def removed(frames, path):
        service.remove(job.id)
        raise FileNotFoundError(2, "gone", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("opensora.serving.worker.write_sheet", removed)
        worker.make(worker.store.take(1))
    work(worker)
    assert service.store.get(job.id) is None
    assert not service.folders.of(job.id).exists()
    assert service.store[later.id].status == COMPLETED


def test_out_of_memory_fails_the_job_and_ends_the_worker(service, worker, monkeypatch):
    job, later = ask(service), ask(service, num_frames="9")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(worker.pipe, "sample", full)
    with pytest.raises(torch.OutOfMemoryError):
        work(worker)
    failed = service.store[job.id]
    assert (failed.status, failed.error["code"]) == (FAILED, "out_of_memory")
    assert failed.error["message"] == f"{job.id}: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert service.store[later.id].status == QUEUED


def test_a_decoder_without_memory_fails_the_job_alone(service, worker, monkeypatch):
    job = ask(service)

    def full(sink, latents, plan, kept):
        raise DecodeMemoryError("not enough memory to decode, even in tiles", latents, slice(0, 5))

    monkeypatch.setattr(worker.pipe, "decode_into", full)
    work(worker)
    assert service.store[job.id].error["message"] == "not enough memory to decode, even in tiles"


def test_jobs_of_a_batch_do_not_fail_for_each_other(service, worker, monkeypatch):
    jobs = [ask(service, prompt) for prompt in ("a", "bad", "c")]
    make = worker.pipe.make

    def picky(texts, *rest, **more):
        if any("bad" in text for text in texts):
            raise torch.OutOfMemoryError("full") if len(texts) > 1 else ValueError("bad")
        return make(texts, *rest, **more)

    monkeypatch.setattr(worker.pipe, "make", picky)
    with pytest.raises(ValueError, match="bad"):
        worker.make(worker.store.take(4))
    states = [service.store[job.id].status for job in jobs]
    assert states[:2] == [COMPLETED, FAILED]


def test_an_adapter_is_on_the_model_for_its_job_alone(service, worker):
    before = {name: value.clone() for name, value in worker.pipe.models["model"].state_dict().items()}
    plain, styled, weak = ask(service), ask(service, lora="style"), ask(service, lora="style", lora_strength="0")
    work(worker)
    last = ask(service)
    work(worker)
    after = worker.pipe.models["model"].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    made = [frames_of(service, job).astype(int) for job in (plain, styled, weak)]
    assert abs(made[0] - made[1]).max() > 0
    np.testing.assert_array_equal(made[0], made[2])
    np.testing.assert_array_equal(made[0], frames_of(service, last))
    record = json.loads((service.folders.of(styled.id) / "video.json").read_text())
    assert len(record["weights"]["lora"]["sha256"]) == 64


@pytest.mark.parametrize("name", ["gone", "../style", "/etc", "other", ""])
def test_adapters_are_named_and_fit(service, name):
    with pytest.raises(BadField) as caught:
        ask(service, lora=name)
    assert caught.value.field == "lora"
    assert str(service.cfg.lora_dir) not in str(caught.value)


def test_an_adapter_that_has_gone_fails_its_job(service, worker, adapters):
    write_adapter(adapters / "short", width=32)
    job = ask(service, lora="short")
    (adapters / "short").rename(adapters / ".short")
    work(worker)
    assert "not one of this server's adapters" in service.store[job.id].error["message"]


def test_results_expire(service, worker):
    job, waiting = ask(service), ask(service, num_frames="9")
    worker.make(worker.store.take(1))
    assert service.sweep() == 0
    store = service.store
    with store._transaction() as base:
        base.execute("UPDATE jobs SET finished = finished - ?", (3600 * service.cfg.keep_hours + 1,))
    assert service.sweep() == 1
    assert store.get(job.id) is None
    assert not service.folders.of(job.id).exists()
    assert store[waiting.id].status == QUEUED
