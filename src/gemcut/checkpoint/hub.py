"""From what a user types to a folder: a local path first, else a model on the Hugging Face Hub at a pinned commit."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemcut.errors import MissingError, UsageError

log = logging.getLogger(__name__)

_ID = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# other formats of the same weights, and pickles: never read, so never downloaded
_IGNORED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A folder to open. `name` is for records: a hub id or the folder's own name, never a path."""

    path: Path
    name: str
    revision: str | None  # the commit, for a model of the Hub
    source: Literal["folder", "hub"]


def resolve(ref: str) -> ResolvedModel:
    """Find a model: an existing folder, `org/name`, `org/name@revision`, or `hf://org/name@revision`.

    A folder wins over a Hub id of the same spelling unless `hf://` is written. HF_HOME, HF_TOKEN, HF_ENDPOINT and
    HF_HUB_OFFLINE are respected; without a network the local cache is used when it has the model.

    Raises:
        UsageError: neither a folder nor a Hub id, or the Hub has no such model or revision.
        MissingError: no network and not cached, or a gated model without a token.
    """
    if not ref.startswith("hf://"):
        folder = Path(ref).expanduser()
        if folder.is_dir():
            if _ID.fullmatch(ref):
                log.info("%s: the local folder of that name, not the Hub's model", ref)
            return ResolvedModel(folder, folder.resolve().name, None, "folder")
        if folder.exists():
            raise UsageError("a model is a folder, not a file", where=ref, hint="name the folder around it")
    match = _ID.fullmatch(ref)
    if match is None or ref.startswith((".", "/", "~")):
        raise UsageError(
            "there is no such model folder",
            where=ref,
            wanted="a folder, org/name, org/name@revision or hf://org/name@revision",
            hint="check the path, or try demo:dense or demo:moe",
        )
    return _from_hub(match["repo"], match["revision"])


def _from_hub(repo: str, revision: str | None) -> ResolvedModel:
    # imported here: it takes longer than everything a local folder needs
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP client's own
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"hf://{repo}" + (f"@{revision}" if revision else "")
    try:
        # A branch is resolved to its commit once, every file is taken from that commit, and the cache remembers
        # the branch for the next run without a network.
        folder = Path(snapshot_download(repo, revision=revision, ignore_patterns=_IGNORED))
    except GatedRepoError:
        raise MissingError(
            "the model is gated", where=where, hint=f"accept its licence at {constants.ENDPOINT}/{repo}, set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UsageError("the model has no such revision", where=where) from None
    except RepositoryNotFoundError:
        raise UsageError(
            "the Hub has no such model, or it is private", where=where, hint="check the name, or set HF_TOKEN"
        ) from None
    except HFValidationError as error:
        raise UsageError(f"not a Hub id: {str(error).splitlines()[0]}", where=where) from None
    except LocalEntryNotFoundError:
        raise MissingError(
            "the model is not in the local cache, and the Hub cannot be reached"
            + (" (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""),
            where=where,
            hint="download it where there is a network, and name the folder",
        ) from None
    except HTTPError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MissingError(f"the Hub answered with an error: {reason}", where=where) from None
    log.info("%s is the Hub's %s at commit %s", where, repo, folder.name)
    return ResolvedModel(folder, repo, folder.name, "hub")
