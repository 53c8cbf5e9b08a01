"""TensorBoard and wandb, through accelerate."""

from __future__ import annotations

import contextlib
import time
import tomllib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from library.errors import SettingsError
from library.settings import specs_of
from library.training.arguments import GROUPS, TrainConfig
from library.training.settings import LogSettings
from library.training.shown_settings import without_folders

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

_TRACKERS = ("tensorboard", "wandb")


def accelerate_arguments(settings: LogSettings) -> dict[str, Any]:
    """Returns ``Accelerator``'s arguments about trackers.

    Raises:
        SettingsError: a tracker's package is not installed.
    """
    if settings.logging_dir is None and settings.log_with is None:
        return {}
    from accelerate.utils import ProjectConfiguration
    from accelerate.utils.imports import is_tensorboard_available, is_wandb_available

    chosen = settings.log_with or "tensorboard"
    names = list(_TRACKERS) if chosen == "all" else [chosen]
    installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in names:
        if not installed[name]():
            origin = "--logging_dir" if settings.log_with is None else f"--log_with {settings.log_with}"
            raise SettingsError(
                f"{origin}: {name} is not installed, so nothing can be logged there; run: pip install {name}, or leave the"
                " flag out"
            )
    if settings.logging_dir is None:
        return {"log_with": names}
    folder = settings.logging_dir / f"{settings.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
    return {"log_with": names, "project_config": ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder))}


def logged_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns every setting of a run, also those left at their defaults, as trackers may show it to others.

    A secret that was given is hidden. Of a path only the last part is shown: folders tell the user's name and disks.
    """
    shown: dict[str, Any] = {}
    for group, (_, settings_class) in GROUPS.items():
        for spec in specs_of(settings_class):
            value = getattr(getattr(config, group), spec.name)
            shown[spec.name] = _HIDDEN if spec.secret and value is not None else _shown(value)
    return shown


_HIDDEN = "(hidden)"


def _shown(value: Any) -> Any:
    """Returns a setting as trackers take it: a number, a truth value, a text or None."""
    value = without_folders(value)
    return " ".join(map(str, value)) if isinstance(value, list) else value


def tracker_arguments(settings: LogSettings) -> dict[str, dict[str, Any]]:
    """Returns further arguments of each tracker's start: those of ``--log_tracker_config`` with ``--wandb_run_name``.

    Raises:
        SettingsError: ``--log_tracker_config`` is no TOML file, or not made of tables named after trackers.
    """
    arguments: dict[str, dict[str, Any]] = {}
    path = settings.log_tracker_config
    if path is not None:
        try:
            arguments = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"--log_tracker_config: {path}: {error}") from error
        for name, table in arguments.items():
            if name not in _TRACKERS or not isinstance(table, dict):
                raise SettingsError(
                    f"--log_tracker_config: {path}: {name} is no tracker's table, so it would have no effect; put"
                    " arguments under [wandb] or [tensorboard]"
                )
    if settings.wandb_run_name:
        arguments["wandb"] = {**arguments.get("wandb", {}), "name": settings.wandb_run_name}
    return arguments


class Trackers:
    """Where numbers and pictures of a run are reported; does nothing where no tracker was asked for."""

    def __init__(self, accelerator: Accelerator, settings: LogSettings) -> None:
        """Starts the trackers.

        Args:
            accelerator: made with :func:`accelerate_arguments`.
            settings: names and keys.

        Raises:
            SettingsError: ``--log_tracker_config`` or ``--wandb_api_key`` is wrong.
        """
        self._accelerator = accelerator
        if not accelerator.log_with:
            return
        arguments = tracker_arguments(settings)
        if settings.wandb_api_key is not None and settings.log_with in ("wandb", "all") and accelerator.is_main_process:
            _log_in(settings.wandb_api_key)
        self._folder = settings.logging_dir
        try:
            with self._writing():
                accelerator.init_trackers(settings.log_tracker_name or "network_train", init_kwargs=arguments)
        except (TypeError, AttributeError) as error:
            if settings.log_tracker_config is None:
                raise
            raise SettingsError(f"--log_tracker_config: {settings.log_tracker_config}: {error}") from error

    def log_settings(self, run_settings: Mapping[str, Any]) -> None:
        """Stores the settings of a run, from :func:`logged_settings`; once, before anything else is reported."""
        with self._writing():
            for tracker in self._accelerator.trackers:
                tracker.store_init_configuration(dict(run_settings))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Names the flag where the block cannot write the first files.

        Raises:
            SettingsError: it cannot.
        """
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise SettingsError(
                f"--logging_dir: {self._folder} cannot be written to ({reason}); free some space there, or give another"
                " folder"
            ) from error

    def flush(self) -> None:
        """Closes the trackers' files where a run ends early; a run that ends well closes them with its processes."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Reports numbers at an optimizer step; none are no report."""
        if not values:
            return
        self._accelerator.log(dict(values), step=step)

    def log_picture(self, name: str, picture: Image, step: int) -> None:
        """Reports one RGB picture at an optimizer step."""
        import numpy

        for tracker in self._accelerator.trackers:
            # TensorBoard expects channels first unless it is told.
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: numpy.asarray(picture)[None]}, step=step, **layout)


def _log_in(key: str) -> None:
    import wandb

    try:
        wandb.login(key=key)
    except ValueError as error:  # a key of the wrong length, say; the message must not hold the key
        raise SettingsError(f"--wandb_api_key: wandb does not take it: {str(error).replace(key, _HIDDEN)}") from error
