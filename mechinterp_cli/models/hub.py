"""Hugging Face ids: from an id and a revision to a folder in Hugging Face's own cache.

`HF_HOME` and `HF_HUB_OFFLINE` are honoured because huggingface_hub does the work.
"""

import re
import sys
from importlib import import_module
from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.quiet import quiet

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# Sub-folders hold other formats; `consolidated` files hold the same weights a second time.
_IGNORED = ["*/*", "consolidated*", "original*"]
# Under this name stands the base error of whichever HTTP library huggingface_hub uses.
_HTTP_ERROR: type[Exception] = vars(import_module("huggingface_hub.errors"))["HTTPError"]
_DOWNLOAD_ERRORS = (_HTTP_ERROR, HFValidationError, RevisionResolutionError, XetDownloadError, OSError)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def download(options: ModelOptions, *, tried: str) -> Path:
    """Download what is needed of a Hugging Face model, or find it in the cache.

    Args:
        options: The model section; `id` is the repository, `revision` a branch, tag or commit.
        tried: What else the id was tried as, for the error.

    Returns:
        The snapshot's folder, named after the commit.

    Raises:
        UserError: The id does not exist, is gated, has no safetensors, or the hub cannot be reached and the
            cache lacks it; or remote code was asked for without a commit.
    """
    if options.trust_remote_code and not _COMMIT.fullmatch(options.revision or ""):
        raise UserError(
            f"model.revision: {options.revision!r} is not a 40-digit commit, which model.trust_remote_code asks for",
            f"Look up the commit you have read the code of and set model.revision to it ({options.id}).",
        )
    patterns = list(_FILES)
    patterns += ["pytorch_model*.bin"] if options.allow_pickle else []
    patterns += ["*.py"] if options.trust_remote_code else []
    try:
        with quiet(bars=sys.stderr.isatty()):
            folder = snapshot_download(
                options.id, revision=options.revision, allow_patterns=patterns, ignore_patterns=_IGNORED
            )
    except _DOWNLOAD_ERRORS as error:
        raise _explain(error, options, tried) from error
    if not options.allow_pickle and not any(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"model.id: {options.id} has no safetensors weights in {folder} (pickle and GGUF are not downloaded)",
            "Set model.allow_pickle: true if it has pickle weights, or download its GGUF file and give that path.",
        )
    return Path(folder)


def _explain(error: Exception, options: ModelOptions, tried: str) -> UserError:
    where = f"model.id: {options.id!r}"
    if isinstance(error, GatedRepoError):
        return UserError(f"{where} is gated on Hugging Face", "Ask for access on its page, then run: hf auth login")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"model.revision: {options.revision!r} does not exist in {options.id}", "Correct it.")
    remedy = "Names that need no download: see `mechinterp models`. For a folder, give its path."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return UserError(f"{where} is not {tried}, and Hugging Face has no model of that name", remedy)
    if isinstance(error, LocalEntryNotFoundError):
        return UserError(
            f"{where} is not {tried}, it is not in the local Hugging Face cache, and {_unreachable()}",
            f"Correct the id. {remedy}",
        )
    return UserError(f"{where} is not {tried}, and Hugging Face answered: {_first_line(error)}", remedy)


def _unreachable() -> str:
    return "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
