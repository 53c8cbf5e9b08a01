"""Merges LoRA files: several into one, one into a smaller rank, or all into a model file.

    python networks/merge_lumina_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --save_to both.safetensors

See docs/lora_files.md.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, Python looks in this folder alone

from library.command_line import build_parser, read_command_line
from library.console import run_program
from library.errors import SettingsError
from library.settings import flag, from_given, require, require_positive, specs_of

if TYPE_CHECKING:
    import torch

    from networks.lora_files import Factors

logger = logging.getLogger("merge_lumina_lora")


@dataclasses.dataclass(frozen=True)
class MergeFlags:
    """Which files become what."""

    models: tuple[Path, ...] = flag((), "LoRA files to merge, in any program's form")
    ratios: tuple[float, ...] = flag((), "strength of each of them; 1 when left out")
    save_to: Path | None = flag(None, "file to write, ending in .safetensors")
    pretrained_model_name_or_path: Path | None = flag(
        None, "model file to merge them into: transformer, Gemma2 or all-in-one; without it the result is one LoRA file"
    )
    new_rank: int | None = flag(None, "largest rank of the resulting LoRA, which then is the closest one of that rank")
    save_precision: Literal["float", "fp16", "bf16"] | None = flag(
        None, "precision of the new file; that of the old ones when left out"
    )

    def __post_init__(self) -> None:
        require(bool(self.models), "--models is missing; give the LoRA files to merge")
        if self.ratios and len(self.ratios) != len(self.models):
            raise SettingsError(
                f"--ratios: {len(self.ratios)} numbers for {len(self.models)} files in --models; give one for each, or none"
            )
        if self.save_to is None or self.save_to.is_dir():
            raise SettingsError(f"--save_to: {self.save_to or 'it is missing'}; give the name of the file to write")
        if self.save_to.suffix.lower() != ".safetensors":
            raise SettingsError(f"--save_to: {self.save_to} must end in .safetensors")
        require_positive(self, "new_rank")
        model = self.pretrained_model_name_or_path
        for path in (*self.models, *([model] if model else [])):
            if path.exists() and self.save_to.exists() and path.samefile(self.save_to):
                raise SettingsError(f"--save_to: {self.save_to} is one of the files that are read; give another name")
        require(
            model is None or self.new_rank is None,
            "--new_rank is for a LoRA file and --pretrained_model_name_or_path makes none; leave one of them out",
        )


def merge(flags: MergeFlags) -> None:
    """Reads, merges and writes.

    Raises:
        UserError: a file cannot be read, or they do not fit together.
        OSError: the new file cannot be written.
    """
    from library.files import prepare_target
    from networks.lora_files import read_lora_file
    from networks.lora_forms import dtype_of, factors_of
    from networks.lora_sum import summed

    files = [read_lora_file(path) for path in flags.models]
    loras = [factors_of(tensors, str(path)) for tensors, path in zip(files, flags.models, strict=True)]
    ratios = flags.ratios or (1.0,) * len(loras)
    for path, ratio, lora in zip(flags.models, ratios, loras, strict=True):
        logger.info("%s: %d modules, strength %g", path, len(lora), ratio)
    total = summed(list(zip(loras, ratios, strict=True)))
    require(bool(total), "--ratios: all are 0, so nothing is left to merge")
    target = Path(str(flags.save_to))
    prepare_target("--save_to", target)
    if flags.pretrained_model_name_or_path is not None:
        _into_model(flags, flags.pretrained_model_name_or_path, total)
    else:
        _into_lora(flags, total, dtype_of(*files))


def _into_lora(flags: MergeFlags, total: Mapping[str, Factors], dtype: torch.dtype) -> None:
    from library.files import write_safetensors
    from networks.lora_files import content_hashes
    from networks.lora_forms import PRECISION, to_form
    from networks.lora_sum import reduced

    if flags.new_rank is not None:
        smaller = reduced(total, flags.new_rank)
        total = smaller.factors
        least = min(smaller.kept, key=smaller.kept.__getitem__)
        logger.info(
            "rank %d keeps %.1f %% of the changes of weights (norm, mean over modules); least of %s: %.1f %%",
            flags.new_rank,
            100 * sum(smaller.kept.values()) / len(smaller.kept),
            least,
            100 * smaller.kept[least],
        )
    target = Path(str(flags.save_to))
    if flags.save_precision:
        dtype = PRECISION[flags.save_precision]
    form = to_form(total, "sd-scripts", dtype, ", ".join(map(str, flags.models)))
    ranks = {one.down.shape[0] for one in total.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    metadata = _common_metadata(flags.models) | {"ss_network_dim": rank, "ss_network_alpha": rank}
    metadata |= {"modelspec.title": target.stem, "modelspec.merged_from": ", ".join(path.stem for path in flags.models)}
    write_safetensors(target, form.tensors, metadata | content_hashes(form.tensors, metadata))
    logger.info("%s: %d modules, rank %s", target, len(total), rank)


def _into_model(flags: MergeFlags, model: Path, total: Mapping[str, Factors]) -> None:
    from networks.lora_checkpoint import places_of, read_entries, write_merged

    entries, metadata = read_entries(model)
    places = places_of(total, entries, model)
    left_out = [name for name in total if name not in places]
    if left_out:
        logger.warning(
            "%s: %d LoRA modules are left out, because the model that they are for is not in this file (%s, ...); merge them"
            " into that one's file",
            model,
            len(left_out),
            left_out[0],
        )
    metadata.pop("modelspec.hash_sha256", None)  # of the old weights
    metadata["modelspec.merged_from"] = ", ".join(path.stem for path in (model, *flags.models))
    target = Path(str(flags.save_to))
    precision = {None: None, "float": "F32", "fp16": "F16", "bf16": "BF16"}[flags.save_precision]
    write_merged(model, target, total, places, precision, metadata)
    logger.info("%s: %d of %d weights changed", target, len(places), len(entries))


def _common_metadata(files: Sequence[Path]) -> dict[str, str]:
    """Returns those entries that all files have in common, without what speaks of a file's tensors."""
    from networks.lora_files import read_metadata

    first, *others = (read_metadata(path) for path in files)
    return {name: text for name, text in first.items() if all(other.get(name) == text for other in others)}


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and merges."""
    specs = specs_of(MergeFlags)
    parser = build_parser("Merges LoRA files for Lumina Image 2.0.", [("files", specs)])
    merge(from_given(MergeFlags, read_command_line(parser, {spec.name: spec for spec in specs}, argv)))


if __name__ == "__main__":
    run_program(main)
