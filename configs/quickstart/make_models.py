"""Makes very small models with the layout of the real ones: for the quickstart, and for the tests.

    python configs/quickstart/make_models.py --output_dir DIR --train_ae_steps 900 --train_dit_steps 6000

Everything is made here from fixed seeds; nothing is downloaded. The three files are read by the same code as the real
2.6 B model. The steps teach them generated pictures (see teach_models.py), which takes about half an hour on one CPU core;
without them the weights stay random.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.files import write_bytes, write_json, write_safetensors
from library.lumina.configs import AutoencoderConfig, Gemma2TextConfig, NextDiTConfig, Shape
from library.lumina.key_maps import diffusers_next_dit_names, original_autoencoder_name

logger = logging.getLogger(__name__)

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "cyan", "white", "black", "grey", "brown")
SHAPES = ("disc", "square", "triangle", "ring", "cross", "stripes", "gradient", "checkerboard")
_TEXT = """
a an the of on in with and or to from by at is are it this that image picture photo drawing painting background large
small big tiny left right top bottom centre middle soft bright dark light smooth sharp vertical horizontal diagonal
assistant designed generate high quality images based user prompts superior degree text alignment textual Prompt Start
You best worst low person cat dog house tree sky sun moon sea water mountain flower car street city night day style
simple flat clean colourful colour shape shapes line lines pattern circle round wide narrow two three four one
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Sizes:
    """The sizes of a set of models; the number of tokens is set by the tokenizer."""

    dit: NextDiTConfig
    gemma2: Gemma2TextConfig
    ae: AutoencoderConfig
    vocab_size: int


SIZES = {
    "tiny": Sizes(
        NextDiTConfig(
            dim=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=24, ffn_dim=64, time_dim=48, cap_dim=32
        ),
        Gemma2TextConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, max_position_embeddings=512, query_pre_attn_scalar=16, sliding_window=256,
        ),
        AutoencoderConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
        vocab_size=384,
    ),
    "quickstart": Sizes(
        NextDiTConfig(
            dim=96, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=24, ffn_dim=256, time_dim=96, cap_dim=64
        ),
        Gemma2TextConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=1024, query_pre_attn_scalar=16, sliding_window=512,
        ),
        AutoencoderConfig(block_out_channels=(16, 32, 48, 64), layers_per_block=1, norm_num_groups=8),
        vocab_size=512,
    ),
}  # fmt: skip


@dataclass
class Models:
    """Three models' tensors (float32; the autoencoder under diffusers' names) and the tokenizer."""

    dit_config: NextDiTConfig
    gemma2_config: Gemma2TextConfig
    ae_config: AutoencoderConfig
    tokenizer: bytes
    dit: dict[str, Tensor] = field(default_factory=dict)
    gemma2: dict[str, Tensor] = field(default_factory=dict)
    ae: dict[str, Tensor] = field(default_factory=dict)


def make_models(size: str = "tiny", seed: int = 0) -> Models:
    """Returns models with random weights; every part has an effect on the output."""
    sizes = SIZES[size]
    tokenizer, num_pieces = train_tokenizer(sizes.vocab_size)
    gemma2_config = dataclasses.replace(sizes.gemma2, vocab_size=num_pieces)
    models = Models(sizes.dit, gemma2_config, sizes.ae, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    models.dit = _random_tensors(sizes.dit.tensor_shapes(), generator, norms_at=1.0)
    # Gemma's norms multiply by 1 + weight, and its embeddings are multiplied by sqrt(width).
    shapes = gemma2_config.tensor_shapes() | gemma2_config.unused_shapes()
    models.gemma2 = _random_tensors(shapes, generator, norms_at=0.0)
    models.ae = _random_tensors(sizes.ae.tensor_shapes(), generator, norms_at=1.0)
    return models


def _random_tensors(shapes: Mapping[str, Shape], generator: torch.Generator, norms_at: float) -> dict[str, Tensor]:
    """Returns normal weights of variance 1 / inputs, norms near ``norms_at``, small biases."""
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensors[name] = noise / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(".bias"):
            tensors[name] = noise * 0.05
        else:
            tensors[name] = norms_at + noise * 0.05
    return tensors


def sentences() -> Iterator[str]:
    """Gives the text that the tokenizer is trained on."""
    chooser = random.Random(0)
    yield "You are an assistant designed to generate high-quality images based on user prompts. <Prompt Start> "
    for _ in range(2000):
        yield " ".join(chooser.choices(WORDS, k=4))
        yield f"a {chooser.choice(COLOURS)} {chooser.choice(SHAPES)} on a {chooser.choice(COLOURS)} background"


def train_tokenizer(vocab_size: int) -> tuple[bytes, int]:
    """Returns a sentencepiece model with Gemma's settings and special tokens, and its number of pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return model.getvalue(), processor.GetPieceSize()


def ae_in_original_names(models: Models) -> dict[str, Tensor]:
    """Returns the autoencoder under the original names, where the attention's matrices are 1x1 convolutions."""
    levels = len(models.ae_config.block_out_channels)
    renamed = {}
    for name, tensor in models.ae.items():
        is_projection = ".attentions." in name and tensor.dim() == 2
        renamed[original_autoencoder_name(name, levels)] = tensor[:, :, None, None] if is_projection else tensor
    return renamed


def gemma2_json(models: Models) -> dict[str, Any]:
    """Returns Gemma2's configuration as transformers writes it."""
    return {"model_type": "gemma2", **dataclasses.asdict(models.gemma2_config)}


def ae_json(models: Models) -> dict[str, Any]:
    """Returns the autoencoder's configuration as diffusers writes it."""
    return {"_class_name": "AutoencoderKL", **dataclasses.asdict(models.ae_config)}


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _spiece(models: Models) -> Tensor:
    return torch.frombuffer(bytearray(models.tokenizer), dtype=torch.uint8)


def write_files(
    models: Models, folder: Path, dtype: torch.dtype = torch.bfloat16, ae_dtype: torch.dtype = torch.float16
) -> tuple[Path, Path, Path]:
    """Writes the transformer, Gemma2 (with its tokenizer inside) and the autoencoder as one file each; returns them."""
    paths = tuple(folder / f"quickstart_{part}.safetensors" for part in ("dit", "gemma2", "ae"))
    write_safetensors(paths[0], _cast(models.dit, dtype), None)
    gemma2 = {f"model.{name}": tensor for name, tensor in models.gemma2.items()} | {"spiece_model": _spiece(models)}
    write_safetensors(paths[1], _cast(gemma2, dtype), {"config": json.dumps(gemma2_json(models))})
    write_safetensors(paths[2], _cast(ae_in_original_names(models), ae_dtype), {"config": json.dumps(ae_json(models))})
    return paths[0], paths[1], paths[2]


def write_all_in_one(models: Models, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes all three models into one file, named as ComfyUI names them."""
    gemma2 = "text_encoders.gemma2_2b."
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in models.dit.items()}
    tensors |= {f"{gemma2}transformer.model.{name}": tensor for name, tensor in models.gemma2.items()}
    tensors |= {f"vae.{name}": tensor for name, tensor in ae_in_original_names(models).items()}
    tensors |= {f"{gemma2}logit_scale": torch.tensor(1.0), "text_encoders.spiece_model": _spiece(models)}
    metadata = {"gemma2_config": json.dumps(gemma2_json(models)), "ae_config": json.dumps(ae_json(models))}
    write_safetensors(path, _cast(tensors, dtype), metadata)


def dit_in_diffusers_names(models: Models) -> dict[str, Tensor]:
    """Returns the transformer as diffusers names it: q, k and v apart, without the unused final norm."""
    config = models.dit_config
    query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    renamed: dict[str, Tensor] = {}
    for name, tensor in models.dit.items():
        names = diffusers_next_dit_names(name)
        parts = [part.clone() for part in tensor.split([query_dim, kv_dim, kv_dim])] if len(names) == 3 else [tensor]
        renamed |= dict(zip(names, parts, strict=False))
    return renamed


def write_folder(models: Models, folder: Path, dtype: torch.dtype = torch.bfloat16, gemma2_shards: int = 1) -> None:
    """Writes a pipeline's root folder as diffusers and transformers lay it out."""
    transformer = {"_class_name": "Lumina2Transformer2DModel", "hidden_size": models.dit_config.dim}
    write_json(folder / "model_index.json", {"_class_name": "Lumina2Pipeline"})
    write_json(folder / "transformer" / "config.json", transformer)
    write_safetensors(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        _cast(dit_in_diffusers_names(models), dtype),
        None,
    )
    write_json(folder / "vae" / "config.json", ae_json(models))
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", _cast(models.ae, dtype), None)
    write_json(folder / "text_encoder" / "config.json", gemma2_json(models))
    _write_shards(_cast(models.gemma2, dtype), folder / "text_encoder", gemma2_shards)
    write_bytes(folder / "tokenizer" / "tokenizer.model", models.tokenizer)


def _write_shards(tensors: Mapping[str, Tensor], folder: Path, count: int) -> None:
    if count == 1:
        write_safetensors(folder / "model.safetensors", tensors, None)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for index in range(count):
        shard = f"model-{index + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[index::count]}
        write_safetensors(folder / shard, part, None)
        weight_map |= dict.fromkeys(part, shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def main() -> None:
    """Makes the files that the command line asks for."""
    parser = argparse.ArgumentParser(description="Makes very small models with the layout of the real ones.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "models", help="where the files go")
    parser.add_argument("--size", choices=sorted(SIZES), default="quickstart", help="how large the models are")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--train_ae_steps", type=int, default=0, help="steps that teach the autoencoder to reconstruct")
    parser.add_argument("--train_dit_steps", type=int, default=0, help="steps that teach the transformer to draw")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    models = make_models(options.size, options.seed)
    if options.train_ae_steps or options.train_dit_steps:
        from configs.quickstart.teach_models import teach_autoencoder, teach_next_dit

        if options.train_ae_steps:
            teach_autoencoder(models, options.train_ae_steps, options.seed)
            write_files(models, options.output_dir)
        if options.train_dit_steps:
            teach_next_dit(models, options.train_dit_steps, options.seed)
    for path in write_files(models, options.output_dir):
        logger.info("%s: %.2f MB", path, path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
