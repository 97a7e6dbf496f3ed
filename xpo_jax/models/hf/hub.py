"""Locate a model: "embedded", a folder, or a hub name, "owner/name" or "owner/name@revision".

Only the files that make up a model here are fetched from the hub: JSON, safetensors, tokenizer files and the licence.
Pickled weights and code are not even fetched. A revision (branch, tag or commit; "main" by default) is resolved to a
commit before anything is fetched, and the run records that commit.

huggingface_hub does the work, with its cache (HF_HOME), its locks, so that several processes may fetch the same model,
and its token (HF_TOKEN), which nothing here reads. Messages name the kind of a failure and never quote those of
huggingface_hub, which contain addresses that may be signed.

Left out on purpose: other hubs, uploads, and files outside the cache.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from xpo_jax.io.user_paths import expand
from xpo_jax.models.hf.tensors import LICENCES, model_folder

# vocab.json comes with *.json, and an export that carries it without merges.txt would be half a tokenizer.
FETCHED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", *LICENCES)
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?", re.ASCII)


class Model(NamedTuple):
    """A model that was located.

    given: its name or path as the config states it.
    folder: contains its files.
    commit: on the hub, 40 hex digits; None for a folder.
    note: how it was located, for people; empty for a folder.
    """

    given: str
    folder: Path
    commit: str | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The name for publication: the hub's without a revision, or the last part of a folder's path."""
        return self.given.partition("@")[0] if self.commit else Path(self.given).absolute().name

    @property
    def described(self) -> str:
        """The text for the start-up summary."""
        return f"{self.given} ({self.note})" if self.note else self.given


def find(given: str) -> Model:
    """Locate a model by name, and fetch what the local cache lacks.

    Args:
      given: "embedded", a folder (which comes first), "owner/name" or "owner/name@revision".

    Raises:
      ValueError: no such folder or model, or it cannot be fetched; one line with the remedy.
    """
    given = expand(given)
    if given == "embedded" or Path(given).is_dir() or not _NAME.fullmatch(given):
        return Model(given, model_folder(given))
    from huggingface_hub import HfApi, errors, snapshot_download  # takes half a second

    name, _, stated = given.partition("@")
    revision = stated or "main"

    def files(*, local_files_only: bool) -> Path:
        """Return the cache's folder of the revision, which is named after its commit."""
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
    except Exception as error:  # the errors of its HTTP library are not part of its interface
        _raise_if_refused(given, error)
        try:
            folder = files(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise ValueError(
                f"{given}: no such folder, the hub was not reached ({_reason(error)}), and the local cache does not"
                f" hold the complete model; on a machine with network access run `hf download {name} --revision"
                f" {revision}` and copy its cache here (HF_HOME names it), or give a local folder"
            ) from error
        note = f"commit {folder.name}, from the local cache: the hub was not reached ({_reason(error)})"
        return Model(given, folder, folder.name, note)

    print(f"{name}: commit {commit}; fetching what the local cache lacks ...", file=sys.stderr, flush=True)
    try:
        folder = files(local_files_only=False)
    except Exception as error:
        _raise_if_refused(given, error)
        raise ValueError(
            f"{given}: fetching commit {commit} stopped ({_reason(error)}); run the same command again to resume;"
            " if the disk is full, set HF_HOME to a folder on a larger one"
        ) from error
    if folder.name != commit:
        raise ValueError(f"{given}: {revision} moved to another commit meanwhile; run the same command again")
    return Model(given, folder, commit, f"commit {commit}")


def _raise_if_refused(given: str, error: Exception) -> None:
    """Raise ValueError if the hub answered that this model is not available."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        problem = (
            "its terms must be accepted first; do so on its page, set HF_TOKEN to a token of that account"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        problem = (
            "no such folder, and the hub has no such model or it is private; check the name, set HF_TOKEN to a token"
            " that may read it"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        problem = "the model has no such revision; name a branch, a tag or a commit after the @"
    elif isinstance(error, errors.HFValidationError):
        problem = "no such folder, and not a valid name of a model; check it"
    elif status in (401, 403):
        problem = f"the hub refused access (status {status}); set HF_TOKEN to a valid token or unset it"
    else:
        return
    raise ValueError(f"{given}: {problem}, or give a local folder") from error


def _reason(error: BaseException) -> str:
    """Describe the kind of a failure, without any address, path or key."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the error itself only reports that there was an earlier one
    response = getattr(error, "response", None)
    if response is not None:
        return f"status {response.status_code}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return getattr(error, "strerror", None) or type(error).__name__
