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


def test_some_rows_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = {"allocated_gib": 1.0, "context_gib": 0.4, "images_per_s": 2.0}
    trained: list[tuple[int, Row]] = []

    def measure_one(size: int, row: Row, folder: Path, preset: str) -> dict[str, Any]:
        trained.append((size, row))
        (entry,) = [entry for entry in TABLE["rows"] if entry.items() >= bench.key(size, row).items()]
        out_of_memory = row == Row()
        return {"out_of_memory": True} if out_of_memory else {**found, "reserved_gib": 1.05 * entry["tensors_gib"]}

    monkeypatch.setattr(bench, "measure_one", measure_one)
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda: "a card")
    table = bench.measure(json.loads(json.dumps(TABLE)), tmp_path, sizes=[1024])
    assert {size for size, _ in trained} == {1024}
    assert len(trained) == len(bench.FLAG_SETS) * 3
    assert [row.quantisation for _, row in trained] == sorted(
        (row.quantisation for _, row in trained), key=list(bench.QUALITY).index
    )
    assert (table["kind"], table["card"]) == ("measured", "a card")
    assert table["allowance"] == {"share": 0.05, "context_gib": 0.4, "from": "measured"}
    text = bench.tables(table)
    assert "does not fit" in text
    assert ", 2.00/s" in text
    assert ", x 1." in text  # of other sizes
    with pytest.raises(SystemExit, match="nothing to record"):
        bench.measure(table, tmp_path, limit_s=-1.0)  # what had been measured is of another run


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
