"""The Dockerfiles and the compose file fit the checkout and each other; none of this needs Docker."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from opensora.config import parse_config
from opensora.config.commands import ServeOptions
from opensora.utils.errors import UserError
from tools.containers.dockerfile import health_command, last, read_dockerfile, variables
from tools.containers.try_steps import Trial

ROOT = Path(__file__).parents[3]
FILES = ("Dockerfile", "Dockerfile.cuda")


def kept_in_the_context() -> set[str]:
    """Names that .dockerignore, which leaves out everything, takes in again."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return {line[1:] for line in lines if line.startswith("!")}


@pytest.fixture(params=FILES)
def instructions(request):
    return read_dockerfile(ROOT / request.param)


def command(instructions) -> ServeOptions:
    """What the image runs, read by the command itself."""
    assert last(instructions, "ENTRYPOINT").words == ["opensora"]
    name, *words = last(instructions, "CMD").words
    assert name == "serve"
    return parse_config(words, ServeOptions)


def test_what_is_copied_is_there(instructions):
    copied = {source for each in instructions if each.name == "COPY" for source in each.words[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert copied == kept_in_the_context()
    setup = (ROOT / "setup.py").read_text()
    assert re.search(r'FOLDERS = \("configs", "assets"\)', setup), "what setup.py packs has to be copied"


def test_layers_are_in_the_order_in_which_they_change(instructions):
    texts = [f"{each.name} {each.text}" for each in instructions]
    order = [
        "RUN pip install --index-url",
        "COPY requirements",
        "RUN pip install -r",
        "COPY opensora",
        "RUN pip install --no-deps .",
    ]
    places = [next(i for i, text in enumerate(texts) if text.startswith(start)) for start in order]
    assert places == sorted(places)
    before: set[str] = set()
    for each in instructions:
        if each.name == "COPY":
            before |= set(each.words[:-1])
        assert set(re.findall(r"-r (\S+)", each.text if each.name == "RUN" else "")) <= before


def test_the_same_torch_as_everywhere(instructions):
    pinned = re.search(r"^torch==\S+$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]
    assert any(each.name == "RUN" and each.text.endswith(pinned) for each in instructions)


def test_no_root_no_weights_and_a_health_check(instructions):
    names = [each.name for each in instructions]
    assert last(instructions, "USER").text not in ("root", "0")
    assert "RUN" not in names[names.index("USER") :], "what comes after has no rights to install"
    assert not any("hf download" in each.text or "ckpts" in each.text for each in instructions)
    cfg = command(instructions)
    assert last(instructions, "EXPOSE").text == str(cfg.port)
    assert f"http://127.0.0.1:{cfg.port}/health" in health_command(instructions)[-1]
    assert cfg.host == "0.0.0.0"
    assert Path(cfg.data_dir).is_relative_to(last(instructions, "VOLUME").text)


def test_the_two_differ_in_torch_and_model_only():
    cpu, cuda = (read_dockerfile(ROOT / name) for name in FILES)
    assert dict(variables(cpu, {}))["TORCH_INDEX"].endswith("/cpu")
    different = {each.name for each in {*cpu} ^ {*cuda}}
    assert different == {"ENV", "RUN", "ARG", "HEALTHCHECK", "CMD"}
    assert [each for each in cuda if each.name == "COPY"] == [each for each in cpu if each.name == "COPY"]


def test_compose_fits_the_images():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    for service in compose["services"].values():
        build = service["build"]
        name = build.get("dockerfile", "Dockerfile") if isinstance(build, dict) else "Dockerfile"
        instructions = read_dockerfile(ROOT / name)
        cfg = command(instructions)
        assert service["ports"] == [f"127.0.0.1:8000:{cfg.port}"], "reached from this machine only"
        mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
        assert mounts.pop("results") == last(instructions, "VOLUME").text
        assert set(mounts.values()) <= {f"{last(instructions, 'WORKDIR').text}/ckpts"}, (
            "where the config looks for weights"
        )
        assert [f"/run/secrets/{secret}" for secret in service["secrets"]] == [cfg.api_key_file]
    assert set(compose["volumes"]) == {"results"}
    assert compose["secrets"]["api_key"]["file"].removeprefix(".") in (ROOT / ".gitignore").read_text().splitlines()


def test_reading(tmp_path):
    file = tmp_path / "Dockerfile"
    file.write_text('# x\nFROM a\nARG B=1\nENV C="2 3"\nRUN d \\\n    && e  # no comment\nCMD ["f", "g h"]\n')
    read = read_dockerfile(file)
    assert [each.name for each in read] == ["FROM", "ARG", "ENV", "RUN", "CMD"]
    assert read[3].text == "d && e  # no comment"
    assert read[4].words == ["f", "g h"]
    assert dict(variables(read, {"B": "7", "C": "8"})) == {"B": "7", "C": "2 3"}
    file.write_text("FROM a\nADD b c\n")
    with pytest.raises(UserError, match="ADD is not an instruction that is known here"):
        read_dockerfile(file)


def test_following_one(tmp_path, monkeypatch, capfd):
    """COPY, RUN, command and health check, of an image that needs nothing."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "server.py").write_text("import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)")
    (tmp_path / "Dockerfile").write_text(
        'FROM scratch\nARG WORD=a\nCOPY code code\nRUN useradd x\nRUN echo "$WORD" > said.txt\n'
        f'HEALTHCHECK CMD ["test", "-e", "{tmp_path}/trial/data/healthy"]\n'
        f'ENTRYPOINT ["{sys.executable}"]\nCMD ["/app/code/server.py", "/data/healthy"]\n'
    )
    monkeypatch.setattr("tools.containers.try_steps.venv.create", lambda *_, **__: None)
    trial = Trial(tmp_path / "Dockerfile", tmp_path / "trial", {"WORD": "b"})
    trial.build()
    assert trial.serve() < 300
    assert (trial.app / "said.txt").read_text() == "b\n"
    assert "left out, it needs root: RUN useradd x" in capfd.readouterr().out
    (tmp_path / "Dockerfile").write_text("FROM scratch\nRUN exit 3\n")
    with pytest.raises(UserError, match="RUN exit 3: ended with status 3"):
        Trial(tmp_path / "Dockerfile", tmp_path / "again", {}).build()
