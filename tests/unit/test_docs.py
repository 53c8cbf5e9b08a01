"""The documentation agrees with the program: tables, flags, links, and example files."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from library import prompts
from library.inference.settings import CompareFlags, ModelFlags, PictureFlags
from library.memory.settings import MemorySettings, QuantisationSettings
from library.settings import specs_of
from library.training.arguments import all_specs
from networks.convert_lumina_lora import ConvertFlags
from networks.merge_lumina_lora import MergeFlags

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("**/*.md")) + [path for path in [ROOT / "README.md"] if path.exists()]
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")
_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
_FENCE = re.compile(r"```[a-z]*\n.*?```", re.DOTALL)

# Flags of other programs that the pages mention.
ACCELERATE = {
    "multi_gpu",
    "num_processes",
    "num_machines",
    "num_cpu_threads_per_process",
    "config_file",
    "main_process_port",
    "machine_rank",
    "cpu",
}
PIP = {"index-url", "extra-index-url", "upgrade", "no-build-isolation"}
TENSORBOARD = {"logdir", "port"}
# Flags of this project's own small scripts.
SCRIPTS = {
    "check",
    "models",
    "prompts",
    "query_gain",
    "layers",
    "size",
    "shrink",
    "train_ae_steps",
    "train_dit_steps",
    "waiting",
    "program",
    "preset",
    "batch",
    "warmup",
    "tokens",
    "negative_tokens",
    "rank",
    "steps",
    "processes",
    "measure",
    "compute",
    "write_docs",
    "quick",
    "precision",
    "fp16",
}


def _make_tables() -> ModuleType:
    # By path: a package called docs may be installed.
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _known_flags() -> set[str]:
    training = {name for spec in all_specs().values() for name in (spec.name, *spec.aliases)}
    others = {
        name
        for settings in (
            ModelFlags,
            QuantisationSettings,
            PictureFlags,
            CompareFlags,
            ConvertFlags,
            MergeFlags,
        )
        for spec in specs_of(settings)
        for name in (spec.name, *spec.aliases)
    }
    in_prompts = {*prompts._OPTIONS, *prompts._FOREIGN}
    return training | others | in_prompts | {"help"} | ACCELERATE | PIP | TENSORBOARD | SCRIPTS


def _anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.+?)\s*$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tables_are_up_to_date() -> None:
    make_tables = _make_tables()
    text = make_tables.FLAGS_FILE.read_text(encoding="utf-8")
    assert make_tables.up_to_date(text) == text, "run: python docs/make_tables.py"


def test_a_stale_table_is_noticed_and_mended() -> None:
    make_tables = _make_tables()
    text = make_tables.FLAGS_FILE.read_text(encoding="utf-8")
    stale = text.replace("| `--network_dim` |", "| `--network_dimension` |")
    assert stale != text
    assert make_tables.up_to_date(stale) == text


def test_a_missing_table_is_an_error() -> None:
    make_tables = _make_tables()
    with pytest.raises(ValueError, match="inference"):
        make_tables.up_to_date("<!-- table: training -->\n<!-- end of table -->")


def test_every_flag_of_the_trainer_is_in_the_tables() -> None:
    text = _make_tables().FLAGS_FILE.read_text(encoding="utf-8")
    assert [name for name in all_specs() if f"`--{name}`" not in text] == []


def test_what_each_switch_does_to_the_result_is_told() -> None:
    """For the flags of what a step costs, but those that say how another one works."""
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8").partition("## What changes the result")[2]
    specs = [spec for settings in (MemorySettings, QuantisationSettings) for spec in specs_of(settings)]
    untold = {spec.name for spec in specs if f"--{spec.name}" not in text}
    assert untold == {"dynamo_backend"}


def test_what_the_guide_says_of_cards_is_what_the_memory_table_says() -> None:
    table = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").partition("**1024 x 1024 px**")[2].split("**")[0]
    computed = dict(re.findall(r"^\| (.+?) \| (.+?) \|", table, re.MULTILINE))
    guide = (ROOT / "docs" / "lumina_train_network.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| (x [\d.]+) \|$", guide, re.MULTILINE)
    assert len(rows) == 2 * 5  # English, Japanese
    assert [f"{gib}, {time}" for _, gib, time in rows] == [
        computed[flags.replace("なし", "none")] for flags, _, _ in rows
    ]


def test_the_example_run_is_one(tmp_path: Path) -> None:
    from library.training.config_file import read_config_file

    given, _ = read_config_file(ROOT / "configs" / "lora_example.toml", all_specs())
    text = (ROOT / "configs" / "lora_example.toml").read_text(encoding="utf-8")
    offered = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(offered, encoding="utf-8")
    everything, _ = read_config_file(tmp_path / "all.toml", all_specs())
    assert {"vram_gb", "system_prompt"} < set(given) < set(everything)
    assert {"sample_prompts", "blocks_to_swap"} < set(everything)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path) -> None:
    mentioned = set(_FLAG.findall(page.read_text(encoding="utf-8")))
    assert mentioned - _known_flags() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target, anchor in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in _anchors(path.read_text(encoding="utf-8"))):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_examples_are_toml(page: Path) -> None:
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        tomllib.loads(block)
