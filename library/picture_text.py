"""What a PNG file says of how its picture was drawn, in the form that other programs read.

The form is that of the AUTOMATIC1111 web interface (``modules/infotext_utils.py``), which ComfyUI's viewers and model
sites read too: the prompt, a line ``Negative prompt: ...`` where there is one, and a line of ``Name: value`` entries. It
stands in the PNG text ``parameters``. Files are named without their folders: pictures are given to others.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from library.files import write_with
from library.prompts import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "parameters"


class LoraInUse(NamedTuple):
    """A LoRA that pictures are drawn with.

    Attributes:
        name: of its file.
        multiplier: of its part.
        content_hash: SHA-256 of the file's tensors, as its metadata say (``sshs_model_hash``); model sites know it.
    """

    name: str
    multiplier: float
    content_hash: str = ""


@dataclasses.dataclass(frozen=True)
class DrawnWith:
    """How pictures are drawn, beside their prompts.

    Attributes:
        model: name of the transformer.
        shift: of the sampling schedule.
        system_prompt: put before prompts.
        loras: in use.
        further: entries of other names.
    """

    model: str
    shift: float
    system_prompt: str = ""
    loras: tuple[LoraInUse, ...] = ()
    further: tuple[tuple[str, str], ...] = ()


def picture_text(prompt: Prompt, seed: int, how: DrawnWith) -> str:
    """Returns the text of a picture."""
    entries = [
        ("Steps", str(prompt.sample_steps)),
        ("Sampler", "Euler"),
        ("CFG scale", f"{prompt.scale:g}"),
        ("Seed", str(seed)),
        ("Size", f"{prompt.width}x{prompt.height}"),
        ("Model", how.model),
        ("Lora", ", ".join(f"{lora.name}: {lora.multiplier:g}" for lora in how.loras)),
        ("Lora hashes", ", ".join(f"{lora.name}: {lora.content_hash[:12]}" for lora in how.loras if lora.content_hash)),
        ("Shift", f"{how.shift:g}"),
        ("CFG truncation", f"{prompt.cfg_trunc_ratio:g}"),
        ("CFG renormalization", f"{prompt.renorm_cfg:g}"),
        ("System prompt", how.system_prompt),
        *how.further,
    ]
    lines = [_one_part(prompt.prompt)]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {_one_part(prompt.negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in entries if value))
    # What came from a file system or command line in no valid encoding cannot be written.
    return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")


def _one_part(text: str) -> str:
    """Returns a prompt of which no line looks like the beginning of another part; other line breaks stay."""
    return re.sub(r"\s*\n\s*(?=(?:Negative prompt|Steps):)", " ", "\n".join(text.strip().splitlines()))


def _quoted(value: str) -> str:
    """Returns a value in JSON's quotes where a comma, a colon, a quote or a line break would end or change it."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n\r]', value) else value


def name_of_model(path: Path | None) -> str:
    """Returns a model's name: of a file without its ending, of a folder whole."""
    if path is None:
        return ""
    return path.resolve().name if path.is_dir() else path.stem


def save_png(path: Path, picture: Image, text: str) -> None:
    """Writes a picture with its text to a PNG file, atomically."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(KEY, text)  # as Latin-1 where it can be, else as UTF-8
    write_with(path, lambda temporary: picture.save(temporary, pnginfo=info))
