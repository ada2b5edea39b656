"""The wheel: everything of the tree is in it, nothing else is, and what is installed from it works."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PTH = "deepspeed_resilience.pth"
COMPILED = {f"resilience/kernels/{path.stem}.abi3.so" for path in (ROOT / "resilience" / "kernels").glob("_*.c")}
SOURCE_SUFFIXES = {".c", ".h", ".so"}
"""What the compiled kernels are made from, and what a build leaves in the tree."""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    words = [str(word) for word in command]
    answer = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 0, f"{words}: {answer.stdout[-2000:]}{answer.stderr[-4000:]}"
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no `build/` of an earlier build slips in and none is left behind."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for entry in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / entry, source)
    for folder in ("resilience", "kernels"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", directory, source)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel in it; dependencies come from the one that runs the tests."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = home.glob("lib/python*/site-packages")
    # A path in a .pth file adds the directory but does not act on the .pth files in it: an editable install of this
    # package, if the tests run from one, stays out.
    (site_packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return python


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    tree = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "resilience").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in SOURCE_SUFFIXES
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    content = {name for name in names if ".dist-info/" not in name}
    assert content >= COMPILED
    assert wheel.name.split("-")[2:4] == ["cp311", "abi3"], "one wheel serves every Python from 3.11 on"
    kernels = {f"resilience/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert len(kernels) > 2, "the folder of kernels is mapped into the package"
    assert content == tree | kernels | COMPILED | {PTH}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_every_package_of_the_tree_has_its_init() -> None:
    folders = {path.parent for top in ("resilience", "kernels") for path in (ROOT / top).rglob("*.py")}
    missing = sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file())
    assert not missing, "a wheel would lack these"


def test_the_folder_of_kernels_is_no_package_and_stands_alone() -> None:
    """The name `kernels` is another project's; what lies in it imports nothing of this one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            ours = [name for name in names if name.split(".")[0] in ("resilience", "kernels", "deepspeed")]
            assert not ours, f"{path} imports {ours}"


def test_the_installed_kernels_can_be_imported(installed: Path, tmp_path: Path) -> None:
    program = "import resilience.kernels.hash.oracle as module; print(module.__file__, module.bit_hash(bytes(4)))"
    where, value = run(installed, "-c", program, cwd=tmp_path).split()
    assert str(installed.parent.parent) in where
    assert value == "0"


def test_the_installed_package_works(installed: Path, tmp_path: Path) -> None:
    where = run(installed, "-c", "import resilience; print(resilience.__file__, resilience.__version__)", cwd=tmp_path)
    assert str(installed.parent.parent) in where
    assert "--json" in run(installed.parent / "resilience", "digest", "--help", cwd=tmp_path)


def test_the_installed_package_is_light(installed: Path, tmp_path: Path) -> None:
    program = (
        "import sys, resilience, resilience.cli.main, resilience.coordinator\n"
        "print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    assert run(installed, "-c", program, cwd=tmp_path).strip() == "[]"


def test_nothing_is_loaded_at_interpreter_start(installed: Path, tmp_path: Path) -> None:
    program = "import sys; print([name for name in sys.modules if name.startswith('resilience')])"
    assert run(installed, "-c", program, cwd=tmp_path).strip() == "[]"
