import subprocess
import sys

import pytest

from library.errors import NetworkError
from networks.lora_lumina_args import NetworkArgs, check_network_args


def test_texts_become_typed_values():
    args = check_network_args(
        {
            "attn_dim": "16",
            "embedder_dims": "[4, 0,2]",
            "split_qkv": "TRUE",
            "verbose": "0",
            "rank_dropout": "0.25",
            "loraplus_lr_ratio": "16",
        }
    )
    assert args == NetworkArgs(
        attn_dim=16,
        embedder_dims=(4, 0, 2),
        split_qkv=True,
        verbose=False,
        rank_dropout=0.25,
        loraplus_lr_ratio=16.0,
    )
    assert args.ranks == {"attn_dim": 16, "embedder_dims[x]": 4, "embedder_dims[t]": 0, "embedder_dims[cap]": 2}


def test_brackets_are_optional():
    assert check_network_args({"embedder_dims": "1,2,3"}).embedder_dims == (1, 2, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), (" 1 , 2-2 ", {1, 2}), ("0-1,1-3", {0, 1, 2, 3}), ("all", None)],
)
def test_block_indices_are_numbers_and_ranges(text, expected):
    args = check_network_args({"train_block_indices": text})
    assert args.train_block_indices == expected
    assert args.numbers == ({} if expected is None else {"layers": expected})


def test_block_indices_need_main_blocks():
    with pytest.raises(NetworkError, match=r"train_blocks=refiners trains none of them"):
        check_network_args({"train_block_indices": "1", "train_blocks": "refiners"})
    assert check_network_args({"train_block_indices": "1", "train_blocks": "transformer"}).numbers


def test_no_arguments_are_the_defaults():
    assert check_network_args({}) == NetworkArgs()
    assert NetworkArgs().ranks == {}
    assert NetworkArgs().blocks is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("atn_dim", "4", "did you mean 'attn_dim'"),
        ("Attn_Dim", "4", "did you mean 'attn_dim'"),
        ("dropout", "0.1", "use --network_dropout=0.1"),
        ("attn_dim", "four", "attn_dim=four is not valid; expected a whole number"),
        ("attn_dim", "4.5", "expected a whole number"),
        ("attn_dim", "-1", "expected a whole number from 0 "),
        ("attn_dim", "999999999", "to 16384"),
        ("attn_dim", "", "expected a whole number"),
        ("embedder_dims", "[4,4]", "expected three whole numbers"),
        ("embedder_dims", "4,4,4,4", "expected three whole numbers"),
        ("split_qkv", "maybe", "expected true or false"),
        ("train_block_indices", "", "numbers and ranges of them such as 0-3,8,20-25"),
        ("train_block_indices", "3-1", "numbers and ranges"),
        ("train_block_indices", "0,-1", "numbers and ranges"),
        ("train_block_indices", "1-", "numbers and ranges"),
        ("rank_dropout", "1", "expected a number from 0 to below 1"),
        ("module_dropout", "-0.1", "expected a number from 0 to below 1"),
        ("rank_dropout", "nan", "expected a number from 0 to below 1"),
        ("loraplus_lr_ratio", "0", "expected a number above 0"),
        ("loraplus_unet_lr_ratio", "inf", "expected a number above 0"),
        ("train_blocks", "refiner", "expected one of all, transformer, refiners"),
        ("conv_alpha", "x", "expected a number"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_expected(name, text, message):
    with pytest.raises(NetworkError) as caught:
        check_network_args({name: text})
    assert message in str(caught.value)
    assert f"{name}={text}" in str(caught.value)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"train_blocks": "transformer", "refiner_dim": "4"}, "refiner_dim=4"),
        ({"train_blocks": "refiners", "refiner_dim": "4", "attn_dim": "8"}, "attn_dim=8"),
        ({"train_blocks": "context_refiner", "mod_dim": "4"}, "mod_dim=4"),
    ],
)
def test_a_rank_that_train_blocks_leaves_nothing_for_is_refused_before_any_model(args, named):
    with pytest.raises(NetworkError, match=named + " reaches no module"):
        check_network_args(args)


def test_checking_needs_no_torch():
    code = "import sys; from networks.lora_lumina_args import check_network_args as c; c({'attn_dim': '4'})"
    code += "; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
