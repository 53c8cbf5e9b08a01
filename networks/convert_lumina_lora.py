"""Converts a LoRA file into the form that another program reads: sd-scripts, ComfyUI, diffusers.

    python networks/convert_lumina_lora.py --src_path my.safetensors --dst_path my_diffusers.safetensors --dst diffusers

See docs/lora_files.md.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, Python looks in this folder alone

from library.command_line import build_parser, read_command_line
from library.console import run_program
from library.errors import SettingsError
from library.settings import flag, from_given, require, specs_of

logger = logging.getLogger("convert_lumina_lora")


@dataclasses.dataclass(frozen=True)
class ConvertFlags:
    """Which file becomes what."""

    src_path: Path | None = flag(None, "LoRA file to read, in any of these programs' forms")
    dst_path: Path | None = flag(None, "file to write, ending in .safetensors")
    dst: Literal["sd-scripts", "comfyui", "diffusers"] | None = flag(None, "program that is to read it")
    save_precision: Literal["float", "fp16", "bf16"] | None = flag(
        None, "precision of the new file; that of the old one when left out"
    )

    def __post_init__(self) -> None:
        require(self.src_path is not None, "--src_path is missing; give the LoRA file to read")
        require(self.dst is not None, "--dst is missing; give the program that is to read the file")
        if self.dst_path is None or self.dst_path.is_dir():
            raise SettingsError(f"--dst_path: {self.dst_path or 'it is missing'}; give the name of the file to write")
        if self.dst_path.suffix.lower() != ".safetensors":
            raise SettingsError(f"--dst_path: {self.dst_path} must end in .safetensors, which all these programs read")
        if (
            self.src_path
            and self.src_path.exists()
            and self.dst_path.exists()
            and self.src_path.samefile(self.dst_path)
        ):
            raise SettingsError(f"--dst_path: {self.dst_path} is the file that is read; give another name")


def convert(source: Path, target: Path, form: str, precision: str | None) -> None:
    """Reads, converts and writes a file.

    Args:
        source: LoRA file.
        target: the file to write.
        form: program that is to read it, see ``networks.lora_forms``.
        precision: ``--save_precision``.

    Raises:
        NetworkError: it is no LoRA file of this model, or nothing of it can be converted.
        SettingsError: the new file's folder cannot be written to.
        OSError: the new file cannot be written.
    """
    from library.files import prepare_target, write_safetensors
    from networks.lora_files import content_hashes, read_lora_file, read_metadata
    from networks.lora_forms import PRECISION, dtype_of, factors_of, form_of, to_form

    tensors = read_lora_file(source)
    factors = factors_of(tensors, str(source))
    dtype = PRECISION[precision] if precision else dtype_of(tensors)
    converted = to_form(factors, form, dtype, str(source))
    metadata = read_metadata(source)
    prepare_target("--dst_path", target)
    write_safetensors(target, converted.tensors, metadata | content_hashes(converted.tensors, metadata))
    logger.info("%s: names of %s, %d tensors", source, form_of(list(tensors)), len(tensors))
    if converted.left_out:
        logger.warning(
            "%s: %d modules of Gemma2 are left out, because %s loads a LoRA for the transformer alone; pictures there miss"
            " what they do",
            target,
            len(converted.left_out),
            form,
        )
    logger.info("%s: names of %s, %d tensors", target, form_of(list(converted.tensors)), len(converted.tensors))


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and converts."""
    specs = specs_of(ConvertFlags)
    parser = build_parser("Converts a LoRA file for Lumina Image 2.0 into another program's form.", [("files", specs)])
    flags = from_given(ConvertFlags, read_command_line(parser, {spec.name: spec for spec in specs}, argv))
    convert(Path(str(flags.src_path)), Path(str(flags.dst_path)), str(flags.dst), flags.save_precision)


if __name__ == "__main__":
    run_program(main)
