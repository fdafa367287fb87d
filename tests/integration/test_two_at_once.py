"""Two of a command at the same moment, and files that others put where a command writes."""

import json
import time
from pathlib import Path

import pytest

from opensora.config import load_config
from opensora.config.commands import TrainOptions
from opensora.diffusion.pipeline import VideoPipeline
from opensora.training.checkpoint.folder import list_checkpoints
from opensora.training.diffusion.trainer import Trainer
from opensora.utils.claims import FOLDER_LOCK, NameClaims, TakenError, claimed
from opensora.utils.errors import UserError
from tests.helpers.cli import INFERENCE, files, write_csv
from tests.helpers.forks import Program
from tests.parallel.checks_training import tiny_run

ROOT = Path(__file__).parents[2]


def test_two_prompts_into_one_folder(tiny_config_file, tmp_path):
    """Each gets a number of its own, however close together they come."""
    words = [tiny_config_file, "--num_steps", "1", "--save-dir", tmp_path / "out", "--prompt"]
    programs = [Program(INFERENCE, *words, prompt, folder=tmp_path) for prompt in ("a cat", "a dog")]
    for program in programs:
        assert program.ended() == 0, program.said
        assert "saved " in program.printed
    folder = tmp_path / "out" / "video_32px"
    stems = ("prompt_0000", "prompt_0001")
    assert files(folder) == sorted(f"{stem}{end}" for stem in stems for end in (".json", ".mp4", ".txt"))
    records = [json.loads((folder / f"{stem}.json").read_text()) for stem in stems]
    assert {record["prompt"] for record in records} == {"a cat", "a dog"}
    for record, stem in zip(records, stems):
        assert (folder / f"{stem}.txt").read_text() == record["text"]


@pytest.fixture
def being_made():
    """Claims names in the folder of samples as another process does."""
    held = []

    def claim(*names):
        folder = Path("samples/video_32px")
        with claimed(folder):
            held.append(NameClaims(folder).take(names))

    yield claim
    for one in held:
        one.release()


def test_a_table_that_another_process_works_on(run_tiny, being_made):
    being_made("t_0000")
    table = write_csv("t.csv", {"text": "a"}, {"text": "b"})
    words = ["--dataset.data-path", table, "--num_steps", "1"]
    with pytest.raises(TakenError, match=r"t_0000 is being made by process \d+ on .*--wait True"):
        run_tiny(*words)
    with pytest.raises(TakenError):
        run_tiny(*words, "--overwrite", "True")
    made = run_tiny(*words, "--skip-existing", "True")
    assert [name for name in made if name.endswith(".mp4")] == ["samples/video_32px/t_0001.mp4"]


def test_numbers_that_others_make_are_not_taken(run_tiny, being_made):
    being_made("prompt_0000", "prompt_0001")
    assert "samples/video_32px/prompt_0002.mp4" in run_tiny("--prompt", "a", "--num_steps", "1")


def test_leftovers_of_a_killed_run_go(run_tiny):
    folder = Path("samples/video_32px")
    folder.mkdir(parents=True)
    (folder / ".unfinished-abc.mp4").touch()
    (folder / ".opensora-host-1-1.names").write_text('{"pid": 1}')
    made = run_tiny("--prompt", "a", "--num_steps", "1")
    assert not [name for name in made if Path(name).name.startswith(".")]


@pytest.mark.parametrize("ending", [".txt", ".json"])
def test_notes_of_the_users_stay(run_tiny, ending):
    folder = Path("samples/video_32px")
    folder.mkdir(parents=True)
    for stem in ("prompt_0000", "t_0000"):
        (folder / f"{stem}{ending}").write_text("mine")
    run_tiny("--prompt", "a", "--num_steps", "1")
    assert (folder / "prompt_0001.mp4").is_file()
    words = ["--dataset.data-path", write_csv("t.csv", {"text": "a"}), "--num_steps", "1"]
    for more, message in (((), "is there already"), (("--skip-existing", "True"), "is not of this program")):
        with pytest.raises(UserError, match=message):
            run_tiny(*words, *more)
    assert [(folder / f"{stem}{ending}").read_text() for stem in ("prompt_0000", "t_0000")] == ["mine"] * 2


@pytest.mark.parametrize("names", [("n", "n_1"), ("n_1", "n")])
def test_names_that_meet_in_repetitions(run_tiny, names):
    table = write_csv("t.csv", *({"text": "a", "name": name} for name in names))
    words = ["--dataset.data-path", table, "--num_steps", "1"]
    with pytest.raises(UserError, match=r"row 3: .*n_1',? as .*row 2"):
        run_tiny(*words, "--num-sample", "2")
    assert sum(name.endswith(".mp4") for name in run_tiny(*words)) == 2


@pytest.mark.parametrize("name", [".", "..", "x" * 300, "é" * 200])
def test_names_stay_in_the_folder(run_tiny, name):
    table = write_csv("t.csv", {"text": "a", "name": name})
    made = run_tiny("--dataset.data-path", table, "--num_steps", "1", "--num-sample", "2", "--save-latents", "True")
    videos = [path for path in made if path.endswith(".mp4")]
    assert len(videos) == 2
    assert {str(Path(path).parent) for path in videos} == {"samples/video_32px"}


def test_what_nobody_foresaw_names_the_row(run_tiny, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("nobody foresaw it")

    monkeypatch.setattr(VideoPipeline, "make", fail)
    table = write_csv("t.csv", {"text": "a"})
    with pytest.raises(ZeroDivisionError) as raised:
        run_tiny("--dataset.data-path", table)
    assert raised.value.opensora_doing == ("t.csv, row 2",)
    assert not Path("samples").exists(), "no folder is left without a sample"


def test_two_runs_into_one_experiment(tmp_path):
    """The second is told who is there, or waits; nothing of the first is touched."""
    config = tiny_run(tmp_path, max_steps=100_000, log_every=1)
    folder = tmp_path / "run"
    script = ROOT / "scripts/diffusion/train.py"
    first = Program(script, config, "--exp-name", "run", folder=tmp_path)
    while not (folder / "log.txt").is_file():
        assert first.process.is_alive(), first.said
        time.sleep(0.05)
    second = Program(script, config, "--exp-name", "run", "--max_steps", "1", folder=tmp_path)
    status = second.ended()
    first.kill()
    assert status == 2
    assert f"{folder} is in use by process {first.pid} on " in second.said.splitlines()[-1]
    assert "--wait True" in second.said.splitlines()[-1]
    assert (folder / FOLDER_LOCK).is_file()
    Trainer(load_config(config, TrainOptions, {"exp_name": "run", "max_steps": 1})).run()
    assert len(list_checkpoints(folder)) == 1
    assert not list(folder.glob(".*"))
    assert "100000" in (folder / "config_to_step0.txt").read_text()


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    config = load_config(tiny_run(tmp_path), TrainOptions, {"exp_name": "run"})
    trainer = Trainer(config)
    trainer._model = lambda start: (_ for _ in ()).throw(UserError("no weights"))
    with pytest.raises(UserError, match="no weights"):
        trainer.run()
    assert not (tmp_path / "run").exists()
