"""Files to and from the Hugging Face hub. What goes wrong with an upload is a warning and never ends a run."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from library.errors import SettingsError, nearest
from library.training.output_settings import HubSettings
from library.training.state import JSON_FILE, StateError

logger = logging.getLogger(__name__)

_DEFAULT_TYPE = "model"
REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class HubState:
    """Where a training state is on the hub."""

    repo_id: str
    path: str
    revision: str | None
    repo_type: str

    @classmethod
    def parse(cls, text: str, default_type: str | None) -> HubState:
        """Returns what ``owner/name/folder:revision:type`` means; the last two may be left out.

        Raises:
            SettingsError: it has another form.
        """
        place, *more = text.split(":")
        owner, _, rest = place.partition("/")
        name, _, path = rest.partition("/")
        path = path.strip("/")
        if not (owner and name and path) or len(more) > 2 or ".." in PurePosixPath(path).parts:
            raise SettingsError(
                f"--resume: {text!r} names no state on the hub; --resume_from_huggingface expects owner/name/folder, or"
                " owner/name/folder:revision, or owner/name/folder:revision:type"
            )
        revision = more[0] if more and more[0] else None
        repo_type = more[1] if len(more) == 2 and more[1] else default_type or _DEFAULT_TYPE
        if repo_type not in REPO_TYPES:
            raise SettingsError(
                f"--resume: {repo_type!r} in {text!r} is no type of repository{nearest(repo_type, REPO_TYPES)}; give one of"
                f" {', '.join(REPO_TYPES)}"
            )
        return cls(f"{owner}/{name}", path, revision, repo_type)


def download_state(text: str, settings: HubSettings) -> Path:
    """Returns the folder of a training state after it has been downloaded; what is there already is not downloaded again.

    Args:
        text: ``owner/name/folder:revision:type``.
        settings: token and default type.

    Raises:
        SettingsError: ``text`` has another form.
        StateError: it cannot be downloaded.
    """
    state = HubState.parse(text, settings.huggingface_repo_type)
    from huggingface_hub import snapshot_download

    logger.info("Downloading the training state %s from %s", state.path, state.repo_id)
    try:
        folder = snapshot_download(
            state.repo_id,
            repo_type=state.repo_type,
            revision=state.revision,
            allow_patterns=f"{state.path}/*",
            token=settings.huggingface_token,
        )
    except Exception as error:  # the hub's client raises errors of many kinds
        raise StateError(
            f"--resume: {text} cannot be downloaded ({_reason(error, settings)}); mend --resume, log in with `hf auth login`"
            " or --huggingface_token, or give a folder on this machine without --resume_from_huggingface"
        ) from error
    path = Path(folder) / state.path
    if not (path / JSON_FILE).exists() and not path.is_dir():
        raise StateError(f"--resume: there is no folder {state.path} in {state.repo_id}; mend --resume")
    return path


class HubUploads:
    """Uploads what a run saves, where ``--huggingface_repo_id`` names a repository.

    With ``--async_upload`` a thread does it while training goes on; what was saved last is always waited for.
    """

    def __init__(self, settings: HubSettings, api: Any = None) -> None:
        """Makes the repository where it does not exist yet: private, unless it is to be public.

        Args:
            settings: where to, and with which token.
            api: the hub's client; None makes one.
        """
        self._settings = settings
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._api = api
        self._is_on = settings.huggingface_repo_id is not None
        if self._is_on:
            self._try("the repository is not there and cannot be made", self._prepare)

    def _prepare(self) -> None:
        settings = self._settings
        if self._api is None:
            from huggingface_hub import HfApi

            self._api = HfApi(token=settings.huggingface_token)
        self._api.create_repo(
            repo_id=settings.huggingface_repo_id,
            repo_type=settings.huggingface_repo_type or _DEFAULT_TYPE,
            private=settings.huggingface_repo_visibility != "public",
            exist_ok=True,
        )

    def file(self, path: Path, wait: bool = False) -> None:
        """Uploads a file; ``wait`` until this and all before it are done."""
        self._upload(path, wait, lambda where: self._api.upload_file(path_or_fileobj=str(path), **where))

    def state(self, folder: Path, wait: bool = False) -> None:
        """Uploads a training state with ``--save_state_to_huggingface``."""
        if self._settings.save_state_to_huggingface:
            self._upload(folder, wait, lambda where: self._api.upload_folder(folder_path=str(folder), **where))

    def _upload(self, path: Path, wait: bool, send: Callable[[dict[str, Any]], object]) -> None:
        if not self._is_on:
            return
        settings = self._settings
        prefix = (settings.huggingface_path_in_repo or "").strip("/")
        where = {
            "path_in_repo": f"{prefix}/{path.name}" if prefix else path.name,
            "repo_id": settings.huggingface_repo_id,
            "repo_type": settings.huggingface_repo_type or _DEFAULT_TYPE,
            "commit_message": f"Upload {path.name}",
        }

        def job() -> None:
            if self._try(f"{path.name} is not uploaded", lambda: send(where)):
                logger.info("Uploaded %s to %s", path.name, settings.huggingface_repo_id)

        if settings.async_upload and not wait:
            self._in_background(job)
            return
        self.finish()
        job()

    def _in_background(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            # A daemon, so that Ctrl+C does not wait for the network.
            self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def finish(self) -> None:
        """Waits for the uploads that are under way."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join()
        self._thread = None

    def _try(self, failure: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:  # the hub's client raises errors of many kinds, and a lost upload must not end a run
            repo_id = self._settings.huggingface_repo_id
            logger.warning("Hub %s: %s (%s); the run goes on", repo_id, failure, _reason(error, self._settings))
            return False
        return True


def _reason(error: Exception, settings: HubSettings) -> str:
    """Returns an error's first line, without the token."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    token = settings.huggingface_token
    return text.replace(token, "***") if token else text
