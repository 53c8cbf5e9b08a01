"""The memory table of docs/memory.md: what a training step of the 2.6 B model needs with each set of memory flags.

    python tests/bench/bench_memory_table.py --compute       # on any machine, minutes: rehearses every row
    python tests/bench/bench_memory_table.py --measure       # on a CUDA GPU: trains every row, in about seven minutes
    python tests/bench/bench_memory_table.py --measure --size_px 1024 --limit_s 90    # some of them
    python tests/bench/bench_memory_table.py --write_docs    # the table in docs/memory.md from the file
    python tests/bench/bench_memory_table.py --fp16          # prints what --mixed_precision fp16 needs

The first two write ``library/memory/memory_table.json``, which the program reads too: what ``--vram_gb`` allows for
workspaces and fragmentation comes from the measured rows. A row that does not fit the card is recorded as such.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import ROOT, circumstances
from our_program import RandomModelTrainer, batch_of, trainer_of, unstarted
from timing import timed

from library.files import write_text
from library.memory.device_memory import let_segments_grow
from library.memory.fit import GIB, QUALITY, TABLE_FILE, Allowance, Need, Row
from library.training.processes import Processes
from library.training.step import TrainStep
from library.training.step_rehearsal import rehearse

logger = logging.getLogger(__name__)

PAGE = ROOT / "docs" / "memory.md"
SIZES_PX = (512, 768, 1024, 1536)
CAPTION_TOKENS, RANK, BATCH = 256, 16, 1
FLAG_SETS: dict[str, Row] = {
    "none": Row(),
    "`--blocks_to_swap=13`": Row(blocks_to_swap=13),
    "`--blocks_to_swap=26`": Row(blocks_to_swap=26),
    "`--cpu_offload_checkpointing`": Row(offload=True),
    "`--gradient_checkpointing --gradient_checkpointing_level=selective`": Row(checkpointing="selective"),
    "`--gradient_checkpointing`": Row(checkpointing="full"),
    "`--gradient_checkpointing --blocks_to_swap=13`": Row(checkpointing="full", blocks_to_swap=13),
    "`--gradient_checkpointing --blocks_to_swap=26`": Row(checkpointing="full", blocks_to_swap=26),
    "all three, 26 blocks": Row(checkpointing="full", offload=True, blocks_to_swap=26),
}
_QUANTISATION_FLAGS = {None: [], "fp8": ["--fp8_base_unet"], "nf4": ["--nf4_base"]}
_KIND_NAMES = {None: "bf16", "fp8": "fp8", "nf4": "nf4"}
_ASSUMED = Allowance(share=0.08, context_gib=0.5)
_PLACE = re.compile(r"(<!-- memory table -->\n).*?(<!-- end of memory table -->)", re.DOTALL)
_WARM_UP, _STEPS = 2, 3


def all_rows() -> Iterator[tuple[int, str, Row]]:
    """Yields every row of the table: size in pixels, words for the flags, the flags."""
    for size in SIZES_PX:
        for kind in QUALITY:
            for words, flags in FLAG_SETS.items():
                yield size, words, Row(kind, flags.checkpointing, flags.offload, flags.blocks_to_swap)


class RehearsedTrainer(RandomModelTrainer):
    """A trainer that has not been started; it can only rehearse."""

    processes = SimpleNamespace(count=1)


def rehearsed(size_px: int, row: Row, folder: Path, preset: str = "full", precision: str = "bf16") -> Need:
    """Returns what a step of the table needs, by rehearsal."""
    trainer = unstarted(preset, precision, folder, [f"--network_dim={RANK}"])
    trainer.__class__ = RehearsedTrainer
    trainer.weight_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return rehearse(trainer, row, batch_of(trainer.dit_config(), size_px, size_px, [CAPTION_TOKENS] * BATCH, 1))


def entry(size_px: int, row: Row, need: Need, fastest_s: float) -> dict[str, Any]:
    """Returns a row as the file has it."""
    return {
        **key(size_px, row),
        "tensors_gib": round(need.bytes_with(row.blocks_to_swap) / GIB, 3),
        "relative_time": round(need.seconds_with(row.blocks_to_swap) / fastest_s, 3),
    }


def key(size_px: int, row: Row) -> dict[str, Any]:
    """Returns what tells a row from the others."""
    return {
        "size_px": size_px,
        "quantisation": row.quantisation,
        "checkpointing": row.checkpointing,
        "offload": row.offload,
        "blocks_to_swap": row.blocks_to_swap,
    }


def compute(folder: Path) -> dict[str, Any]:
    """Returns the table by rehearsal; measured rows of the old one are not taken over."""
    needs: dict[tuple[int, Row], Need] = {}
    entries = []
    for size, _, row in all_rows():
        plain = Row(row.quantisation, row.checkpointing, row.offload)
        if (size, plain) not in needs:
            needs[size, plain] = rehearsed(size, plain, folder)
            logger.info("%d px, %s", size, plain)
        entries.append(entry(size, row, needs[size, plain], needs[size, Row()].seconds_with(0)))
    about = {name: value for name, value in circumstances().items() if name in ("date", "commit", "torch")}
    return {
        "kind": "computed",
        **about,
        "model": "Lumina Image 2.0 (2.6 B), random weights",
        "batch": BATCH,
        "caption_tokens": CAPTION_TOKENS,
        "network_dim": RANK,
        "optimizer": "AdamW",
        "allowance": {"share": _ASSUMED.share, "context_gib": _ASSUMED.context_gib, "from": "assumed"},
        "rows": entries,
    }


def in_fp16(folder: Path) -> str:
    """Returns GiB of the card for steps with --mixed_precision fp16, as a table of Markdown."""
    lines = ["| flags | 512 px | 768 px | 1024 px | 1024 px, `--fp8_base_unet` |", "| --- | --- | --- | --- | --- |"]
    for words, flags in FLAG_SETS.items():
        if flags.offload or flags.checkpointing == "none":
            continue
        cells = []
        for size, kind in ((512, None), (768, None), (1024, None), (1024, "fp8")):
            need = rehearsed(size, Row(kind, flags.checkpointing), folder, precision="fp16")  # type: ignore[arg-type]
            cells.append(f"{_ASSUMED.with_allowance(need.bytes_with(flags.blocks_to_swap)):.1f}")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- on a GPU ----


def flags_of(row: Row) -> list[str]:
    """Returns a row's flags of the trainer."""
    flags = list(_QUANTISATION_FLAGS[row.quantisation])
    flags += ["--gradient_checkpointing"] if row.checkpointing != "none" else []
    flags += ["--gradient_checkpointing_level=selective"] if row.checkpointing == "selective" else []
    flags += ["--cpu_offload_checkpointing"] if row.offload else []
    return flags + ([f"--blocks_to_swap={row.blocks_to_swap}"] if row.blocks_to_swap else [])


def measure_one(size_px: int, row: Row, folder: Path, preset: str = "full") -> dict[str, Any]:
    """Trains a row's steps, and returns its peaks and images a second, or that memory ran out."""
    try:
        trainer = trainer_of(preset, "bf16", folder, [f"--network_dim={RANK}", *flags_of(row)])
        step = TrainStep(trainer.losses_of, trainer.updater, Processes(trainer.accelerator))
        seconds = []
        torch.cuda.empty_cache()  # reading the weights is not part of it, nor what it left reserved
        torch.cuda.reset_peak_memory_stats()
        for number in range(1, _WARM_UP + _STEPS + 1):
            batch = batch_of(trainer.dit_config(), size_px, size_px, [CAPTION_TOKENS] * BATCH, number)
            seconds.append(timed(lambda batch=batch, number=number: step([batch], BATCH, number), trainer.device))
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    seconds = sorted(seconds[_WARM_UP:])
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        # An upper bound: other programs' memory is in it too.
        "context_gib": round((total - free - torch.cuda.memory_reserved()) / GIB, 3),
        "images_per_s": round(BATCH / seconds[len(seconds) // 2], 3),
    }


def measure(
    table: dict[str, Any], folder: Path, preset: str = "full", sizes: Collection[int] = SIZES_PX, limit_s: float = 1e9
) -> dict[str, Any]:
    """Returns the table with rows measured, and the allowance that follows.

    Args:
        table: as the file has it; what it has measured rows of is forgotten.
        folder: for the runs' files.
        preset: of the model.
        sizes: whose rows are measured.
        limit_s: no row begins later; without quantisation come first, with bitsandbytes last.

    Raises:
        SystemExit: there is no GPU, or no row fits into its memory.
    """
    if not torch.cuda.is_available():
        sys.exit("--measure needs a CUDA GPU; --compute runs anywhere")
    began = time.monotonic()
    for row in table["rows"]:
        row.pop("measured", None)
    for row in sorted(table["rows"], key=lambda row: list(QUALITY).index(row["quantisation"])):
        if row["size_px"] not in sizes or time.monotonic() - began > limit_s:
            continue
        if row["quantisation"] == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            continue
        flags = Row(row["quantisation"], row["checkpointing"], row["offload"], row["blocks_to_swap"])
        row["measured"] = measure_one(row["size_px"], flags, folder, preset)
        logger.info("%s", row)
        gc.collect()  # wrapped blocks refer to themselves
        torch.cuda.empty_cache()
    measured = [row for row in table["rows"] if "reserved_gib" in row.get("measured", {})]
    if not measured:
        sys.exit("no row fits into this card's memory, so there is nothing to record")
    table["allowance"] = {
        "share": round(max(0.0, *(row["measured"]["reserved_gib"] / row["tensors_gib"] - 1 for row in measured)), 3),
        "context_gib": max(row["measured"]["context_gib"] for row in measured),
        "from": "measured",
    }
    about = {name: value for name, value in circumstances().items() if name in ("date", "commit", "torch")}
    return table | {"kind": "measured", "card": torch.cuda.get_device_name(), **about}


# ---- the page ----


def tables(table: dict[str, Any]) -> str:
    """Returns the page's tables."""
    found = {json.dumps({name: row[name] for name in key(0, Row())}): row for row in table["rows"]}
    allowance = Allowance(table["allowance"]["share"], table["allowance"]["context_gib"])
    parts = [_caption(table)]
    for size in SIZES_PX:
        lines = [f"**{size} x {size} px**", "", "| flags | bf16 | fp8 | nf4 |", "| --- | --- | --- | --- |"]
        for words, flags in FLAG_SETS.items():
            cells = []
            for kind in QUALITY:
                row = Row(kind, flags.checkpointing, flags.offload, flags.blocks_to_swap)
                cells.append(_cell(found[json.dumps(key(size, row))], allowance))
            lines.append(f"| {words} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(row: dict[str, Any], allowance: Allowance) -> str:
    measured = row.get("measured")
    if measured is None:
        return f"{allowance.with_allowance(row['tensors_gib'] * GIB):.1f}, x {row['relative_time']:.2f}"
    if "reserved_gib" not in measured:
        return "does not fit"
    return f"{measured['reserved_gib'] + measured['context_gib']:.1f}, {measured['images_per_s']:.2f}/s"


def _caption(table: dict[str, Any]) -> str:
    share, context = table["allowance"]["share"], table["allowance"]["context_gib"]
    of_what = (
        f"batch {table['batch']}, captions of {table['caption_tokens']} tokens, `--network_dim={table['network_dim']}`,"
        f" {table['optimizer']}, both caches"
    )
    if table["kind"] == "measured":
        where = f"{table['card']} ({table['date']}, {table['commit']})"
        return (
            f"**Measured** on {where}: GiB of the card, pictures a second (cells with /s); {of_what}. Cells with a factor"
            f" are computed: counted bytes of tensors, and on top what measured rows needed at most, {share:.0%} and"
            f" {context:g} GiB for CUDA itself; the factor is the time of a step as a multiple of the row without flags in"
            " bf16."
        )
    return (
        f"**Computed, not measured on a GPU yet** ({table['date']}): GiB of the card, and the time of a step as a multiple"
        f" of the row without flags in bf16; {of_what}. The tensors' bytes are counted; {share:.0%} for what kernels need"
        f" and fragmentation loses, and {context:g} GiB for CUDA itself, are assumptions."
    )


def with_tables(text: str, table: dict[str, Any]) -> str:
    """Returns the page's text with its tables as the file has them.

    Raises:
        ValueError: the page has no place for them.
    """
    if _PLACE.search(text) is None:
        raise ValueError(f"{PAGE.name} has no place for the memory table")
    return _PLACE.sub(lambda match: f"{match[1]}\n{tables(table)}\n\n{match[2]}", text)


def _write_docs() -> None:
    table = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), table))


def main() -> None:
    """Reads the command line and does what it says."""
    parser = argparse.ArgumentParser(description="Makes the memory table.")
    parser.add_argument("--compute", action="store_true", help="rehearse every row and write the file")
    parser.add_argument("--measure", action="store_true", help="measure every row on this GPU and write the file")
    parser.add_argument("--write_docs", action="store_true", help="write the table into docs/memory.md")
    parser.add_argument("--fp16", action="store_true", help="print what steps with --mixed_precision fp16 need")
    parser.add_argument("--preset", default="full", help="of the model that is measured; another one is for trying out")
    parser.add_argument("--size_px", type=int, nargs="+", default=SIZES_PX, choices=SIZES_PX, help="rows to measure")
    parser.add_argument("--limit_s", type=float, default=1e9, help="seconds after which no further row is measured")
    options = parser.parse_args()
    let_segments_grow()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.fp16:
            sys.stdout.write(in_fp16(folder) + "\n")
        if options.compute:
            write_text(TABLE_FILE, json.dumps(compute(folder), indent=1) + "\n")
        if options.measure:
            table = json.loads(TABLE_FILE.read_text(encoding="utf-8"))
            table = measure(table, folder, options.preset, options.size_px, options.limit_s)
            write_text(TABLE_FILE, json.dumps(table, indent=1) + "\n")
    if options.compute or options.measure or options.write_docs:
        _write_docs()


if __name__ == "__main__":
    main()
