import pytest
import torch

from library.memory.room import Peak, never_needed_bytes


def test_without_a_device_there_is_no_limit() -> None:
    assert never_needed_bytes(torch.device("cpu")) == float("inf")


def test_what_others_hold_and_what_was_once_needed_is_not_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    # Of 24 GiB others hold 2, torch holds 8 and once held 15.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * gib, 24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 15 * gib)
    assert never_needed_bytes(torch.device("cuda")) == 7 * gib


def test_a_peak_knows_what_was_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    most = iter([5, 5, 7, 7])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(most))
    peak, cuda = Peak(), torch.device("cuda")
    found = []
    for doing in ("reading", "encoding", "training", "drawing"):
        peak.note(cuda, doing)
        found.append((peak.num_bytes, peak.doing))
    assert found == [(5, "reading"), (5, "reading"), (7, "training"), (7, "training")]
    nothing = Peak()
    nothing.note(torch.device("cpu"), "training")
    assert (nothing.num_bytes, nothing.doing) == (0, "")


def test_a_peak_is_reported_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    peak = Peak()
    peak.report(torch.device("cpu"))
    assert not caplog.messages
    peak.num_bytes, peak.doing = 3 * 2**30, "drawing previews"
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 * 2**30)
    peak.report(torch.device("cuda"))
    assert caplog.messages == ["Peak GPU memory: 4.00 GiB reserved, 3.00 GiB in tensors, while drawing previews"]
