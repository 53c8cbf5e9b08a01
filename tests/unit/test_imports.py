"""Who may import whom, and that what answers --help imports nothing heavy."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENTRY_SCRIPTS = {"lumina_train_network", "lumina_minimal_inference"}
# Programs beside the modules that they are for.
TOOLS = {"networks/convert_lumina_lora.py", "networks/merge_lumina_lora.py"}
HEAVY = {"torch", "numpy", "PIL", "transformers", "diffusers", "accelerate", "safetensors", "bitsandbytes"}
SOURCES = sorted([*(ROOT / "library").rglob("*.py"), *(ROOT / "networks").rglob("*.py"), *ROOT.glob("lumina_*.py")])
# room -> rooms that it must not import
FORBIDDEN = {
    "library/data": ("library.inference", "library.lumina", "library.memory", "library.training", "networks"),
    "library/inference": ("library.data", "library.training", "networks"),
    "library/lumina": ("library.data", "library.inference", "library.memory", "library.training", "networks"),
    "library/memory": ("library.data", "library.inference", "library.lumina", "library.training", "networks"),
    "library/training": ("library.inference", "networks"),
    "library": ("networks",),
}
LIGHT = [
    "library/inference/comparison.py",
    "library/inference/painter.py",
    "library/inference/requests.py",
    "library/inference/settings.py",
    "library/lumina/settings.py",
    "library/data/settings.py",
    "library/memory/settings.py",
    "library/training/settings.py",
    "library/training/arguments.py",
    "library/training/frozen_models.py",
    "library/training/network_trainer.py",
    "library/settings.py",
    "library/picture_text.py",
    "library/prompts.py",
    "library/console.py",
    "networks/lora_lumina_args.py",
    "networks/lora_keys.py",
    "networks/peft_settings.py",
    "networks/convert_lumina_lora.py",
    "networks/merge_lumina_lora.py",
    "lumina_train_network.py",
    "lumina_minimal_inference.py",
]


def imported(path: Path, everywhere: bool) -> set[str]:
    """Returns the modules a file imports: everywhere, or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if everywhere else list(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_rooms_keep_their_doors(path: Path) -> None:
    names = imported(path, everywhere=True)
    assert not {name.split(".")[0] for name in names} & ENTRY_SCRIPTS
    assert not {f"{name.replace('.', '/')}.py" for name in names} & TOOLS
    for room, forbidden in FORBIDDEN.items():
        if relative(path).startswith(f"{room}/"):
            wrong = [name for name in names if name.startswith(forbidden)]
            assert not wrong, f"{relative(path)} imports {wrong}"
    if relative(path).startswith("networks/"):
        ours = {name for name in names if name.startswith("library")}
        allowed: tuple[str, ...] = ("library.errors", "library.files")
        if relative(path) in TOOLS:
            allowed += ("library.command_line", "library.console", "library.settings")
        assert all(name == "library" or name.startswith(allowed) for name in ours), ours


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_once(name: str) -> None:
    assert not {module.split(".")[0] for module in imported(ROOT / name, everywhere=False)} & HEAVY


def test_only_one_module_writes_files() -> None:
    """Writing goes through library/files.py, which never leaves a torn file."""
    writers = ("write_text", "write_bytes", "save_file")
    for path in SOURCES:
        if relative(path) == "library/files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr in writers:
                owner = function.value
                assert isinstance(owner, ast.Name), relative(path)
                assert owner.id == "files", f"{relative(path)}:{node.lineno} writes a file itself"
            if isinstance(function, ast.Name) and function.id == "open":
                mode = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else "r"
                assert "w" not in str(mode), relative(path)
