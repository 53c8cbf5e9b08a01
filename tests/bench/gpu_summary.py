"""Puts together what the parts of ``gpu_all.sh`` printed: results.json and summary.md.

python tests/bench/gpu_summary.py PARTS FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Parts = Mapping[str, Any]


def read_parts(folder: Path) -> dict[str, Any]:
    """Returns every part by name: exit code, seconds, and its output as JSON where it is that, else its last lines."""
    parts: dict[str, Any] = {}
    for path in sorted(folder.glob("*.skipped")):
        parts[path.stem] = {"skipped": path.read_text(encoding="utf-8").strip()}
    for path in sorted(folder.glob("*.status")):
        code, seconds = map(int, path.read_text(encoding="ascii").split())
        part: dict[str, Any] = {"exit_code": code, "seconds": seconds}
        output = path.with_suffix(".out").read_text(encoding="utf-8", errors="replace").strip()
        try:
            part["result"] = json.loads(output)
        except json.JSONDecodeError:
            part["output"] = output.splitlines()[-60:]
        error = path.with_suffix(".error")
        if error.is_file():
            part["error"] = "timed out" if code in (124, 137) else error.read_text(encoding="utf-8", errors="replace")
        parts[path.stem] = part
    return parts


def targets(parts: Parts) -> list[tuple[str, str, str]]:
    """Returns (what, target, reached) of everything that the project has a target for."""

    def value(part: str, key: str) -> float:
        return float(parts[part]["result"][key])

    def speed_up(fast: str, slow: str) -> str:
        return f"{value(fast, 'images_per_s') / value(slow, 'images_per_s'):.3f} x"

    def share(part: str, key: str = "mfu") -> str:
        return f"{value(part, key):.1%} ({value(part, 'images_per_s'):.2f} images/s)"

    def drawn(place: int) -> str:
        return f"{parts['sampling']['result']['sizes'][place]['one_batch_over_two_passes']:.3f} x"

    def peak(row: int) -> str:
        return f"{parts['memory']['result']['rows'][row]['reserved_gib']:.2f} GiB"

    def of_eager(part: str) -> str:
        return f"{value(part, 'step_s') / value('step_eager', 'step_s'):.3f} x"

    rows: list[tuple[str, str, Callable[[], str]]] = [
        ("step, 1024 px, batch 4, of the matmul ceiling: eager", ">= 55 %", lambda: share("step_eager")),
        ("the same, --torch_compile", ">= 55 %, aim 60 %", lambda: share("step_compiled")),
        ("the same, --attn_mode cudnn", "compared", lambda: share("step_cudnn")),
        ("the same, --attn_mode flash", "compared", lambda: share("step_flash")),
        ("captions of different lengths, time", "compared", lambda: of_eager("step_ragged")),
        ("selective checkpointing, time", "<= 1.30 x", lambda: of_eager("step_selective")),
        ("full checkpointing, time", "<= 1.52 x", lambda: of_eager("step_checkpointing")),
        (
            "full checkpointing, recomputation counted",
            ">= 50 %",
            lambda: share("step_checkpointing", "mfu_with_recomputation"),
        ),
        ("over diffusers' transformer with peft: eager", "compared", lambda: speed_up("step_eager", "step_diffusers")),
        (
            "the same, full checkpointing",
            "compared",
            lambda: speed_up("step_checkpointing", "step_diffusers_checkpointing"),
        ),
        ("--mixed_precision fp16 over no, batch 1", "compared", lambda: speed_up("step_fp16", "step_fp32")),
        ("--fp8_fast over bf16, 1024 px", ">= 1.15 x", lambda: speed_up("step_fp8", "step_eager")),
        ("--fp8_fast over bf16, 512 px", ">= 1.25 x", lambda: speed_up("step_fp8_small", "step_bf16_small")),
        ("the same, --torch_compile", ">= 1.15 x", lambda: speed_up("step_fp8_compiled", "step_compiled")),
        (
            "the same, --torch_compile, 512 px",
            ">= 1.25 x",
            lambda: speed_up("step_fp8_compiled_small", "step_compiled_small"),
        ),
        (
            "streaming all blocks, time",
            "<= 1.10 x",
            lambda: f"{value('step_streaming', 'step_s') / value('step_checkpointing', 'step_s'):.3f} x",
        ),
        ("whole program, fp8, streaming, checkpointing", "< 4.5 GiB", lambda: peak(0)),
        ("whole program, fp8, checkpointing", "< 6 GiB", lambda: peak(1)),
        ("whole program, bf16, checkpointing", "< 8 GiB", lambda: peak(2)),
        ("drawing, one batch over two passes, 256 px", "<= 0.8 x", lambda: drawn(0)),
        ("drawing, one batch over two passes, 1024 px", "<= 0.97 x", lambda: drawn(1)),
    ]
    found = []
    for what, target, reached in rows:
        try:
            found.append((what, target, reached()))
        except (KeyError, IndexError, TypeError, ZeroDivisionError):
            found.append((what, target, "not measured"))
    return found


def summary(parts: Parts) -> str:
    """Returns the tables as Markdown."""
    lines = ["| figure | target | reached |", "| --- | --- | --- |"]
    lines += [f"| {what} | {target} | {reached} |" for what, target, reached in targets(parts)]
    lines += ["", "| part | seconds | outcome |", "| --- | --- | --- |"]
    for name, part in parts.items():
        outcome = f"left out: {part['skipped']}" if "skipped" in part else "done"
        if "error" in part:
            said = part["error"].strip().splitlines() or part.get("output", [])  # pytest reports on stdout
            last = next(reversed(said), "no message")
            outcome = f"failed ({part['exit_code']}): {last}"
        elif part.get("output"):
            outcome = part["output"][-1]
        lines.append(f"| {name} | {part.get('seconds', '')} | {outcome.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the parts and writes both files."""
    source, target = map(Path, sys.argv[1:3])
    parts = read_parts(source)
    (target / "results.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    (target / "summary.md").write_text(summary(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
