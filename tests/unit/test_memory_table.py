"""The memory table: file, page and predictor say the same."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from library.memory.fit import TABLE_FILE, Row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
bench: Any = importlib.import_module("bench_memory_table")
flops: Any = importlib.import_module("flops")
presets: Any = importlib.import_module("presets")

TABLE: dict[str, Any] = json.loads(TABLE_FILE.read_text(encoding="utf-8"))


def test_the_page_says_what_the_file_says() -> None:
    text = bench.PAGE.read_text(encoding="utf-8")
    message = "run: python tests/bench/bench_memory_table.py --write_docs"
    assert bench.with_tables(text, TABLE) == text, message


def test_the_file_has_every_row_and_says_where_it_is_from() -> None:
    assert len(TABLE["rows"]) == len(list(bench.all_rows()))
    assert TABLE["kind"] in ("computed", "measured")
    assert TABLE["kind"] == "measured" or not any("measured" in row for row in TABLE["rows"])
    assert {"date", "commit", "allowance"} <= TABLE.keys()


@pytest.mark.parametrize(
    "row", [Row("fp8", "full", False, 26), Row(None, "none", False, 13)], ids=["fp8, full, 26", "bf16, 13"]
)
def test_the_file_says_what_a_rehearsal_finds(row: Row, tmp_path: Path) -> None:
    """Of the real model, with the code as it is now."""
    need = bench.rehearsed(512, Row(row.quantisation, row.checkpointing, row.offload), tmp_path)
    (found,) = [entry for entry in TABLE["rows"] if entry.items() >= bench.key(512, row).items()]
    # 1 %: another version of torch may copy a little more or less. Then, or after a change that saves memory, run
    # python tests/bench/bench_memory_table.py --compute
    assert found["tensors_gib"] == pytest.approx(need.bytes_with(row.blocks_to_swap) / 2**30, rel=0.01)


def test_a_sample_that_is_stopped_prints_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[dict[str, Any]] = []

    def measure(row: dict[str, Any], preset: str) -> dict[str, Any]:
        if len(measured) == 2:
            raise bench.Stopped
        measured.append(row)
        return {"reserved_gib": 1.0}

    monkeypatch.setattr(bench, "_measured", measure)
    monkeypatch.setattr(bench, "stop_when_asked", lambda: None)
    assert not bench.sample(TABLE)
    printed = json.loads(capsys.readouterr().out)
    assert [row["measured"] for row in printed["rows"]] == [{"reserved_gib": 1.0}] * 2
    monkeypatch.setattr(bench, "_measured", lambda row, preset: {"reserved_gib": 1.0})
    assert bench.sample(TABLE)
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == len(bench.SAMPLE)  # all of them are in the table
    assert all(row["size_px"] == 1024 for row in printed["rows"])


def test_operations_are_those_of_the_flop_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.training import step_rehearsal

    counters = []

    class Kept(step_rehearsal.LiveBytes):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            counters.append(self)

    monkeypatch.setattr(step_rehearsal, "LiveBytes", Kept)
    sizes = presets.config("medium")
    counted = flops.count(sizes, flops.image_tokens(512, 512), [bench.CAPTION_TOKENS])
    for level, expected in (("none", counted.step), ("full", counted.step + counted.blocks_forward)):
        bench.rehearsed(512, Row(checkpointing=level), tmp_path, preset="medium")
        # 10 % more at most: the rehearsal has LoRA (rank 16 beside a width of 1152: 6 %) and modulation, the model here not.
        assert expected < counters[-1].num_flops < 1.1 * expected
