"""Draws pictures with Lumina Image 2.0 and LoRA files.

    python lumina_minimal_inference.py --pretrained_model_name_or_path ... --lora_weights "my.safetensors;0.8" --prompt ...

See docs/lumina_train_network.md.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit("This program needs Python 3.11 or newer; this is Python %d.%d." % sys.version_info[:2])

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.command_line import build_parser, read_command_line
from library.console import run_program
from library.errors import SettingsError
from library.files import check_writable
from library.inference.comparison import compare
from library.inference.interactive import interact
from library.inference.loras import LoraFiles
from library.inference.models import DrawingModels
from library.inference.painter import Painter
from library.inference.requests import asked_prompts, check_together
from library.inference.settings import CompareFlags, ModelFlags, PictureFlags
from library.lumina.prompt_template import say_what_was_left_out
from library.memory.device_memory import let_segments_grow
from library.memory.settings import AttentionSettings, QuantisationSettings
from library.settings import from_given, specs_of

if TYPE_CHECKING:
    from torch import nn


def read_network(path: Path, multiplier: float, encoder: nn.Module, dit: nn.Module) -> Any:
    """Returns the network of a LoRA file for Gemma2 and the Next-DiT, not attached yet.

    Raises:
        NetworkError: the file is no LoRA of these models.
    """
    from networks import lora_lumina

    network, _ = lora_lumina.create_network_from_weights(multiplier, path, None, [encoder], dit, for_inference=True)
    return network


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and draws."""
    groups = {
        "models": ModelFlags,
        "attention": AttentionSettings,
        "quantised weights": QuantisationSettings,
        "picture": PictureFlags,
        "comparing LoRA files": CompareFlags,
    }
    parser = build_parser(
        "Draws pictures with Lumina Image 2.0 and LoRA files.",
        [(title, specs_of(settings_class)) for title, settings_class in groups.items()],
    )
    specs = {spec.name: spec for settings_class in groups.values() for spec in specs_of(settings_class)}
    given = read_command_line(parser, specs, argv)
    flags, pictures = from_given(ModelFlags, given), from_given(PictureFlags, given)
    quantisation = from_given(QuantisationSettings, given)
    if quantisation.fp8_fast and flags.dtype not in ("bf16", "bfloat16"):
        raise SettingsError(
            f"--fp8_fast multiplies in fp8 and gives bf16, and --dtype is {flags.dtype}; leave one of them out"
        )
    comparison = from_given(CompareFlags, given)
    check_together(pictures, comparison, given)
    prompts = [] if pictures.interactive else asked_prompts(pictures, given)
    check_writable("--output_dir", pictures.output_dir)
    let_segments_grow()
    say_what_was_left_out(given.get("system_prompt", ""), pictures.system_prompt)
    known = [pictures.caption_template.text(prompt.prompt) for prompt in prompts]
    loras = LoraFiles(flags.lora_weights, flags.merge_lora_weights, read_network, known, comparison.files)
    for prompt in prompts:
        loras.check_multipliers(prompt.multipliers)
    models = DrawingModels(
        flags,
        from_given(AttentionSettings, given),
        quantisation,
        loras,
        pictures.gemma2_max_token_length,
        pictures.caption_template,
    )
    painter = Painter(models, loras, pictures)
    if pictures.interactive:
        interact(painter, pictures.to_prompt())
    elif comparison.files:
        compare(painter, prompts, comparison, pictures.output_dir)
    else:
        painter.draw(prompts)


if __name__ == "__main__":
    run_program(main)
