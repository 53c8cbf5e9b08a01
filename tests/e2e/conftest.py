"""One small job for all end-to-end tests, and runs inside this process where a subprocess shows nothing more."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_helpers import Job, make_job


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs the training program in this process: the imports are paid once, and coverage of errors is cheap."""
    import logging

    from e2e_helpers import ROOT
    from trainer_helpers import fresh_accelerate

    import lumina_train_network

    monkeypatch.chdir(ROOT)
    fresh_accelerate()  # which tests in any order may have left behind
    handlers = list(logging.getLogger().handlers)

    def run(flags: list[str]) -> None:
        lumina_train_network.main(flags)

    yield run
    logging.getLogger().handlers[:] = handlers
    fresh_accelerate()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"
