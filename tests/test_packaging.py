"""What the package is made of: import directions, wheel contents, nothing unpickled or evaluated."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_hybrid", "kernels", "layer_specs", "tools")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

#: What each part may import of the project. Later parts may import earlier ones, never the other way round.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "modules": {"kernels", "parallel", "modules"},
    "layer_specs": {"kernels", "parallel", "modules", "layer_specs", "config", "compat"},
    "__init__": set(),
    "model": {"modules", "parallel", "layer_specs", "config", "fp8"},
    "config": set(),
    "flops": set(),
    "parallel": {"kernels", "parallel", "flags", "flops"},
    "presets": {"ladder", "stages"},
    "ladder": {"flops"},
    "stages": set(),
    "fp8": {"parallel"},
    "planning": {"planning", "flops", "flags", "fp8", "parallel"},
    "plan": {"flops", "presets", "planning"},
    "architecture": set(),
    "refusals": {"architecture"},
    "flags": {"architecture", "refusals", "config", "presets", "fp8", "tools"},
    "compat": {"cpu_backend"},
    "fla_backend": {"compat"},
    "cpu_backend": set(),
    "data": {"tools", "config", "data"},
    "checkpoint": {"tools", "config", "checkpoint"},
    "training": {"training", "modules", "parallel", "config", "flops", "checkpoint", "fp8"},
    # kernels: bench_kernels and tune_kernels; flags to planning: plan and doctor
    "tools": {"tools", "config", "checkpoint", "kernels", "flags", "flops", "fp8", "compat", "planning", "parallel"}
    | {"fla_backend"},
    "pretrain": {
        *("model", "layer_specs", "architecture", "config", "presets", "flags", "fp8", "parallel", "plan"),
        *("compat", "checkpoint", "data", "training", "kernels", "fla_backend"),
    },
    # it trains, unlike all other tools
    "gpu_bench": {
        *("tools", "compat", "config", "flags", "flops", "kernels"),
        *("layer_specs", "model", "pretrain", "training"),
    },
    "logits": {"pretrain", "flags", "parallel", "tools"},
}

#: Never in our own code: they run what a file says.
FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "os.system"}


def _part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[:2] == ("tools", "gpu_bench"):
        return "gpu_bench"
    return relative.parts[1].removesuffix(".py") if relative.parts[0] == "megatron_hybrid" else relative.parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = _part(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "megatron_hybrid" else [module]
        for name in names:
            if name.startswith("megatron_hybrid."):
                imported = name.split(".")[1]
                assert imported in MAY_IMPORT[part] | {"__version__"}, f"{part} must not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}"
            for keyword in node.keywords:
                setting = f"{keyword.arg}={ast.unparse(keyword.value)}"
                assert setting not in {"weights_only=False", "allow_pickle=True", "trust_remote_code=True"}, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_the_three_folders_are_no_packages_of_their_own() -> None:
    """With an __init__.py, a top-level `kernels` would shadow Hugging Face's package of that name."""
    assert not [folder for folder in FOLDERS[1:] if (ROOT / folder / "__init__.py").exists()]


def test_wheel_holds_one_top_level_package(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(copy)], check=True, timeout=120)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"megatron_hybrid"}
    packaged = {name for name in names if name.endswith(".py")}
    tracked = subprocess.run(["git", "ls-files", *FOLDERS], cwd=copy, capture_output=True, text=True, check=True).stdout
    expected = {
        name if name.startswith("megatron_hybrid/") else f"megatron_hybrid/{name}"
        for name in tracked.split()
        if name.endswith(".py")
    }
    assert packaged == expected


def test_megatrons_spec_import_finds_the_specs() -> None:
    from megatron.core.transformer.spec_utils import ModuleSpec, import_module

    for module, name in (("olmo_hybrid", "olmo_hybrid_stack_spec"), ("olmo3", "olmo3_stack_spec")):
        assert isinstance(import_module((f"megatron_hybrid.layer_specs.{module}", name)), ModuleSpec)
