"""Writes models of the real sizes with random weights, to measure memory and speed without the real checkpoints.

    python tests/bench/make_full_size.py --output_dir DIR            # 2.6 B transformer, Gemma-2-2B, FLUX autoencoder: 11 GB
    python tests/bench/make_full_size.py --output_dir DIR --layers 2  # the same widths, few layers

Precisions are those of the usual files: bf16, fp16, float32. Tensors are drawn and written one by one, so this needs little
memory. The tokenizer is a small one: its tokens are among the model's 256000.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fast_random import NormalNumbers

from configs.quickstart.make_models import train_tokenizer
from library.files import write_safetensors_in_parts
from library.lumina.configs import AutoencoderConfig, Gemma2TextConfig, NextDiTConfig, Shape
from library.lumina.key_maps import original_autoencoder_name

_DTYPES = {"BF16": (torch.bfloat16, 2), "F16": (torch.float16, 2), "F32": (torch.float32, 4)}
_CHUNK = 2**24  # numbers drawn at a time


def write_random(
    path: Path,
    shapes: Mapping[str, Shape],
    dtype: str,
    norms_at: float,
    metadata: Mapping[str, str],
    spiece: bytes = b"",
) -> None:
    """Writes a safetensors file of random weights, tensor by tensor.

    Args:
        path: where to.
        shapes: names and shapes.
        dtype: ``BF16``, ``F16`` or ``F32``.
        norms_at: value of weights with one axis (Gemma's norms multiply by 1 + weight).
        metadata: string metadata of the file.
        spiece: becomes the tensor ``spiece_model``.
    """
    torch_dtype, width = _DTYPES[dtype]
    entries = {name: (dtype, shape, math.prod(shape) * width) for name, shape in shapes.items()}
    if spiece:
        entries["spiece_model"] = ("U8", (len(spiece),), len(spiece))
    numbers = NormalNumbers()
    progress = tqdm(total=len(entries), desc=path.name)

    def parts_of(name: str) -> Iterator[memoryview | bytes]:
        progress.update()
        if name == "spiece_model":
            yield spiece
        else:
            yield from _parts(name, shapes[name], torch_dtype, norms_at, numbers)

    write_safetensors_in_parts(path, entries, parts_of, metadata)
    progress.close()


def _parts(
    name: str, shape: Shape, dtype: torch.dtype, norms_at: float, numbers: NormalNumbers
) -> Iterator[memoryview]:
    total = math.prod(shape)
    for start in range(0, total, _CHUNK):
        count = min(_CHUNK, total - start)
        if len(shape) > 1:
            values = numbers.take(count, 1 / math.sqrt(math.prod(shape[1:])), dtype)
        else:
            values = torch.full((count,), 0.0 if name.endswith(".bias") else norms_at, dtype=dtype)
        yield values.view(torch.uint8).numpy().data


def make(output_dir: Path, layers: int | None = None, shrink: int = 1) -> tuple[Path, Path, Path]:
    """Writes the three files and returns their paths.

    Args:
        output_dir: where to.
        layers: this many layers of the transformer and of Gemma2 instead of all.
        shrink: divides all widths (for tests of this script).
    """
    dit, gemma2, ae = NextDiTConfig(), Gemma2TextConfig(), AutoencoderConfig()
    if layers is not None:
        dit = dataclasses.replace(dit, num_layers=layers)
        gemma2 = dataclasses.replace(gemma2, num_hidden_layers=layers + 1)
    if shrink > 1:
        dit = dataclasses.replace(
            dit, dim=dit.dim // shrink, num_heads=3, num_kv_heads=1, ffn_dim=9216 // shrink,
            time_dim=1024 // shrink, cap_dim=2304 // shrink,
        )  # fmt: skip
        gemma2 = dataclasses.replace(
            gemma2, vocab_size=gemma2.vocab_size // shrink, hidden_size=2304 // shrink, intermediate_size=9216 // shrink
        )
        ae = dataclasses.replace(ae, block_out_channels=(32, 32, 32, 32))
    spiece, _ = train_tokenizer(512)
    paths = tuple(output_dir / f"full_size_{part}.safetensors" for part in ("dit", "gemma2", "ae"))
    write_random(paths[0], dit.tensor_shapes(), "BF16", 1.0, {})
    shapes = {f"model.{name}": shape for name, shape in (gemma2.tensor_shapes() | gemma2.unused_shapes()).items()}
    config = {"config": json.dumps({"model_type": "gemma2", **dataclasses.asdict(gemma2)})}
    write_random(paths[1], shapes, "F16", 0.0, config, spiece)
    levels = len(ae.block_out_channels)
    originals = {original_autoencoder_name(name, levels): shape for name, shape in ae.tensor_shapes().items()}
    config = {"config": json.dumps({"_class_name": "AutoencoderKL", **dataclasses.asdict(ae)})}
    write_random(paths[2], originals, "F32", 1.0, config)
    return paths[0], paths[1], paths[2]


def main() -> None:
    """Reads the command line and writes the files."""
    parser = argparse.ArgumentParser(description="Writes models of the real sizes with random weights.")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the three files go (11 GB)")
    parser.add_argument("--layers", type=int, help="this many layers instead of all")
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths by this")
    options = parser.parse_args()
    make(options.output_dir, options.layers, options.shrink)


if __name__ == "__main__":
    main()
