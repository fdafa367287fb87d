"""The Hugging Face hub: what was released there, and downloads from it.

Without a network there are the files of its cache, or an error that comes soon.
"""

from pathlib import Path

from opensora.utils.errors import UserError, first_line
from opensora.utils.logging import get_logger
from opensora.utils.progress import quiet_libraries

logger = get_logger(__name__)

TRY_SECONDS = 10.0
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
        get_session().head(constants.ENDPOINT, timeout=TRY_SECONDS)
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


def download(repo: str, inside: str, is_file: bool, cache_dir: str | None = None, only_look: bool = False) -> Path:
    """A file, or a folder, of a repository: where it is in the cache, downloaded first if need be.

    With ``only_look`` nothing is downloaded: the hub is asked whether it is there; the path is that in the repository.

    Raises:
        UserError: not there, or not to be had; without a network it names the command that downloads it.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    logger.info("Looking for %s in the Hugging Face repository %s", inside, repo)
    offline = not is_reachable()
    try:
        if only_look and not offline:
            if not HfApi().get_paths_info(repo, [inside]):
                raise FileNotFoundError(f"it has no {inside}")
            return Path(inside)
        with quiet_libraries():
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
            what = inside if is_file else f'--include "{inside}/*"'
            reason = (
                "it was not downloaded before, and the Hugging Face hub cannot be reached. Where it can, download it "
                f"with:\n  hf download {repo} {what} --local-dir {repo}"
            )
        else:
            reason = (
                f"the Hugging Face repository {repo} did not give {inside} "
                f"({type(error).__name__}: {first_line(error)})."
            )
        raise UserError(f"No weights at {repo}/{inside}: there is no such local path, and {reason}") from error
