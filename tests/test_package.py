"""The package as people install and import it."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rl_mlx
from rl_mlx.convert import kernels
from rl_mlx.settings import tomllib

ROOT = Path(__file__).resolve().parent.parent


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_is_light():
    heavy = python(
        "import sys, rl_mlx, rl_mlx.errors, rl_mlx.types\n"
        "print([m for m in ('mlx', 'numpy', 'transformers', 'mlx_lm') if m in sys.modules])"
    )
    assert heavy == "[]"


def test_a_host_with_neither_library_has_everything_else():
    """Windows is one: no MLX, no library of llama.cpp that can be used, no termios."""
    code = """
import sys
for name in ("mlx", "mlx_lm", "xllamacpp", "llama_cpp", "termios", "tty"):
    sys.modules[name] = None
import rl_mlx.llm, rl_mlx.server.app
from rl_mlx.cli.main import main
assert main(["--help"]) == 0
assert main(["show", "demo"]) == 0
assert main(["generate", "demo", "-p", "x"]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "pip install xllamacpp==" in line
    assert "pip install mlx mlx-lm" in line


def test_the_public_names_are_there():
    assert all(getattr(rl_mlx, name) is not None for name in rl_mlx.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = rl_mlx.nothing


def test_every_package_folder_is_listed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(("rl_mlx", *path.parent.relative_to(ROOT / "rl_mlx").parts))
        for path in (ROOT / "rl_mlx").rglob("__init__.py")
        if "convert" not in path.parts
    }
    folders |= {
        ".".join(("rl_mlx", *path.parent.relative_to(ROOT).parts))
        for path in (ROOT / "convert").rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == folders


def test_the_compiled_part_may_be_missing_and_is_of_this_version():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (extension,) = setuptools["ext-modules"]
    assert extension["optional"] is True
    (source,) = extension["sources"]
    version = re.search(r"kernels_version = (\d+);", (ROOT / source).read_text())
    assert int(version[1]) == kernels._VERSION


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert rl_mlx.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_second_copy_of_convert_is_refused():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import convert"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert "import this package as rl_mlx.convert" in done.stderr


def test_the_map_of_the_readme_is_of_today():
    spec = importlib.util.spec_from_file_location("project_map", ROOT / ".ci" / "map.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text("utf-8")
    assert module.mapped(readme) == readme, "run python .ci/map.py"


def test_no_function_and_no_file_is_too_long():
    for path in [*(ROOT / "rl_mlx").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]:
        text = path.read_text("utf-8")
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
