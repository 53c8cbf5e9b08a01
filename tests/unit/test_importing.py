import gc
import importlib
import sys
import weakref
from pathlib import Path

import pytest

from library.importing import uncollected_imports


def test_the_collector_rests_during_imports_and_leaves_them_alone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "this_is_new.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    try:
        with uncollected_imports():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
            importlib.import_module("this_is_new")
        assert gc.isenabled()
        assert gc.get_freeze_count() - before >= len(made)
    finally:
        gc.unfreeze()
        sys.modules.pop("this_is_new", None)


def test_what_callers_make_later_is_not_held_by_an_import_that_failed_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many packages do: they look whether another one is there, and keep the error a moment too long.
    (tmp_path / "this_looks_around.py").write_text(
        "try:\n    import nothing_of_this_name\nexcept ImportError as error:\n    kept = error\n"
        "kept.me = kept\ndel kept\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)

    class Model:
        pass

    def build() -> Model:
        with uncollected_imports():
            importlib.import_module("this_looks_around")
        model = Model()
        return model

    try:
        gone = weakref.ref(build())
        gc.collect()
        assert gone() is None
    finally:
        gc.unfreeze()
        sys.modules.pop("this_looks_around", None)


def test_what_is_there_stays_collectable_where_nothing_was_imported() -> None:
    """A model that is let go again must not be held by making another one."""

    class Cycle:
        def __init__(self) -> None:
            self.me = self

    thing = Cycle()
    gone = weakref.ref(thing)
    with uncollected_imports():
        import json  # noqa: F401 - is there already
    del thing
    gc.collect()
    assert gone() is None


def test_the_collector_is_on_again_after_an_error_and_stays_off_where_it_was_off() -> None:
    try:
        with pytest.raises(ImportError), uncollected_imports():
            raise ImportError
        assert gc.isenabled()
        gc.disable()
        with uncollected_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
