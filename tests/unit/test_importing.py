import gc

import pytest

from library.importing import uncollected_imports


def test_the_collector_rests_during_imports_and_leaves_them_alone_afterwards() -> None:
    before = gc.get_freeze_count()
    try:
        with uncollected_imports():
            assert not gc.isenabled()
            made = [[number] for number in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() - before >= len(made)
    finally:
        gc.unfreeze()


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
