import json
import math

import pytest
import torch
from safetensors.torch import save_file

from library.errors import NetworkError
from networks.lora_files import read_lora_file
from networks.peft_settings import alphas_of


def metadata(**settings):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


RANKS = {"transformer.layers.0.attn.to_q": 4, "transformer.layers.10.attn.to_q": 16}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_alpha": 8}, (8, 8)),
        ({"lora_alpha": 8, "use_rslora": True}, (8 * 2, 8 * 4)),  # PEFT: alpha / sqrt(rank)
        ({"lora_alpha": 8, "alpha_pattern": {"layers.10.attn.to_q": 2}}, (8, 2)),
        ({"lora_alpha": 8, "alpha_pattern": {"^layers.10.attn.to_q": 2}}, (8, 2)),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, (2, 2)),
        ({"lora_alpha": 8, "alpha_pattern": {"^to_q": 2, "0.attn.to_q": 3}}, (3, 8)),
        ({"lora_alpha": 8, "alpha_pattern": {"o_q": 2}}, (8, 8)),
        ({"lora_alpha": 8, "alpha_pattern": None, "use_dora": False}, (8, 8)),
        ({"r": 4}, ()),
    ],
)
def test_alphas_are_those_that_peft_takes(settings, expected, tmp_path):
    found = alphas_of(tmp_path / "a.safetensors", metadata(**settings), RANKS)
    assert tuple(found.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 8, "alpha_pattern": {"^a.b": 2, "b": 3}}],
)
def test_peft_itself_gives_these_strengths(settings, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.b = torch.nn.Linear(8, 8)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.d = Inner(), Inner(), torch.nn.Linear(8, 8)

    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["b", "d"], **settings), Model())
    theirs = {name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "scaling")}
    found = alphas_of(tmp_path / "a.st", metadata(**settings), {f"transformer.{name}": 4 for name in theirs})
    assert {name.removeprefix("transformer."): alpha / 4 for name, alpha in found.items()} == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "lora_alpha": 8}, "DoRA"),
        ({"lora_alpha": 8, "alpha_pattern": {r"layers\.\d+.*": 2}}, r"pattern 'layers"),
        ({"lora_alpha": "8"}, "lora_alpha = '8'"),
        ({"lora_alpha": True}, "lora_alpha = True"),
        ({"lora_alpha": math.inf}, "lora_alpha = inf"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": None}}, "lora_alpha = None"),
        ({"lora_alpha": 8, "alpha_pattern": ["to_q"]}, r"alpha_pattern = \['to_q'\]"),
        ({"lora_alpha": 8, "init_lora_weights": "pissa_niter_16"}, "init_lora_weights = pissa_niter_16"),
        ({"lora_alpha": 8, "init_lora_weights": "OLoRA"}, "changed the model"),
    ],
)
def test_what_cannot_be_read_is_named(settings, message, tmp_path):
    with pytest.raises(NetworkError, match=message):
        alphas_of(tmp_path / "a.safetensors", metadata(**settings), RANKS)


def peft_folder(folder, config, encoding="utf-8"):
    name = "base_model.model.layers.0.attn.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(4, 72), f"{name}.lora_B.weight": torch.ones(72, 4)},
        folder / "adapter_model.safetensors",
    )
    if config is not None:
        (folder / "adapter_config.json").write_text(config, encoding=encoding)
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_settings_beside_a_file_of_peft_are_read(encoding, tmp_path):
    tensors = read_lora_file(peft_folder(tmp_path, '{"lora_alpha": 16, "r": 4, "init_lora_weights": true}', encoding))
    assert float(tensors["base_model.model.layers.0.attn.to_q.alpha"]) == 16


@pytest.mark.parametrize("config", [None, "{}"])
def test_a_missing_alpha_is_warned_about(config, tmp_path, caplog):
    tensors = read_lora_file(peft_folder(tmp_path, config))
    assert not [key for key in tensors if "alpha" in key]
    assert "adapter_config.json beside it as lora_alpha, and is not there; alpha = rank" in caplog.text


def test_damaged_settings_are_refused(tmp_path):
    with pytest.raises(NetworkError, match=r"adapter_config\.json.*damaged"):
        read_lora_file(peft_folder(tmp_path, "{"))


def test_other_files_are_not_looked_at_for_settings(tmp_path, caplog):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}', encoding="utf-8")
    save_file({"diffusion_model.x_embedder.lora_A.weight": torch.ones(4, 64)}, tmp_path / "a.safetensors")
    assert list(read_lora_file(tmp_path / "a.safetensors")) == ["diffusion_model.x_embedder.lora_A.weight"]
    assert caplog.text == ""
