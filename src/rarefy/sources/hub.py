"""Models on the hub, through huggingface_hub and its cache: weights as safetensors and small text files only."""

from __future__ import annotations

import re
from pathlib import Path

from rarefy.core.errors import SourceError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
ALLOWED = [
    "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*",
]
# Second copies of the weights under other names.
SKIPPED = ["*/*.safetensors", "consolidated*.safetensors"]


def download(repo: str, revision: str | None = None) -> Path:
    """The folder of hub model ``repo`` (``org/name``) at ``revision`` (branch, tag or commit; the main branch when
    None) in the hub's own cache, downloaded where needed; without a network the cached copy serves.

    Raises SourceError: no such model or revision, gated or private, no network and nothing cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=ALLOWED, ignore_patterns=SKIPPED))
    except HFValidationError:
        raise SourceError(f"'{repo}' is not a hub id; write 'org/name', or name a folder or a .gguf file.") from None
    except Exception as failure:  # the hub's client lets several libraries' errors through
        raise SourceError(_explain(failure, repo, revision)) from failure


def _explain(failure: BaseException, repo: str, revision: str | None) -> str:
    from huggingface_hub import errors

    chain = [failure]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(error, kinds) for error in chain)

    if has(errors.GatedRepoError):
        return f"'{repo}' is gated; accept its terms on its hub page, then run 'hf auth login' or set HF_TOKEN."
    if has(errors.RevisionNotFoundError):
        return f"'{repo}' has no revision '{revision}'; name a branch, a tag or a commit of it."
    if has(errors.DisabledRepoError):
        return f"'{repo}' has been disabled by its authors or the hub; use another model."
    if has(errors.RepositoryNotFoundError):
        return (
            f"'{repo}' is neither a folder here nor a public model on the hub; check the spelling, or run "
            "'hf auth login' if it is private."
        )
    if has(errors.OfflineModeIsEnabled):
        return (
            f"'{repo}' is not (wholly) in the hub's cache and offline mode is on; unset HF_HUB_OFFLINE, or name a "
            "local folder."
        )
    answers = [error.response.status_code for error in chain if isinstance(error, errors.HfHubHTTPError)]
    if answers:
        return f"The hub answered {answers[0]} to the request for '{repo}'; try again later, or name a local folder."
    if has(errors.LocalEntryNotFoundError, ConnectionError) or any(_is_network(error) for error in chain):
        return f"The hub cannot be reached and '{repo}' is not in its cache; check the network, or name a local folder."
    reason = (str(failure).strip() or type(failure).__name__).splitlines()[0].rstrip(".")
    return f"'{repo}' could not be downloaded ({reason}); try again, or name a local folder."


def _is_network(error: BaseException) -> bool:
    # The client speaks through httpx, httpx2 or requests, depending on its release.
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests")
