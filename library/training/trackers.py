"""TensorBoard and wandb, through accelerate."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.errors import SettingsError
from library.training.settings import LogSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image


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
    names = ["tensorboard", "wandb"] if chosen == "all" else [chosen]
    installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in names:
        if not installed[name]():
            raise SettingsError(f"--log_with: {name} is not installed; run: pip install {name}")
    if settings.logging_dir is None:
        return {"log_with": names}
    folder = settings.logging_dir / f"{settings.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
    return {"log_with": names, "project_config": ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder))}


class Trackers:
    """Where numbers and pictures of a run are reported; does nothing where no tracker was asked for."""

    def __init__(self, accelerator: Accelerator, settings: LogSettings, run_settings: Mapping[str, Any]) -> None:
        """Starts the trackers.

        Args:
            accelerator: made with :func:`accelerate_arguments`.
            settings: names and keys.
            run_settings: flags of the run, stored with ``--log_config``; secrets must not be among them.

        Raises:
            SettingsError: ``--log_tracker_config`` is no TOML file.
        """
        self._accelerator = accelerator
        if not accelerator.log_with:
            return
        if settings.wandb_api_key is not None:
            import wandb

            wandb.login(key=settings.wandb_api_key)
        arguments: dict[str, Any] = {}
        if settings.wandb_run_name:
            arguments = {"wandb": {"name": settings.wandb_run_name}}
        if settings.log_tracker_config is not None:
            try:
                arguments = tomllib.loads(settings.log_tracker_config.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise SettingsError(f"--log_tracker_config: {settings.log_tracker_config}: {error}") from error
        # Trackers take plain numbers and texts only.
        config = {name: str(value) for name, value in run_settings.items()} if settings.log_config else None
        try:
            accelerator.init_trackers(
                settings.log_tracker_name or "network_train", config=config, init_kwargs=arguments
            )
        except (TypeError, AttributeError) as error:
            raise SettingsError(f"--log_tracker_config: {settings.log_tracker_config}: {error}") from error

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
