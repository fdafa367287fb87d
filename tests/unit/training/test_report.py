"""Curves: means, rates, shares, where they go."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensora.config.choices import TRACKERS
from opensora.config.commands import LoopOptions, TrainOptions
from opensora.config.options import TrainSampleOptions
from opensora.models.mmdit.flops import forward_flops
from opensora.models.mmdit.model import Flux
from opensora.training.report import metrics, throughput
from opensora.training.report.metrics import Mean, MetricLog, Rate, StageTimer
from opensora.training.report.swanlab import SwanLabTracker
from opensora.training.report.tensorboard import TensorBoardTracker
from opensora.training.report.throughput import TrainingFlops, peak_flops
from opensora.training.report.trackers import TrackedRun, Tracker, check_trackers, create_trackers, filmstrip
from opensora.training.report.wandb import WandbTracker
from opensora.utils.errors import UserError
from opensora.utils.video import save_video


class Recorder:
    """A tracker that remembers."""

    def __init__(self):
        self.values = {}

    def scalars(self, values, step):
        self.values[step] = dict(values)

    def close(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told."""
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(metrics, "perf_counter", lambda: now.value)
    return now


def test_means_rates_and_shares(tmp_path, clock):
    recorder = Recorder()
    log = MetricLog(tmp_path, 4, log_every=2, trackers=[recorder], peak_flops=8e12)
    for loss, quarter in ((1.0, (2.0, 1)), (3.0, (10.0, 3))):
        log.add({"data_seconds": 0.5, "loss": torch.tensor(loss), "tokens": Rate(100), "tflops": Rate(8.0, True)})
        log.add({"loss_time/0-0.25": Mean(*quarter), "loss_time/0.25-0.5": Mean(0.0, 0)})
        clock.value += 2.0
        with log.paused():
            clock.value += 50.0
        log.step_done(1 if loss == 1.0 else 2, 0.1)
    values = recorder.values.pop(2)
    assert not recorder.values
    assert values.pop("memory_gib") > 0
    assert values == {
        "data_seconds": 0.5,
        "loss": 2.0,
        "loss_time/0-0.25": 3.0,
        "lr": 0.1,
        "seconds_per_step": 2.0,
        "data_wait": 0.25,
        "tokens_per_s": 50.0,
        "tflops_per_s": 4.0,
        "mfu": 0.5,
    }
    log.close()


def test_stages_are_timed(clock):
    timer = StageTimer(torch.device("cpu"), enabled=True)
    for _ in range(2):
        with timer("forward"):
            clock.value += 1.5
    assert timer.take() == {"seconds/forward": 3.0}
    assert timer.take() == {}
    off = StageTimer(torch.device("cpu"), enabled=False)
    with off("forward"):
        pass
    assert off.take() == {}


@pytest.mark.parametrize(("again_from", "first"), [(1, 1.0), (0, 2.0)], ids=["resumed", "begun anew"])
def test_a_resumed_run_hides_what_the_killed_one_wrote(tmp_path, again_from, first):
    for start, steps, value in ((0, (1, 2, 3), 1.0), (again_from, range(again_from + 1, 5), 2.0)):
        tracker = TensorBoardTracker(TrackedRun(tmp_path, start))
        for step in steps:
            tracker.scalars({"loss": value}, step)
        tracker.video("sample/0", np.zeros((3, 4, 4, 3), np.uint8), tmp_path / "x.mp4", 8, steps[-1])
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, first), (2, 2.0), (3, 2.0), (4, 2.0)]
    assert "sample/0" in events.Tags()["images"]


def test_weights_and_biases(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or run, Video=lambda path: ("video", path))
    fake.Error = OSError
    fake.Html = lambda text: ("html", text)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "exp"
    tracker = WandbTracker(TrackedRun(folder, 0, "mmdit", values={"lr": 1}))
    tracker.scalars({"loss": 1.0}, 3)
    tracker.text("config", "a < b", 3)
    tracker.video("sample/0", np.zeros((1, 2, 2, 3), np.uint8), folder / "a.mp4", 8, 3)
    tracker.close()
    assert calls[0] == dict(project="mmdit", name="exp", id="exp", resume="allow", config={"lr": 1}, dir=str(folder))
    assert calls.pop(2) == (3, {"config": ("html", "<pre>a &lt; b</pre>")})
    assert calls[1:] == [(3, {"loss": 1.0}), (3, {"sample/0": ("video", str(folder / "a.mp4"))}), "finished"]


def test_weights_and_biases_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    check_trackers(LoopOptions(wandb=True))
    for step in (1, 2):  # started and resumed
        values = {"lr": 1e-3, "bucket_config": {"64px": {17: (1.0, 2)}}}
        tracker = WandbTracker(TrackedRun(tmp_path / "a:b#c", 0, "mmdit", values=values))
        tracker.scalars({"loss": 1.0, "loss_time/0-0.25": 2.0}, step)
        film = save_video(np.zeros((3, 16, 16, 3), np.uint8), tmp_path / f"{step}.mp4", 8)
        tracker.video("sample/0000", np.zeros((3, 16, 16, 3), np.uint8), film, 8, step)
        tracker.close()
    runs = list((tmp_path / "a:b#c").glob("wandb/offline-run-*/run-a-b-c.wandb"))
    assert runs
    assert len(list((tmp_path / "a:b#c").glob("wandb/offline-run-*/files/media/videos/sample/*.mp4"))) == 2
    monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(sys.modules["wandb"].UsageError("no")))
    with pytest.raises(UserError, match="wandb=True: no"):
        WandbTracker(TrackedRun(tmp_path))


def test_weights_and_biases_without_an_account(monkeypatch):
    fake = SimpleNamespace(setup=lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")))
    fake.login = lambda prompt, verify: False
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match="not logged in"):
        check_trackers(LoopOptions(wandb=True))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        check_trackers(LoopOptions(trackers=["tensorboard", "wandb"]))
    check_trackers(LoopOptions())


def test_swanlab(tmp_path, monkeypatch):
    calls = []
    kinds = {name: lambda value, name=name: (name, value) for name in ("Text", "Image", "Video")}
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)))
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options) or run, finish=lambda: calls.append("finished"), **kinds
    )
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    check_trackers(LoopOptions(trackers=["swanlab"]))
    folder = tmp_path / "exp"
    tracker = SwanLabTracker(TrackedRun(folder, 0, "mmdit", values={"lr": 1}))
    tracker.scalars({"loss": 1.0}, 3)
    tracker.text("config", "a = 1", 0)
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    frames[1] = 255
    tracker.video("sample/0", frames, tmp_path / "a.mp4", 8, 3)
    tracker.close()
    started = calls.pop(0)
    assert len(started.pop("id")) == 21
    assert started == dict(
        project="mmdit", experiment_name="exp", config={"lr": 1}, logdir=str(folder / "swanlab"), resume="allow"
    )
    assert calls == [
        (3, {"loss": 1.0}),
        (0, {"config": ("Text", "a = 1")}),
        (3, {"sample/0": ("Video", str(tmp_path / "a.gif"))}),
        "finished",
    ]
    with Image.open(tmp_path / "a.gif") as moving:
        assert (moving.n_frames, moving.info["duration"]) == (3, 120)  # 1/8 s, of which GIF counts hundredths
    monkeypatch.setattr(fake, "init", lambda **_: (_ for _ in ()).throw(ValueError("no key")))
    with pytest.raises(UserError, match="trackers=swanlab: no key; run `swanlab login`"):
        SwanLabTracker(TrackedRun(folder))
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(UserError, match="trackers=swanlab needs the module swanlab.*pip install swanlab"):
        check_trackers(LoopOptions(trackers=["swanlab"]))


def test_several_trackers_get_config_and_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(TRACKERS, "_added", {})

    @TRACKERS.register("mine")
    class Mine(Tracker):
        def __init__(self, run):
            self.run, self.texts = run, {}

        def scalars(self, values, step):
            pass

        def text(self, name, text, step):
            self.texts[name] = text

        def close(self):
            pass

    with pytest.raises(UserError, match="the tracker 'less': Less lacks close, scalars"):
        TRACKERS.register("less")(type("Less", (Tracker,), {}))
    cfg = TrainOptions(
        trackers=["mine", "tensorboard"], wandb_project="p", samples=TrainSampleOptions(prompts=["a ball", "a cube"])
    )
    check_trackers(cfg)
    mine, board = create_trackers(cfg, tmp_path, 7)
    board.close()
    assert (mine.run.folder, mine.run.start_step, mine.run.project) == (tmp_path, 7, "p")
    assert mine.texts["prompts"] == "a ball\na cube"
    assert "wandb_project" in mine.texts["config"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (prompts,) = events.Tensors("prompts/text_summary")
    assert prompts.tensor_proto.string_val[0].decode() == "    a ball\n    a cube"
    with pytest.raises(UserError, match="trackers tensorbord: expected one of tensorboard, wandb, swanlab, mine"):
        LoopOptions(trackers=["tensorbord"])


def test_filmstrip():
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((9, 2, 3, 3), np.uint8)
    assert filmstrip(frames, 3)[0, ::3, 0].tolist() == [0, 4, 8]


def test_flops_and_peak(monkeypatch, tiny_config):
    section = {k: v for k, v in tiny_config["model"].items() if k != "type"}
    model = Flux(device_map="meta", **section)
    whole = TrainingFlops(model).per_sample(16, 4)
    assert whole == 3 * forward_flops(model, 16, 4)
    model.requires_grad_(False)
    assert TrainingFlops(model).per_sample(16, 4) == pytest.approx(whole * 2 / 3)
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    for name, peak in (
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Unknown", None),
    ):
        monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
