"""The same weights from every kind of source, and the memory they do not take."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_helpers import tiny_models, write_tiny_files
from safetensors.torch import load_file, save_file

from configs.quickstart.make_models import write_all_in_one, write_folder
from library.errors import ModelFileError
from library.lumina.loading import (
    ModelPaths,
    autoencoder_fingerprint,
    gemma2_fingerprint,
    inspect_models,
    load_autoencoder,
    load_next_dit,
)

ROOT = Path(__file__).resolve().parents[3]


def three_files(folder: Path) -> ModelPaths:
    return write_tiny_files(folder)


def all_in_one(folder: Path) -> ModelPaths:
    write_all_in_one(tiny_models(), folder / "all.safetensors", torch.float32)
    return ModelPaths(dit=folder / "all.safetensors")


def root_folder(folder: Path) -> ModelPaths:
    write_folder(tiny_models(), folder / "pipeline", torch.float32)
    return ModelPaths(dit=folder / "pipeline")


def component_folders(folder: Path) -> ModelPaths:
    write_folder(tiny_models(), folder / "pipeline", torch.float32, gemma2_shards=3)
    root = folder / "pipeline"
    return ModelPaths(dit=root / "transformer", gemma2=root / "text_encoder", ae=root / "vae")


def shards_without_index(folder: Path) -> ModelPaths:
    paths = component_folders(folder)
    (folder / "pipeline" / "text_encoder" / "model.safetensors.index.json").unlink()
    return paths


def only_the_transformers_folder_of_a_pipeline(folder: Path) -> ModelPaths:
    return ModelPaths(dit=root_folder(folder).dit / "transformer")


def the_file_inside_each_folder(folder: Path) -> ModelPaths:
    root, name = root_folder(folder).dit, "diffusion_pytorch_model.safetensors"
    gemma2 = root / "text_encoder" / "model.safetensors"
    return ModelPaths(dit=root / "transformer" / name, gemma2=gemma2, ae=root / "vae" / name, tokenizer_dir=root)


def prefixed(prefixes: tuple[str, str, str]) -> Callable[[Path], ModelPaths]:
    def write(folder: Path) -> ModelPaths:
        paths = write_tiny_files(folder)
        for path, prefix in zip((paths.dit, paths.gemma2, paths.ae), prefixes, strict=True):
            rewrite(path, lambda tensors, prefix=prefix: with_prefix(tensors, prefix))
        return paths

    write.__name__ = " ".join(prefixes)
    return write


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name if name == "spiece_model" else prefix + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }


def rewrite(path: Path | None, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replaces a file's tensors, keeping its metadata."""
    from safetensors import safe_open

    assert path is not None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata=metadata)


SOURCES = [
    three_files,
    all_in_one,
    root_folder,
    component_folders,
    shards_without_index,
    only_the_transformers_folder_of_a_pipeline,
    the_file_inside_each_folder,
    prefixed(("model.diffusion_model.", "text_encoders.gemma2_2b.transformer.model.", "vae.")),
    prefixed(("diffusion_model.", "", "first_stage_model.")),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_source_gives_the_same_weights(tmp_path: Path, source: Callable[[Path], ModelPaths]) -> None:
    files = inspect_models(source(tmp_path))
    models = tiny_models()
    assert files.dit.config == models.dit_config
    assert files.gemma2.config == models.gemma2_config
    assert files.ae.config == models.ae_config
    dit = files.dit.tensors(torch.float32)
    expected = models.dit
    if "norm_final.weight" not in files.dit.sources or not files.dit.sources["norm_final.weight"].entries:
        expected = models.dit | {"norm_final.weight": torch.ones(models.dit_config.dim)}  # diffusers leaves it out
    assert_same(dit, expected)
    used = {name: models.gemma2[name] for name in models.gemma2_config.tensor_shapes()}
    assert_same(files.gemma2.tensors(torch.float32), used)
    assert_same(files.ae.tensors(torch.float32), models.ae)
    assert files.tokenizer.proto == models.tokenizer


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(ours[name], expected[name])]
    assert not different


def test_the_models_hold_what_the_files_hold(tmp_path: Path) -> None:
    files = inspect_models(three_files(tmp_path))
    models = tiny_models()
    dit = load_next_dit(files.dit, torch.float32)
    assert_same(dit.state_dict(), models.dit)
    assert not dit.training
    assert not any(parameter.requires_grad for parameter in dit.parameters())
    ae = load_autoencoder(files.ae, torch.float32)
    assert_same(ae.model.state_dict(), models.ae)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_read_as_the_wanted_one(tmp_path: Path, dtype: torch.dtype, mmap: bool) -> None:
    paths = dataclasses.replace(write_tiny_files(tmp_path, dtype), mmap=mmap)
    files = inspect_models(paths)
    for wanted in (torch.float32, torch.bfloat16):
        expected = {name: tensor.to(dtype).to(wanted) for name, tensor in tiny_models().dit.items()}
        assert_same(files.dit.tensors(wanted), expected)


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", ["none", "scale_weight", "weight_scale"])
@pytest.mark.parametrize("mmap", [True, False])
def test_fp8_files_are_read_with_their_scales(tmp_path: Path, fp8: torch.dtype, scale: str, mmap: bool) -> None:
    paths = dataclasses.replace(write_tiny_files(tmp_path), mmap=mmap)

    def quantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for name, tensor in tensors.items():
            if tensor.dim() != 2:
                result[name] = tensor.bfloat16()
                continue
            # One scale for the tensor, or one for each output row.
            top = tensor.abs().amax() if "qkv" in name else tensor.abs().amax(dim=1, keepdim=True)
            factor = torch.ones(()) if scale == "none" else top.float() / 400
            result[name] = (tensor / factor).to(fp8)
            if scale != "none":
                result[f"{name.removesuffix('weight')}{scale}"] = factor.squeeze()
        return result | ({} if scale == "none" else {"scaled_fp8": torch.zeros(0, dtype=fp8)})

    rewrite(paths.dit, quantise)
    read = inspect_models(paths).dit.tensors(torch.float32)
    # Half a step of 3 (e4m3) or 2 (e5m2) mantissa bits; weights below fp8's smallest normal number lose more.
    step = 2.0**-4 if fp8 == torch.float8_e4m3fn else 2.0**-3
    for name, tensor in tiny_models().dit.items():
        if tensor.dim() == 2:
            torch.testing.assert_close(read[name], tensor, rtol=step, atol=2e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let a mapped file be written to")
def test_a_file_of_the_wanted_dtype_is_used_in_place(tmp_path: Path) -> None:
    """Bytes written to the file afterwards show in the model, so its weights are the file's pages and no copy."""
    files = inspect_models(write_tiny_files(tmp_path, torch.bfloat16))
    model = load_next_dit(files.dit, torch.bfloat16)
    weight = model.layers[0].attention.qkv.weight
    assert weight.abs().max() > 0
    entry = files.dit.sources["layers.0.attention.qkv.weight"].entries[0]
    with files.dit.path.open("r+b") as file:
        file.seek(entry.start)
        file.write(bytes(entry.end - entry.start))
    assert weight.abs().max() == 0


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("layout", [three_files, root_folder])
def test_what_is_converted_or_joined_is_not_mapped_and_keeps_no_file(
    tmp_path: Path, layout: Callable[[Path], ModelPaths], mmap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped pages would count as memory beside the converted copy."""
    import safetensors

    opened = []

    def counted(path: Path, framework: str) -> object:
        opened.append(path)
        return original(path, framework=framework)

    original = safetensors.safe_open
    paths = dataclasses.replace(layout(tmp_path), mmap=mmap)
    monkeypatch.setattr("safetensors.safe_open", counted)
    monkeypatch.setattr("library.lumina.tensor_reader._PART_BYTES", 4096)  # so that tensors come in several parts
    files = inspect_models(paths)
    for component, expected in ((files.dit, tiny_models().dit), (files.ae, tiny_models().ae)):
        in_other_precision = {name: tensor.bfloat16() for name, tensor in expected.items()}
        in_other_precision.pop("norm_final.weight", None)  # a folder has none
        read = component.tensors(torch.bfloat16)
        read.pop("norm_final.weight", None)
        assert_same(read, in_other_precision)
    assert not opened
    files.dit.tensors(torch.float32)
    assert len(opened) == mmap  # each file once


def test_fingerprints_differ_for_other_weights_and_only_then(tmp_path: Path) -> None:
    first = inspect_models(three_files(tmp_path / "a"))
    again = inspect_models(all_in_one(tmp_path))
    assert first.gemma2.fingerprint == again.gemma2.fingerprint
    assert first.dit.fingerprint == again.dit.fingerprint
    assert first.ae.fingerprint == again.ae.fingerprint
    paths = three_files(tmp_path / "b")
    for path in (paths.dit, paths.gemma2, paths.ae):
        rewrite(path, lambda tensors: {n: t if t.dtype == torch.uint8 else t * 1.001 for n, t in tensors.items()})
    other = inspect_models(paths)
    for name in ("dit", "gemma2", "ae"):
        assert getattr(first, name).fingerprint != getattr(other, name).fingerprint


def test_a_change_of_a_few_bytes_anywhere_changes_the_fingerprint(tmp_path: Path) -> None:
    paths = three_files(tmp_path)
    before = inspect_models(paths).gemma2.fingerprint
    assert inspect_models(paths).gemma2.fingerprint == before
    # The last row of the embedding, as a tool that mends a few tokens would change it.
    rewrite(
        paths.gemma2,
        lambda tensors: {n: torch.cat([t[:-1], t[-1:] + 1]) if "embed_tokens" in n else t for n, t in tensors.items()},
    )
    assert inspect_models(paths).gemma2.fingerprint != before


def test_fingerprints_cover_what_features_depend_on(tmp_path: Path) -> None:
    files = inspect_models(three_files(tmp_path))
    text = {
        gemma2_fingerprint(files, torch.float32, 64, "Draw."),
        gemma2_fingerprint(files, torch.bfloat16, 64, "Draw."),
        gemma2_fingerprint(files, torch.float32, 65, "Draw."),
        gemma2_fingerprint(files, torch.float32, 64, "Paint."),
    }
    assert len(text) == 4
    assert autoencoder_fingerprint(files.ae, torch.float32) != autoencoder_fingerprint(files.ae, torch.bfloat16)


def test_inspecting_imports_nothing_heavy(tmp_path: Path) -> None:
    paths = three_files(tmp_path)
    code = (
        "import sys; from pathlib import Path; from library.lumina.loading import *;"
        f"f = inspect_models(ModelPaths(Path({str(paths.dit)!r}), Path({str(paths.gemma2)!r}), Path({str(paths.ae)!r})));"
        "f.dit.fingerprint; f.load_tokenizer(9);"
        "print([name for name in ('torch', 'transformers', 'diffusers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_loading_prints_nothing(tmp_path: Path) -> None:
    """In a process of its own, because the packages print what they have to say when they are first imported."""
    paths = three_files(tmp_path)
    code = (
        "import torch; from pathlib import Path; from library.lumina.loading import *;"
        f"f = inspect_models(ModelPaths(Path({str(paths.dit)!r}), Path({str(paths.gemma2)!r}), Path({str(paths.ae)!r})));"
        "load_next_dit(f.dit, torch.float32); load_gemma2(f, torch.float32, 9, 'x').encode(['a']);"
        "load_autoencoder(f.ae, torch.float32)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""


def test_single_file_is_named_for_its_hash(tmp_path: Path) -> None:
    files = inspect_models(component_folders(tmp_path))
    assert files.dit.single_file == files.dit.path / "diffusion_pytorch_model.safetensors"
    assert files.gemma2.single_file is None
    single = inspect_models(three_files(tmp_path))
    assert single.dit.single_file == single.dit.path


def test_the_last_layer_of_gemma2_need_not_be_there(tmp_path: Path) -> None:
    paths = three_files(tmp_path)
    unused = {f"model.{name}" for name in tiny_models().gemma2_config.unused_shapes()}
    rewrite(paths.gemma2, lambda tensors: {name: t for name, t in tensors.items() if name not in unused})
    assert_same(
        inspect_models(paths).gemma2.tensors(torch.float32),
        {name: tiny_models().gemma2[name] for name in tiny_models().gemma2_config.tensor_shapes()},
    )


def test_harmless_extras_are_allowed(tmp_path: Path) -> None:
    paths = three_files(tmp_path)
    rewrite(paths.gemma2, lambda tensors: tensors | {"lm_head.weight": torch.zeros(2, 2), "logit_scale": torch.ones(1)})
    rewrite(paths.dit, lambda tensors: {n: t for n, t in tensors.items() if n != "norm_final.weight"})
    files = inspect_models(paths)
    assert torch.equal(files.dit.tensors(torch.float32)["norm_final.weight"], torch.ones(48))


@pytest.mark.parametrize(
    ("part", "change", "parts"),
    [
        (
            "dit",
            lambda t: {n: x for n, x in t.items() if n != "layers.1.feed_forward.w2.weight"},
            [
                "--pretrained_model_name_or_path",
                "1 tensor is missing (layers.1.feed_forward.w2.weight)",
                "not a whole or unchanged one",
            ],
        ),
        ("dit", lambda t: t | {"layers.0.extra": torch.zeros(1)}, ["1 tensor is unexpected (layers.0.extra)"]),
        (
            "dit",
            lambda t: t | {"x_embedder.bias": torch.zeros(3), "layers.1.ffn_norm1.weight": torch.zeros(9)},
            ["2 tensors are of another shape (x_embedder.bias is [3], not [48], layers.1.ffn_norm1.weight is [9]"],
        ),
        (
            "dit",
            lambda t: {n: x for n, x in t.items() if "cap_embedder" not in n},
            ["the tensor cap_embedder.1.weight is missing"],
        ),
        (
            "dit",
            lambda t: {n: x for n, x in t.items() if "layers.0.attention" not in n},
            ["the tensor layers.0.attention.q_norm.weight is missing"],
        ),
        (
            "dit",
            lambda t: t | {"layers.0.attention.out.weight": torch.zeros(48, 48, dtype=torch.uint8)},
            ["quantised format", "layers.0.attention.out.weight"],
        ),
        (
            "gemma2",
            lambda t: {n: x for n, x in t.items() if "layers.1." not in n},
            ["--gemma2", "11 tensors are missing (model.layers.1.self_attn.q_proj.weight", " and 6 more)"],
        ),
        (
            "gemma2",
            lambda t: t | {"model.layers.4.mlp.up_proj.weight": torch.zeros(1)},
            ["1 tensor is unexpected (model.layers.4.mlp.up_proj.weight)"],
        ),
        (
            "ae",
            lambda t: {n: x for n, x in t.items() if n != "decoder.up.3.block.0.conv1.bias"},
            ["--ae", "1 tensor is missing (decoder.up.3.block.0.conv1.bias)"],
        ),
        (
            "ae",
            lambda t: t | {"encoder.mid.attn_1.q.weight": torch.zeros(16, 8, 1, 1)},
            ["encoder.mid.attn_1.q.weight is [16, 8, 1, 1], not [16, 16]"],
        ),
    ],
)
def test_what_is_missing_unexpected_or_misshaped_is_named(
    tmp_path: Path,
    part: str,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    parts: list[str],
) -> None:
    paths = three_files(tmp_path)
    rewrite(getattr(paths, part), change)
    with pytest.raises(ModelFileError) as error:
        inspect_models(paths)
    for text in parts:
        assert text in str(error.value)


def test_models_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    paths = three_files(tmp_path)

    def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"cap_embedder.0.weight": torch.ones(40), "cap_embedder.1.weight": torch.zeros(48, 40)}

    rewrite(paths.dit, wider)
    with pytest.raises(ModelFileError, match=r"text features of width 32, but the transformer in .* takes 40"):
        inspect_models(paths)


def test_a_swapped_pair_is_named(tmp_path: Path) -> None:
    paths = three_files(tmp_path)
    with pytest.raises(ModelFileError, match=r"is not a Lumina Image 2.0 transformer. It looks like a Gemma2"):
        inspect_models(dataclasses.replace(paths, dit=paths.gemma2, gemma2=paths.dit))
    with pytest.raises(ModelFileError, match=r"--gemma2: .* It looks like a Lumina Image 2.0 transformer"):
        inspect_models(dataclasses.replace(paths, gemma2=paths.dit))
    with pytest.raises(ModelFileError, match=r"--ae: .* is not the FLUX autoencoder. It looks like a Gemma2"):
        inspect_models(dataclasses.replace(paths, ae=paths.gemma2))


def test_left_out_flags_are_asked_for(tmp_path: Path) -> None:
    paths = three_files(tmp_path)
    with pytest.raises(ModelFileError, match=r"--gemma2 is missing: .* holds no text encoder"):
        inspect_models(dataclasses.replace(paths, gemma2=None))
    with pytest.raises(ModelFileError, match=r"--ae is missing: .* holds no autoencoder"):
        inspect_models(dataclasses.replace(paths, ae=None))
    root = root_folder(tmp_path).dit
    with pytest.raises(ModelFileError, match=r"--ae is missing: .*dit.safetensors"):
        inspect_models(ModelPaths(dit=paths.dit, gemma2=root))
    shutil.rmtree(root / "vae")
    with pytest.raises(ModelFileError, match=r"--ae is missing: .* holds no vae folder"):
        inspect_models(ModelPaths(dit=root))


def test_a_folder_of_another_model_class_is_refused(tmp_path: Path) -> None:
    paths = root_folder(tmp_path)
    config = paths.dit / "text_encoder" / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ModelFileError, match="model_type = 'llama', not 'gemma2'"):
        inspect_models(paths)
    config.write_text(json.dumps({"model_type": "gemma2", "hidden_size": "wide"}), encoding="utf-8")
    with pytest.raises(ModelFileError, match="hidden_size is 'wide', not of type int"):
        inspect_models(paths)
    config.write_text("{", encoding="utf-8")
    with pytest.raises(ModelFileError, match="not valid JSON"):
        inspect_models(paths)


def test_a_file_without_configuration_is_taken_for_the_real_model(tmp_path: Path) -> None:
    paths = three_files(tmp_path)
    assert paths.ae is not None
    save_file(load_file(paths.ae), paths.ae)
    with pytest.raises(ModelFileError, match=r"encoder.conv_in.weight is \[8, 3, 3, 3\], not \[128, 3, 3, 3\]"):
        inspect_models(paths)
