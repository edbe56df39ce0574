"""The floors: who may import whom, what is imported when, and that nothing unpickles."""

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffusion_unet

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("diffusion_unet", "training", "sampling")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
CORE = ("config", "layers", "attention", "blocks", "unet", "schedule", "denoiser", "checkpoint")

# What would run what a file holds, and has no rule of its own in the linter; beside pickle's kin, below.
FORBIDDEN = {
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "np.load", "numpy.load",
    "pandas.read_pickle", "eval", "exec", "__import__", "yaml.unsafe_load", "yaml.full_load",
    "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader", "get_class_from_dynamic_module",
}  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """The modules that a file imports, wherever in it; relative ones under their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ".".join(filter(None, [package if node.level else "", node.module or ""]))


def python(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A new Python, where the working folder comes before this project on the path, installed or not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd, env=environment)


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return python("-c", textwrap.dedent(code), cwd=cwd)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_who_imports_whom(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    roots = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()), package)}
    forbidden = {"diffusion_unet": {"training", "sampling"}, "training": {"sampling"}, "sampling": {"training"}}[
        package
    ]
    if name_of(path) in ("diffusion_unet/cli.py", "diffusion_unet/drawing.py", "diffusion_unet/__init__.py"):
        forbidden = set()
    assert not roots & forbidden
    assert not roots & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def test_the_composition_root_imports_siblings_late() -> None:
    """Only inside functions, or for the type checker."""
    for name in ("cli", "drawing", "__init__"):
        body = ast.parse((ROOT / "diffusion_unet" / f"{name}.py").read_text()).body
        early = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {module.partition(".")[0] for node in early for module in imports(node, "diffusion_unet")}
        assert not found & {"training", "sampling", "torch"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_unpickles_runs_text_or_forgives_keys(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        # Wherever the name stands: called, passed on, or imported from its module.
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN), f"line {node.lineno}"
        assert not (isinstance(node, ast.Name) and node.id in FORBIDDEN), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert not {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("strict") != "False" or called == "zip"
            assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            assert keywords.get("trust_remote_code", "False") == "False", f"line {node.lineno}"
            assert keywords.get("weights_only", "True") == "True", f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("name", CORE)
def test_the_core_stands_on_torch_einops_and_safetensors(name: str) -> None:
    tree = ast.parse((ROOT / f"diffusion_unet/{name}.py").read_text())
    roots = {module.partition(".")[0] for module in imports(tree, "diffusion_unet")}
    assert roots <= {*sys.stdlib_module_names, "diffusion_unet", "torch", "einops", "safetensors"}


def test_the_core_is_at_most_1000_lines_of_code() -> None:
    """Without docstrings, comments and blank lines."""
    total = 0
    for name in CORE:
        text = (ROOT / f"diffusion_unet/{name}.py").read_text()
        documentation: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and is_text(body[0].value):
                documentation.update(range(body[0].lineno, (body[0].end_lineno or body[0].lineno) + 1))
        lines = enumerate(text.splitlines(), 1)
        total += sum(1 for n, line in lines if line.strip() and line.lstrip()[0] != "#" and n not in documentation)
    assert total <= 1000


# --- what is imported when


def test_importing_the_package_and_its_settings_does_not_import_torch() -> None:
    done = run(
        """
        import sys
        import diffusion_unet
        dir(diffusion_unet)
        diffusion_unet.sibling("training")
        import training.config
        from diffusion_unet import InputError
        heavy = {"torch", "numpy", "diffusers", "transformers", "PIL"} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_found_and_listed() -> None:
    assert set(diffusion_unet.__all__) <= set(dir(diffusion_unet))
    for name in diffusion_unet.__all__:
        assert getattr(diffusion_unet, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffusion_unet.nothing


# --- the siblings, whatever else bears their names


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A working folder with packages, folders and modules of the siblings' names."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("mine = True")
    (tmp_path / "sampling.py").write_text("mine = True")
    (tmp_path / "configs").mkdir()
    return tmp_path


def test_a_folder_of_the_same_name_does_not_shadow_a_sibling(decoys: Path) -> None:
    done = run(
        """
        from diffusion_unet import sample, train
        assert sample.__module__.startswith("sampling") and train.__module__.startswith("training")
        import training.config, sampling.solvers
        assert training.config.load_config and not hasattr(training, "mine")
        """,
        decoys,
    )
    assert done.returncode == 0, done.stderr


def test_the_command_line_finds_its_siblings_too(decoys: Path) -> None:
    for argv in (["train", "--help"], ["quickstart", "--help"]):
        done = python("-m", "diffusion_unet", *argv, cwd=decoys)
        assert done.returncode == 0, done.stderr


def test_a_foreign_module_that_came_first_is_one_clear_line(decoys: Path) -> None:
    for name, taken in {"training": "train", "sampling": "sample"}.items():
        done = run(f"import {name}\nassert {name}.mine\nfrom diffusion_unet import {taken}", decoys)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("ImportError: another") and str(decoys) in last, done.stderr


def test_a_sibling_is_one_module_however_it_is_imported() -> None:
    done = run(
        """
        import training.config
        from diffusion_unet import sibling
        import training
        assert sibling("training") is training and training.config.Config is sibling("training").config.Config
        """
    )
    assert done.returncode == 0, done.stderr
