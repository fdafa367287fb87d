"""The Hugging Face hub, and what it gives without a network: files of its cache, or an error that comes soon."""

from opensora.utils.logging import get_logger

logger = get_logger(__name__)

TRY_SECONDS = 10.0


def is_reachable() -> bool:
    """Whether the hub answers, asked once.

    Its library tries every request six times before it looks into its cache: half a minute for one file, minutes for
    a model of transformers. Where this says no, give that library ``local_files_only=True``.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TRY_SECONDS)
    except Exception as error:  # no network, no name, a proxy, offline mode: the session decides on the kinds
        logger.info("%s cannot be reached (%s): using downloaded files only", constants.ENDPOINT, error)
        return False
    return True
