"""Which LoRA modules are made: beside which Linears, with what rank and alpha, fused or split."""

import pytest
import torch
from torch import nn

from library.errors import NetworkError
from networks.lora_files import Factors
from networks.lora_plan import linears, plan_of, plan_of_file, qkv_rows
from networks.lora_table import Component, Table, assign

ROWS = (8, 4, 4)


class Quantised(nn.Module):
    """Has a Linear's sizes and is none."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


def model():
    attention = nn.ModuleDict({"qkv": Quantised(6, sum(ROWS)), "norm": nn.LayerNorm(6), "out": nn.Linear(ROWS[0], 6)})
    return nn.ModuleDict({"attention": attention, "mlp": nn.Linear(6, 6)})


def table(fused=r".*\.qkv"):
    return Table("the model", "lora_unet", ("mlp",), (Component("all", ".*"),), fused)


def factors(rank, alpha, up):
    return Factors(torch.zeros(rank, 6), up, alpha)


def test_quantised_linears_count():
    assert list(linears(model())) == ["attention.qkv", "attention.out", "mlp"]


def test_rows_of_queries_keys_and_values_follow_from_the_output_projection():
    assert qkv_rows(table(), linears(model())) == ROWS
    assert qkv_rows(table(fused=None), linears(model())) is None


@pytest.mark.parametrize("split", [True, False])
def test_a_plan_has_the_order_and_ranks_that_were_assigned(split):
    modules = linears(model())
    plan = plan_of(table(), modules, assign(table(), modules, {}, 3), 2.0, split)
    assert [one.assignment.path for one in plan.modules] == ["mlp", "attention.qkv", "attention.out"]
    assert all(one.linear is modules[one.assignment.path] for one in plan.modules)
    assert {(one.assignment.rank, one.alpha) for one in plan.modules} == {(3, 2.0)}
    assert [one.split_rows for one in plan.modules] == [None, ROWS if split else None, None]


def test_a_file_decides_modules_ranks_and_alphas():
    diagonal = torch.block_diag(*(torch.ones(rows, 2) for rows in ROWS))
    found = {
        "lora_unet_attention_qkv": factors(6, 3.0, diagonal),
        "lora_unet_mlp": factors(5, 1.0, torch.ones(6, 5)),
        "lora_unet_elsewhere": factors(1, 1.0, torch.ones(6, 1)),
    }
    fused = plan_of_file(table(), linears(model()), found, False, "x.safetensors").modules
    assert [(one.assignment.path, one.assignment.rank, one.alpha, one.split_rows) for one in fused] == [
        ("mlp", 5, 1.0, None),
        ("attention.qkv", 6, 3.0, None),
    ]
    split = plan_of_file(table(), linears(model()), found, True, "x.safetensors").modules
    # Three LoRAs of a third of the file's rank and alpha each: the strength alpha / rank stays.
    assert [(one.assignment.rank, one.alpha, one.split_rows) for one in split] == [(5, 1.0, None), (2, 1.0, ROWS)]
    with pytest.raises(NetworkError, match=r"x\.safetensors: lora_unet_attention_qkv was not trained with split_qkv"):
        plan_of_file(
            table(), linears(model()), {"lora_unet_attention_qkv": factors(6, 3.0, diagonal + 1)}, True, "x.safetensors"
        )
