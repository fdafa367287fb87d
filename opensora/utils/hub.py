"""The hubs: what was released there, downloads from them, and uploads.

Ids are those of the Hugging Face hub; ``modelscope:org/name`` is one of ModelScope, for which its package has to be
installed. Without a network there are the files of their caches, or an error that comes soon.
"""

import re
from pathlib import Path
from typing import Any

from opensora.utils.errors import UserError, first_line
from opensora.utils.logging import get_logger
from opensora.utils.optional import check_module
from opensora.utils.progress import quiet_libraries
from opensora.utils.waiting import no_slow_hub, within

logger = get_logger(__name__)

TRY_SECONDS = 10.0
MODELSCOPE = "modelscope:"  # before an id of that hub
MODELSCOPE_HINT = "`pip install modelscope`"
REPO = re.compile(rf"({MODELSCOPE})?\w[\w.-]*/\w[\w.-]*")
CODE = "*.py"  # of a repository, which is never run from here
PRIVATE, PUBLIC = 1, 5  # how ModelScope calls who sees a repository
VIDEO_REPO = "hpcai-tech/Open-Sora-v2"
# released file or folder -> repository that has it, and its path there
RELEASED = {
    "Open_Sora_v2.safetensors": (VIDEO_REPO, "Open_Sora_v2.safetensors"),
    "hunyuan_vae.safetensors": (VIDEO_REPO, "hunyuan_vae.safetensors"),
    "flux1-dev.safetensors": (VIDEO_REPO, "flux1-dev.safetensors"),
    "flux1-dev-ae.safetensors": (VIDEO_REPO, "flux1-dev-ae.safetensors"),
    "t5-v1_1-xxl": (VIDEO_REPO, "google/t5-v1_1-xxl"),
    "clip-vit-large-patch14": (VIDEO_REPO, "openai/clip-vit-large-patch14"),
    "flux1-dev-fused-rope.safetensors": ("hpcai-tech/flux1-dev-fused-rope", "flux1-dev-fused-rope.safetensors"),
    "Open_Sora_v2_Video_DC_AE.safetensors": (f"{VIDEO_REPO}-Video-DC-AE", "Open_Sora_v2_Video_DC_AE.safetensors"),
    "F32T4C128_AE.safetensors": (f"{VIDEO_REPO}-Video-DC-AE", "F32T4C128_AE.safetensors"),
    "ae.safetensors": ("black-forest-labs/FLUX.1-dev", "ae.safetensors"),
}


def only_local(path: str | Path) -> bool:
    """The ``local_files_only`` of transformers' ``from_pretrained(path)``: true for folders, and without a network.

    Its library tries every request six times before it looks into its cache: half a minute for one file, minutes for
    a model.
    """
    return Path(path).is_dir() or not is_reachable()


def is_reachable() -> bool:
    """Whether the hub answers, asked once."""
    from huggingface_hub import constants, get_session

    try:
        within(TRY_SECONDS, lambda: get_session().head(constants.ENDPOINT, timeout=TRY_SECONDS))
    except Exception as error:  # no network, no name, a proxy, offline mode: the session decides on the kinds
        logger.info("%s cannot be reached (%s): using downloaded files only", constants.ENDPOINT, error)
        return False
    return True


def download_command(path: str | Path) -> str | None:
    """Command that downloads a released file or folder to ``path``, None if the name is not a released one."""
    path = Path(path)
    if path.name not in RELEASED:
        return None
    repo, inside = RELEASED[path.name]
    folder = path.parents[inside.count("/")] if len(path.parents) > inside.count("/") else Path()
    if Path(inside).suffix:
        return f"hf download {repo} {inside} --local-dir {folder}"
    return f'hf download {repo} --include "{inside}/*" --local-dir {folder}'


def is_repo(name: str) -> bool:
    """Whether a name looks like a repository of a hub, and is nothing in a folder here."""
    return REPO.fullmatch(name) is not None and not Path(name.split("/")[0]).exists()


def check_repo(name: str) -> None:
    """Raise a UserError unless a name is one that a repository can have."""
    if not isinstance(name, str) or REPO.fullmatch(name) is None:
        raise UserError(f"{name!r} is no id of a repository: expected org/name, or {MODELSCOPE}org/name")


def command_for(repo: str, inside: str = "", is_file: bool = False) -> str:
    """Command that downloads a repository, or a file or folder of it, into a folder of its name."""
    theirs = repo.removeprefix(MODELSCOPE)
    what = "" if not inside else f" {inside}" if is_file else f' --include "{inside}/*"'
    if theirs != repo:
        return f"modelscope download --model {theirs}{what} --local_dir {theirs}"
    return f"hf download {repo}{what} --local-dir {repo}"


def local_model(path: str) -> str:
    """A path or id for transformers: an id of ModelScope, which it does not know, as the folder of its download."""
    return str(snapshot(path)) if path.startswith(MODELSCOPE) else path


def snapshot(repo: str, cache_dir: str | None = None) -> Path:
    """The folder of a repository, all of it but code, downloaded first if need be.

    Raises:
        UserError: not there, or not to be had; names the command that downloads it.
    """
    logger.info("Looking for %s", repo)
    if repo.startswith(MODELSCOPE):
        return _from_modelscope(repo, ignore_patterns=[CODE], cache_dir=cache_dir)
    from huggingface_hub import snapshot_download

    offline = not is_reachable()
    try:
        with quiet_libraries(), no_slow_hub(not offline):
            found = snapshot_download(repo, ignore_patterns=[CODE], cache_dir=cache_dir, local_files_only=offline)
        return Path(found)
    except Exception as error:  # see download
        raise UserError(_refused(repo, error, offline)) from error


def commit(repo: str, cache_dir: str | None = None) -> str:
    """What identifies the content of a repository of the Hugging Face hub: its newest commit, or without a network
    that of its download.

    Raises:
        UserError: not there, or not to be had; names the command that downloads it.
    """
    from huggingface_hub import HfApi, snapshot_download

    offline = not is_reachable()
    try:
        if offline:
            return Path(snapshot_download(repo, cache_dir=cache_dir, local_files_only=True)).name
        with no_slow_hub():
            return str(HfApi().model_info(repo).sha)
    except Exception as error:  # see download
        raise UserError(_refused(repo, error, offline)) from error


def _refused(repo: str, error: Exception, offline: bool = False) -> str:
    """Why a repository could not be had."""
    hub = "ModelScope" if repo.startswith(MODELSCOPE) else "the Hugging Face hub"
    if offline:
        return f"{repo} was not downloaded before, and {hub} cannot be reached. Where it can: {command_for(repo)}"
    return f"{hub} did not give {repo.removeprefix(MODELSCOPE)} ({type(error).__name__}: {first_line(error)})"


def _from_modelscope(repo: str, file: str | None = None, **options: Any) -> Path:
    """A file of a repository of ModelScope, or its folder; from its cache where the hub does not answer.

    Raises:
        UserError: not there, or the package is not installed.
    """
    check_module("modelscope", repo, MODELSCOPE_HINT)
    from modelscope.hub.file_download import model_file_download
    from modelscope.hub.snapshot_download import snapshot_download

    theirs = repo.removeprefix(MODELSCOPE)

    def get(local_files_only: bool) -> Path:
        options["local_files_only"] = local_files_only
        return Path(model_file_download(theirs, file, **options) if file else snapshot_download(theirs, **options))

    try:
        return get(local_files_only=False)
    except Exception as error:  # no network, no such repository, no such file, no rights
        try:
            return get(local_files_only=True)
        except Exception:
            raise UserError(_refused(repo, error)) from error


def _download_modelscope(repo: str, inside: str, is_file: bool, cache_dir: str | None, only_look: bool) -> Path:
    if only_look:
        check_module("modelscope", repo, MODELSCOPE_HINT)
        from modelscope.hub.api import HubApi

        try:
            files = HubApi().get_model_files(repo.removeprefix(MODELSCOPE), recursive=True)
        except Exception:  # no network: what is in the cache will do
            files = None
        if files is not None:
            if any(f"{file['Path']}/".startswith(f"{inside}/") for file in files):
                return Path(inside)
            raise UserError(f"No weights at {repo}/{inside}: the repository has no {inside}")
    if is_file:
        return _from_modelscope(repo, inside, cache_dir=cache_dir)
    folder = _from_modelscope(repo, allow_patterns=[f"{inside}/*"], cache_dir=cache_dir) / inside
    if not folder.is_dir():
        raise UserError(f"No weights at {repo}/{inside}: the repository has no folder {inside}")
    return folder


def upload(folder: Path, repo: str, private: bool | None, token: str | None, message: str) -> str:
    """Send a folder to a repository, which is made if it is not there.

    Returns:
        Its address.

    Raises:
        UserError: the hub refuses, or its package is not installed.
    """
    theirs = repo.removeprefix(MODELSCOPE)
    try:
        if theirs == repo:
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            address = api.create_repo(repo, private=private, exist_ok=True)
            with quiet_libraries():
                api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message)
            return str(address)
        check_module("modelscope", repo, MODELSCOPE_HINT)
        from modelscope.hub.api import HubApi

        scope = HubApi(token=token)
        visibility = None if private is None else PRIVATE if private else PUBLIC
        scope.create_repo(theirs, token=token, visibility=visibility, exist_ok=True)
        scope.upload_folder(repo_id=theirs, folder_path=str(folder), commit_message=message, token=token)
        return f"{str(scope.endpoint).rstrip('/')}/models/{theirs}"
    except UserError:
        raise
    except Exception as error:  # no token, no rights, no network
        raise UserError(f"push_to_hub: {repo} was refused ({type(error).__name__}: {first_line(error)})") from error


def download(repo: str, inside: str, is_file: bool, cache_dir: str | None = None, only_look: bool = False) -> Path:
    """A file, or a folder, of a repository: where it is in the cache, downloaded first if need be.

    With ``only_look`` nothing is downloaded: the hub is asked whether it is there; the path is that in the repository.

    Raises:
        UserError: not there, or not to be had; without a network it names the command that downloads it.
    """
    if repo.startswith(MODELSCOPE):
        return _download_modelscope(repo, inside, is_file, cache_dir, only_look)
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    logger.info("Looking for %s in the Hugging Face repository %s", inside, repo)
    offline = not is_reachable()
    try:
        if only_look and not offline:
            with no_slow_hub():
                if not HfApi().get_paths_info(repo, [inside]):
                    raise FileNotFoundError(f"it has no {inside}")
            return Path(inside)
        with quiet_libraries(), no_slow_hub(not offline):
            if is_file:
                return Path(hf_hub_download(repo, inside, cache_dir=cache_dir, local_files_only=offline))
            wanted = f"{inside}/*"
            found = snapshot_download(repo, allow_patterns=wanted, cache_dir=cache_dir, local_files_only=offline)
        folder = Path(found) / inside
        if not folder.is_dir():
            raise FileNotFoundError(f"it has no folder {inside}")
        return folder
    except Exception as error:  # the library has a dozen kinds: offline, gated, no such repository, no such file, ...
        if offline:
            reason = (
                "it was not downloaded before, and the Hugging Face hub cannot be reached. Where it can, download it "
                f"with:\n  {command_for(repo, inside, is_file)}"
            )
        else:
            reason = (
                f"the Hugging Face repository {repo} did not give {inside} "
                f"({type(error).__name__}: {first_line(error)})."
            )
        raise UserError(f"No weights at {repo}/{inside}: there is no such local path, and {reason}") from error
