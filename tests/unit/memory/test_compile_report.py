"""What a person is told while code is compiled."""

import logging

import pytest
import torch
import torch._dynamo.callback

from library.memory.compile_report import CompileReport, report_compiling


def test_pieces_that_took_a_while_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    times = iter([0.0, 0.3, 10.0, 22.4])
    report = CompileReport(lambda: next(times))
    for _ in range(2):
        report.begin()
        report.end()
    assert caplog.messages == ["Compiled piece 2 of the blocks' code in 12 s"]


def test_torch_calls_it_once_for_each_piece(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    handler = torch._dynamo.callback.callback_handler
    monkeypatch.setattr(handler, "start_callbacks", [])
    monkeypatch.setattr(handler, "end_callbacks", [])
    monkeypatch.setattr("library.memory.compile_report._WORTH_TELLING_S", 0.0)
    caplog.set_level(logging.INFO)
    torch._dynamo.reset()  # it forgets callbacks, too
    report_compiling()
    report_compiling()
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    compiled(torch.ones(2))
    compiled(torch.ones(2))
    assert [text for text in caplog.messages if "Compiled" in text] == ["Compiled piece 1 of the blocks' code in 0 s"]
