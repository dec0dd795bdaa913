"""Pushes an exported folder to the hub as a repository: private unless asked otherwise.

The repository is opened before the export is written: a token without rights or a name that is
taken is said in a second, not after minutes of merging.
"""

import dataclasses
import os
import shlex
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from internvl.errors import ExportError
from internvl.files import first_line

_TOKENS = "https://huggingface.co/settings/tokens"
_NEW_TOKEN = f"make one that may write at {_TOKENS}, then `hf auth login` or set HF_TOKEN"
_EMPTY = {".gitattributes"}
"""Files of a repository that nothing was pushed to; a README.md is somebody's."""


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of the hub that may be written to."""

    id: str
    """With its owner: owner/name."""
    api: HfApi
    is_new: bool
    """Nothing was ever pushed to it."""

    @property
    def address(self) -> str:
        """Web address of its page."""
        return f"{self.api.endpoint}/{self.id}"


def open_repository(
    repo_id: str,
    *,
    public: bool = False,
    update: bool = False,
    api: HfApi | None = None,
) -> Repository:
    """Creates a repository of the hub, or opens one that is there.

    Args:
        repo_id: owner/name, or a name alone for the owner of the token.
        public: whether everybody may read a new one.
        update: whether files of an earlier push may be replaced.
        api: the hub; by default that of HF_ENDPOINT, with the token of HF_TOKEN or `hf auth login`.

    Raises:
        ExportError: no or a wrong token, no right to write, a name that is taken, or no network.
    """
    api = api or HfApi()
    # Before anything is sent: an id that the hub cannot have would come back as its own words.
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(f"--push {repo_id}: no hub id ({first_line(error)})") from None
    if not (get_token() if api.token is None else api.token):
        raise ExportError(f"--push {repo_id}: there is no token of the hub; {_NEW_TOKEN}")
    try:
        # In this order: creation alone says whether the token may write to this owner.
        repo_id = _with_owner(repo_id, api)
        return _create(repo_id, api, public=public, update=update)
    except HfHubHTTPError as error:
        raise ExportError(_refusal(repo_id, error)) from error
    except OfflineModeIsEnabled:
        raise ExportError(
            f"--push {repo_id}: HF_HUB_OFFLINE is set, so nothing is sent; unset it"
        ) from None
    except httpx.HTTPError as error:
        raise ExportError(
            f"--push {repo_id}: {api.endpoint} cannot be reached ({first_line(error)}); check the "
            "network and the proxy, or export without --push"
        ) from error


def send(repository: Repository, folder: Path, message: str) -> str:
    """Uploads a folder as the whole content of a repository; returns the address of its page.

    Files of earlier pushes stay in the repository's history.

    Raises:
        ExportError: the upload broke off; names the command that goes on.
    """
    # Shards of an earlier push would be weights that no index names.
    deleted = None if repository.is_new else "*"
    try:
        repository.api.upload_folder(
            repo_id=repository.id,
            folder_path=folder,
            commit_message=message,
            delete_patterns=deleted,
        )
    # Its threads raise what they met: of the network, of a file, of the store of large files.
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        command = ["hf", "upload", repository.id, str(folder)]
        command += ["--delete", deleted] if deleted else []
        raise ExportError(
            f"{folder} is complete, but its upload to {repository.id} broke off "
            f"({first_line(error)}); `{shlex.join(command)}` goes on"
        ) from error
    return repository.address


def _with_owner(repo_id: str, api: HfApi) -> str:
    """Returns an id with its owner. Raises ExportError for a token that may only read."""
    account = api.whoami()
    token = account.get("auth", {}).get("accessToken", {})
    # A fine-grained token has a role of its own; creation shows what it may do.
    if token.get("role") == "read":
        name = token.get("displayName", "")
        raise ExportError(f"--push {repo_id}: the token {name!r} may only read; {_NEW_TOKEN}")
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


def _create(repo_id: str, api: HfApi, *, public: bool, update: bool) -> Repository:
    try:
        api.create_repo(repo_id, private=not public)
    except HfHubHTTPError as error:
        # Not `exist_ok`: somebody's files would be replaced without a word.
        if error.response.status_code != httpx.codes.CONFLICT:
            raise
    else:
        return Repository(repo_id, api, is_new=True)
    # Of an export that failed after it was created, there is nothing to lose.
    is_new = set(api.list_repo_files(repo_id)) <= _EMPTY
    if not (is_new or update):
        raise ExportError(
            f"--push {repo_id}: this repository is there already; choose another name, or add "
            "--update to replace its files (the earlier ones stay in its history)"
        )
    if public:
        raise ExportError(
            f"--push {repo_id}: this repository is there already, and --public is for a new one; "
            f"change who may read it at {api.endpoint}/{repo_id}/settings"
        )
    return Repository(repo_id, api, is_new)


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == httpx.codes.UNAUTHORIZED:
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"--push {repo_id}: the hub does not accept the token of {source}; {_NEW_TOKEN}"
    if status == httpx.codes.FORBIDDEN:
        owner = repo_id.partition("/")[0]
        return (
            f"--push {repo_id}: the token has no right to write to {owner}; name an owner that it "
            f"may write to, or give it that right at {_TOKENS}"
        )
    reason = error.server_message or first_line(error)
    return f"--push {repo_id}: the hub refuses ({status}: {reason}); check the name, or try later"
