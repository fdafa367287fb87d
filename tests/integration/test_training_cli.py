"""Training commands on a handful of real clips: they train, stop, go on exactly, and name mistakes."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora.config import parse_config
from opensora.config.commands import CacheOptions, TrainOptions, VaeTrainOptions
from opensora.training.checkpoint.folder import list_checkpoints
from opensora.training.command import train as command
from opensora.training.diffusion.trainer import Trainer
from opensora.training.vae.trainer import VAETrainer
from opensora.utils.errors import UserError
from opensora.utils.weights_writing import save_safetensors


@pytest.fixture
def vae(tmp_path, common, tiny_config, write_config):
    """A tiny VAE training config file: single frames, then clips."""
    extra = dict(
        model=tiny_config["ae"],
        image_steps=2,
        image_bucket_config={"32px_ar1:1": {1: (1.0, 3)}},
        lr_scheduler=dict(warmup_steps=1, cosine=True),
    )
    return write_config(tmp_path / "vae.py", {**common, **extra})


def train(trainer, options, config, *overrides):
    return trainer(parse_config([config, *map(str, overrides)], options)).run()


def final(folder):
    state = {}
    for name in ("model/model.safetensors", "ema.safetensors"):
        newest = max(folder.glob("epoch*"), key=lambda p: int(p.name.rsplit("step", 1)[1]))
        state.update({f"{name}:{k}": v for k, v in load_file(newest / name).items()})
    return state


@pytest.mark.parametrize("kind", ["diffusion", "vae"])
def test_a_resumed_run_equals_one_never_stopped(kind, request):
    config = request.getfixturevalue(kind)
    trainer, options = {"diffusion": (Trainer, TrainOptions), "vae": (VAETrainer, VaeTrainOptions)}[kind]
    # A tiny VAE of random weights encodes at training; the same weights are needed in both runs.
    torch.manual_seed(0)
    whole = train(trainer, options, config, "--exp-name", "whole")
    torch.manual_seed(0)
    parts = train(trainer, options, config, "--exp-name", "parts", "--max-steps", 5)
    for path in parts.glob("epoch*-global_step5"):
        (path / "running_states.json").unlink()  # as if the run had died before its last checkpoint
        path.rename(path.with_name("dead"))
    torch.manual_seed(0)
    resumed = train(trainer, options, config, "--load", next(parts.glob("epoch*-global_step3")))
    assert resumed.resolve() == parts.resolve()
    a, b = final(whole), final(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)  # bitwise: same data, noise, moments and average
    assert (whole / "config.txt").is_file()
    assert "loss=" in (whole / "log.txt").read_text()
    assert list((whole / "tensorboard").iterdir())


def test_occupied_folders_are_refused(vae):
    train(VAETrainer, VaeTrainOptions, vae, "--exp-name", "one", "--max-steps", 1)
    with pytest.raises(UserError, match="already holds checkpoints"):  # before a model is built
        VAETrainer(parse_config([vae, "--exp-name", "one", "--max-steps", "1"], VaeTrainOptions))


def test_the_config_of_a_run_is_kept(diffusion):
    """Going on with another optimizer is refused and leaves all as it was; with other settings both configs stay."""
    folder = train(Trainer, TrainOptions, diffusion, "--exp-name", "one", "--max-steps", 1)
    before = (folder / "config.txt").read_text()
    with pytest.raises(UserError, match="its optimizer is of another kind.*as its config.txt has them"):
        train(Trainer, TrainOptions, diffusion, "--load", folder, "--max-steps", 2, "--optim.cls", "Muon")
    assert [path.name for path in folder.glob("config*")] == ["config.txt"]
    assert (folder / "config.txt").read_text() == before
    train(Trainer, TrainOptions, diffusion, "--load", folder, "--max-steps", 2)
    assert (folder / "config_to_step1.txt").read_text() == before
    assert '"max_steps": 2' in (folder / "config.txt").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--dataset.data-path", "none.csv"], "none.csv: no such file"),
        (["--model.cond_embed", "False"], "condition_config and model.cond_embed"),
        (["--model.in_channels", "64"], "in_channels=64 does not fit"),
        (["--load", "nowhere"], "--load nowhere"),
        (["--optim.cls", "SGD"], "optim.cls='SGD'"),
        (["--device", "cuda"], "CUDA|cuda"),
    ],
)
def test_mistakes_are_named(diffusion, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(Trainer, TrainOptions, diffusion, *overrides)
    assert not list(tmp_path.glob("outputs/*/epoch*"))


def test_a_run_ends_at_max_steps_or_after_its_epochs(diffusion, vae, caplog):
    """Six clips in batches of two are three steps per epoch; whichever comes first ends the run."""
    for trainer, options, config in ((Trainer, TrainOptions, diffusion), (VAETrainer, VaeTrainOptions, vae)):
        before = 2 if trainer is VAETrainer else 0  # steps on single frames, which epochs do not count

        def last_step(*words, trainer=trainer, options=options, config=config):
            made = trainer(parse_config([config, *words], options))
            return made.total_steps if isinstance(made, Trainer) else made.stages[-1].end

        with caplog.at_level("INFO"):
            assert last_step("--max-steps", "50", "--epochs", "2") == before + 6
        assert f"epochs=2 end the run at step {before + 6}, before max_steps=50" in caplog.text
        assert last_step("--max-steps", "4", "--epochs", "2") == 4
        assert last_step("--max-steps", "5000") == 5000
        assert last_step("--max-steps", "none") == before + 3000
        assert last_step("--max-steps", "none", "--epochs", "1") == before + 3


def test_one_clip_trains(diffusion, vae, table, tmp_path, capsys):
    one = tmp_path / "one.csv"
    one.write_text("\n".join(Path(table).read_text().splitlines()[:2]))
    for trainer, options, config in ((Trainer, TrainOptions, diffusion), (VAETrainer, VaeTrainOptions, vae)):
        train(trainer, options, config, "--dataset.data-path", one, "--max-steps", 3, "--exp-name", options.__name__)
        notices = re.findall(r"WARNING \| .*fewer clips than a batch.*", capsys.readouterr().err)
        assert len(notices) == (2 if trainer is VAETrainer else 1), "one for each stage"
    with pytest.raises(UserError, match="epochs=1: that makes no optimizer step of accumulation_steps=2"):
        train(Trainer, TrainOptions, diffusion, "--dataset.data-path", one, "--epochs", 1, "--accumulation-steps", 2)


def test_resuming_says_what_and_from_which_step(diffusion, capsys):
    folder = train(Trainer, TrainOptions, diffusion, "--exp-name", "one", "--max-steps", 1)
    Trainer(parse_config([diffusion, "--load", "latest"], TrainOptions))
    checkpoint = next(folder.glob("epoch*-global_step1"))
    assert f"--load latest: resuming {checkpoint} after step 1" in capsys.readouterr().err


def test_resume_auto_starts_goes_on_and_ends(diffusion, tmp_path, capsys):
    """The same command again and again, as a queue gives it, until there is nothing left to do."""
    words = [diffusion, "--exp-name", "queued", "--resume", "auto"]
    train(Trainer, TrainOptions, diffusion, "--exp-name", "newer", "--max-steps", 1)
    seen, said = [], []
    for steps in (1, 2, 2, 3):
        command([*words, "--max-steps", str(steps)], TrainOptions, "opensora.training.diffusion.trainer:Trainer")
        out, err = capsys.readouterr()
        assert Path(out.strip()) == tmp_path / "outputs/queued"
        said += re.findall("no checkpoint yet|after step \\d|complete at step \\d", err)
        seen.append([path.name for path in list_checkpoints(Path(out.strip()))])
    assert seen[0] == ["epoch0-global_step1"]
    assert seen[1] == seen[2] == [*seen[0], "epoch0-global_step2"], "a complete run stays as it is"
    assert seen[3][-1].endswith("global_step3")
    assert said == ["no checkpoint yet", "after step 1", "after step 2", "complete at step 2", "after step 2"]
    with pytest.raises(UserError, match="--resume auto needs --exp-name"):
        Trainer(parse_config([diffusion, "--resume", "auto"], TrainOptions))
    with pytest.raises(UserError, match="--resume auto: .*queued/epoch1-global_step3 was trained .*: optim.lr"):
        Trainer(parse_config([*words, "--max-steps", "4", "--lr", "0.5"], TrainOptions))


def test_a_complete_run_ends_well_only_where_it_is_resumed(diffusion, vae, capsys):
    for config, options, place in (
        (diffusion, TrainOptions, "opensora.training.diffusion.trainer:Trainer"),
        (vae, VaeTrainOptions, "opensora.training.vae.trainer:VAETrainer"),
    ):
        words = [config, "--exp-name", place.rpartition(":")[2], "--max-steps", "3"]
        command(words, options, place)
        with pytest.raises(UserError, match="the checkpoint is at step 3, the run ends at 3"):
            command([*words, "--load", "latest"], options, place)
        capsys.readouterr()
        command([*words, "--resume", "auto"], options, place)
        assert "is complete at step 3: nothing is left to do" in capsys.readouterr().err


def test_resume_auto_begins_from_another_run(diffusion, tmp_path):
    """``--load`` says where a run begins, and once it has checkpoints of its own it goes on from these."""
    first = train(Trainer, TrainOptions, diffusion, "--exp-name", "first", "--max-steps", 1)
    words = ["--exp-name", "second", "--resume", "auto", "--load", first]
    assert Trainer(parse_config([diffusion, *map(str, words)], TrainOptions)).start.resume.parent == first
    second = train(Trainer, TrainOptions, diffusion, *words, "--max-steps", 2)
    assert Trainer(parse_config([diffusion, *map(str, words)], TrainOptions)).start.resume.parent == second


def test_the_latest_run_is_gone_on_with_only_as_it_was(diffusion, tmp_path, table):
    folder = train(Trainer, TrainOptions, diffusion, "--exp-name", "one", "--max-steps", 1)
    other = str(shutil.copy(table, tmp_path / "other.csv"))
    beside = os.path.relpath(table)
    for changed, named in (
        (["--dataset.data-path", other], f"dataset.data_path was {table}, is {other}"),
        (["--seed", "4"], "seed was 3, is 4"),
        (["--condition_config.i2v_head", "2"], "condition_config was"),
        (["--optim.betas", "0.9,0.99"], "optim.betas was"),
        (["--dropout_ratio.t5", "0.1"], "dropout_ratio.t5 was 0.3, is 0.1"),
    ):
        with pytest.raises(UserError, match=f"--load latest: .*one/epoch0-global_step1 .* other settings: {named}"):
            Trainer(parse_config([diffusion, "--load", "latest", *changed], TrainOptions))
        for told in (["--load", "latest", "--load-changed", "True"], ["--load", str(folder)]):
            Trainer(parse_config([diffusion, *told, *changed], TrainOptions))
    same = ["--dataset.data-path", beside, "--max-steps", "7", "--num_workers", "1", "--grad_checkpoint", "True"]
    Trainer(parse_config([diffusion, "--load", "latest", *same], TrainOptions))


def test_a_batch_size_without_effect_is_said(diffusion, caplog):
    parse_config([diffusion, "--batch-size", "4"], TrainOptions)
    assert "--batch-size has no effect: bucket_config holds" in caplog.text
    caplog.clear()
    assert parse_config([diffusion, "--batch-size", "4"], CacheOptions).batch_size == 4
    assert "no effect" not in caplog.text


def test_a_vae_does_not_go_on_from_another_model(vae, tmp_path):
    other = tmp_path / "outputs" / "other" / "epoch0-global_step1"
    save_safetensors({"img_in.weight": torch.zeros(1)}, other / "model" / "model.safetensors")
    (other / "running_states.json").write_text("{}")
    with pytest.raises(UserError, match=r"(?s)other/epoch0-global_step1/model.*do not fit.*not in the model: img_in"):
        train(VAETrainer, VaeTrainOptions, vae, "--load", other)
    assert len(list(tmp_path.glob("outputs/*"))) == 1


def test_frames_that_the_vae_cannot_take(vae, tmp_path, common, write_config):
    bad = write_config(
        tmp_path / "bad.py", {**common, "model": {"type": "hunyuan_vae"}, "bucket_config": {"32px": {8: (1.0, 2)}}}
    )
    with pytest.raises(UserError, match="8 frames .* use 5 or 9"):
        train(VAETrainer, VaeTrainOptions, bad)
