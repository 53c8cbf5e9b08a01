"""Measures how much Gemma2's attention soft-capping changes the text features, and prints the figures as JSON.

    python tests/bench/softcap_difference.py --gemma2 models/gemma_2_2b_fp16.safetensors
    python tests/bench/softcap_difference.py --gemma2 FILE --prompts "a cat" "a dog" --query_gain 1 8 --dtype fp32

Gemma2 passes every attention logit x through 50 * tanh(x / 50). This project does so; programs that use another
attention kernel leave it out. The features of each prompt are computed with and without it on the same weights. The
difference depends on how large the logits are, so the largest one is reported too. With random weights they are small;
``--query_gain`` multiplies the query projections, to see the difference where they are larger.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.console import run_program
from library.lumina.checkpoint_files import open_checkpoint
from library.lumina.gemma2 import Gemma2Encoder, build_gemma2

# Gemma2 alone is inspected here; everybody else needs all three models.
from library.lumina.loading import ModelPaths, inspect_gemma2
from library.lumina.tokenizer import GemmaTokenizer, find_tokenizer

SYSTEM_PROMPT = "You are an assistant designed to generate high-quality images based on user prompts."
PROMPTS = (
    "a photo of a cat",
    "a watercolour painting of a small house beside a lake, with mountains and a cloudy evening sky behind it",
)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class LargestLogit:
    """Keeps the largest absolute attention logit, before capping, of all positions that attention may look at."""

    def __init__(self, model: Any) -> None:
        """Puts a recording version of the eager attention into ``model``, a transformers ``Gemma2Model``."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward, repeat_kv

        self.value = 0.0

        def recording(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any
        ) -> Any:
            keys = repeat_kv(key, module.num_key_value_groups).float()
            logits = (query.float() @ keys.transpose(2, 3)).abs() * module.scaling
            seen = logits if mask is None else logits.masked_fill(mask < 0, 0.0)
            self.value = max(self.value, float(seen.max()))
            return eager_attention_forward(module, query, key, value, mask, **others)

        AttentionInterface.register("eager_recording", recording)
        AttentionMaskInterface.register("eager_recording", eager_mask)
        model.set_attn_implementation("eager_recording")


def load_encoder(path: Path, tokenizer_dir: Path | None, dtype: torch.dtype, max_tokens: int) -> Gemma2Encoder:
    """Returns the text encoder of a Gemma2 file or folder."""
    checkpoint = open_checkpoint(path, "--gemma2", "text_encoder")
    file = inspect_gemma2(checkpoint, ModelPaths(dit=path, gemma2=path), path, "--gemma2")
    source = find_tokenizer(checkpoint, path, tokenizer_dir, "--tokenizer_cache_dir")
    model = build_gemma2(file.config, file.tensors(dtype))
    return Gemma2Encoder(model, GemmaTokenizer(source.proto, max_tokens), SYSTEM_PROMPT)


@torch.no_grad()
def measure(encoder: Gemma2Encoder, prompts: Sequence[str], gain: float) -> dict[str, Any]:
    """Returns the differences of all prompts with the query projections multiplied by ``gain``.

    Relative differences are |with - without| / |with|: over the whole feature tensor of a prompt, and of the one token
    that changes most.
    """
    layers = encoder.model.layers
    caps = [layer.self_attn.attn_logit_softcapping for layer in layers]
    queries = [layer.self_attn.q_proj for layer in layers]
    originals = [query.weight for query in queries]
    for query, original in zip(queries, originals, strict=True):
        query.weight = torch.nn.Parameter(original * gain, requires_grad=False)
    largest = LargestLogit(encoder.model)
    rows = []
    try:
        for prompt in prompts:
            features = []
            for kept in (True, False):
                for layer, cap in zip(layers, caps, strict=True):
                    layer.self_attn.attn_logit_softcapping = cap if kept else None
                features.append(encoder.encode([prompt])[0].float())
            capped, uncapped = features  # (L,D) each
            difference = capped - uncapped
            by_token = difference.norm(dim=1) / capped.norm(dim=1)
            rows.append(
                {
                    "prompt": prompt,
                    "tokens": capped.shape[0],
                    "relative_difference": float(difference.norm() / capped.norm()),
                    "largest_of_a_token": float(by_token.max()),
                }
            )
    finally:
        for layer, cap in zip(layers, caps, strict=True):
            layer.self_attn.attn_logit_softcapping = cap
        for query, original in zip(queries, originals, strict=True):
            query.weight = original
    return {"query_gain": gain, "softcap": caps[0], "largest_logit": largest.value, "prompts": rows}


def main() -> None:
    """Reads the command line, measures, and prints JSON."""
    parser = argparse.ArgumentParser(description="Measures how much Gemma2's attention soft-capping changes features.")
    parser.add_argument("--gemma2", type=Path, required=True, help="Gemma2 file or folder")
    parser.add_argument("--tokenizer_cache_dir", type=Path, help="folder with tokenizer.model, if the file has none")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), help="captions, without the system prompt")
    parser.add_argument("--query_gain", type=float, nargs="+", default=[1.0], help="factors on the query projections")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32", help="precision of the computation")
    options = parser.parse_args()
    encoder = load_encoder(options.gemma2, options.tokenizer_cache_dir, _DTYPES[options.dtype], max_tokens=256)
    import transformers

    result = {
        "gemma2": options.gemma2.name,
        "layers_computed": len(encoder.model.layers),
        "width": encoder.model.config.hidden_size,
        "dtype": options.dtype,
        "device": "cpu",
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": [measure(encoder, options.prompts, gain) for gain in options.query_gain],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_program(main)
