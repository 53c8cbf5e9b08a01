"""What is asked for: the prompts of the flags or of a file, several pictures of each, and their seeds."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from library.errors import SettingsError
from library.inference.settings import CompareFlags, PictureFlags
from library.prompts import FILE_OPTIONS, MAX_SEED, Prompt, PromptFileKind, options_within, read_prompt_file

logger = logging.getLogger(__name__)

_RANDOM_SEEDS = 2**32


def asked_prompts(flags: PictureFlags, given: Collection[str]) -> list[Prompt]:
    """Returns one prompt for each picture that is to be drawn, with its seed.

    Args:
        flags: what to draw.
        given: names of the flags that are on the command line; what has no effect is warned about.

    Raises:
        PromptError: the prompt file is wrong.
    """
    common = flags.to_prompt().rounded()
    if flags.from_file is None:
        _warn_of_options_in({"prompt": flags.prompt, "negative_prompt": flags.negative_prompt})
        prompts = [common]
    else:
        if "prompt" in given:
            logger.warning("--prompt: no effect beside --from_file, whose prompts are drawn; add it to the file")
        prompts = read_prompt_file(
            flags.from_file, PromptFileKind("--from_file", FILE_OPTIONS, defaults=replace(common, prompt=""))
        )
    return list(_several(prompts, flags.images_per_prompt))


def check_together(flags: PictureFlags, comparison: CompareFlags, given: Collection[str]) -> None:
    """Warns of flags that the interactive program, which draws one picture of each line, makes no use of.

    Raises:
        SettingsError: it is to compare files.
    """
    if flags.interactive and comparison.files:
        raise SettingsError(
            "--interactive and --compare_lora_weights: files are compared on --prompt or --from_file; leave one of the"
            " two out"
        )
    unused = [f"--{name}" for name in ("images_per_prompt", "batch_size") if flags.interactive and name in given]
    if unused:
        logger.warning("%s: no effect with --interactive, which draws one picture of each line", ", ".join(unused))


def _warn_of_options_in(texts: dict[str, str]) -> None:
    """Warns of what works in prompt lines only: sd-scripts' drawing program, too, draws --prompt as it stands."""
    for name, text in texts.items():
        if options := options_within(text):
            logger.warning(
                "--%s has %s in it, drawn as text; such options work in the lines of --from_file and with --interactive,"
                " and this program's own flags, such as --seed, --image_width and --negative_prompt, set the same",
                name,
                " and ".join(options),
            )


def _several(prompts: Sequence[Prompt], count: int) -> Iterable[Prompt]:
    """Yields each prompt with its seed, ``count`` times with seeds that count up."""
    for prompt in prompts:
        first = random.randrange(_RANDOM_SEEDS) if prompt.seed is None else prompt.seed
        for number in range(count):
            yield replace(prompt, seed=(first + number) % (MAX_SEED + 1))
