"""Where a model is: "embedded", a folder, or a hub name, "owner/name" or "owner/name@revision".

From the hub come only the files that a model is made of here: JSON, safetensors, tokenizer texts and the
licence. Pickled weights and code are not even fetched. A revision (branch, tag or commit, "main" if there is
none) is resolved to a commit before anything is fetched, and that commit is what a run records.

huggingface_hub does the work: its cache (HF_HOME), its locks, so that processes may fetch the same model at
once, its token (HF_TOKEN), which nothing here reads. Messages name the kind of a failure and never quote
huggingface_hub's own, which hold addresses that may be signed.

Left out on purpose: other hubs, uploads, and files anywhere else than in the cache.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from xpo_jax.models.hf.tensors import LICENCES, model_folder

# vocab.json comes with *.json, and an export that carries it without merges.txt would be half a tokenizer.
FETCHED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", *LICENCES)
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?", re.ASCII)


class Model(NamedTuple):
    """A model that was found.

    given: what was asked for, as a config has it.
    folder: where its files are.
    commit: on the hub, 40 hex digits; None for a folder.
    note: how it was found, for people; empty for a folder.
    """

    given: str
    folder: Path
    commit: str | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """For the public: the hub's name without a revision, or the last part of a folder's path."""
        return self.given.partition("@")[0] if self.commit else Path(self.given).absolute().name

    @property
    def described(self) -> str:
        """For the start-up summary."""
        return f"{self.given} ({self.note})" if self.note else self.given


def find(given: str) -> Model:
    """The model of this name; fetches what is not in the local cache.

    Args:
      given: "embedded", a folder (which comes first), "owner/name" or "owner/name@revision".

    Raises:
      ValueError: no such folder or model, or it cannot be had; one line with the remedy.
    """
    if given == "embedded" or Path(given).is_dir() or not _NAME.fullmatch(given):
        return Model(given, model_folder(given))
    from huggingface_hub import HfApi, errors, snapshot_download  # takes half a second

    name, _, stated = given.partition("@")
    revision = stated or "main"

    def files(*, local_files_only: bool) -> Path:
        """The folder of the cache that holds the revision; it is named after its commit."""
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(FETCHED),
                ignore_patterns=["*/*"],
                local_files_only=local_files_only,
            )
        )

    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except Exception as error:  # its HTTP library's errors are not part of its interface
        _raise_if_refused(given, error)
        try:
            folder = files(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise ValueError(
                f"{given}: no such folder, the hub was not reached ({_reason(error)}), and the local cache does not"
                f" hold this model whole; where there is network, run `hf download {name} --revision {revision}` and"
                " bring the cache here (HF_HOME names it), or give a local folder"
            ) from error
        note = f"commit {folder.name}, from the local cache: the hub was not reached ({_reason(error)})"
        return Model(given, folder, folder.name, note)

    print(f"{name}: commit {commit}; fetching what the local cache lacks ...", file=sys.stderr, flush=True)
    try:
        folder = files(local_files_only=False)
    except Exception as error:
        _raise_if_refused(given, error)
        raise ValueError(
            f"{given}: fetching commit {commit} stopped ({_reason(error)}); run the same command again, it goes on"
            " from there; where the disk is full, set HF_HOME to a folder on a larger one"
        ) from error
    if folder.name != commit:
        raise ValueError(f"{given}: {revision} moved on while it was fetched; run the same command again")
    return Model(given, folder, commit, f"commit {commit}")


def _raise_if_refused(given: str, error: Exception) -> None:
    """Raise ValueError if the hub has answered that this model is not to be had."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        told = "its terms must be accepted first; do so on its page, set HF_TOKEN to a token of that account"
    elif isinstance(error, errors.RepositoryNotFoundError):
        told = (
            "no such folder, and the hub has no such model or shows it only to some; check the name, set HF_TOKEN"
            " to a token that may read it"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        told = "the model has no such revision; name a branch, a tag or a commit after the @"
    elif isinstance(error, errors.HFValidationError):
        told = "no such folder, and no possible name of a model; check it"
    elif status in (401, 403):
        told = f"the hub refused the access (status {status}); set HF_TOKEN to a valid token or unset it"
    else:
        return
    raise ValueError(f"{given}: {told}, or give a local folder") from error


def _reason(error: BaseException) -> str:
    """What kind of failure it was, in words that hold no address, path or key."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it only says that something went wrong before
    response = getattr(error, "response", None)
    if response is not None:
        return f"status {response.status_code}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return getattr(error, "strerror", None) or type(error).__name__
