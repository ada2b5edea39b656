"""Adds two things to what pyproject.toml describes, for which setuptools has no declarative way.

The packages, because those in the folder `kernels` at the top ship inside `resilience.kernels`. And one file beside
the packages, in wheels and in editable installs alike: the `.pth` line that arms `resilience._boot` at interpreter
start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PTH_NAME = "deepspeed_resilience.pth"
PTH_LINE = (
    'import os, sys; ("RESILIENCE_CONTEXT" in os.environ'
    ' or any(word[:12] == "--resilience" or word in ("-h", "--help") for word in sys.orig_argv))'
    ' and __import__("resilience._boot")._boot.arm()\n'
)
"""One line, as `site` demands; a few microseconds in processes that are none of ours, which then import nothing."""


class BuildWithPth(build_py):
    """For wheels: the file lies at the root of the build, which becomes the root of site-packages."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, PTH_NAME).write_text(PTH_LINE)


class EditableWheelWithPth(editable_wheel):
    """For `pip install -e`: setuptools adds what lies in `unpacked_wheel` to its editable wheel."""

    def _run_build_commands(self, dist_name: str, unpacked_wheel: Any, build_lib: Any, tmp_dir: Any) -> Any:
        outputs = super()._run_build_commands(dist_name, unpacked_wheel, build_lib, tmp_dir)
        Path(unpacked_wheel, PTH_NAME).write_text(PTH_LINE)
        return outputs


# Each folder of kernels/ with an __init__.py. The folder itself has none: the name `kernels` is another project's.
KERNELS = find_packages("kernels")

# The compiled CPU kernels. -O3 unrolls their small loops into registers; nothing that would let NaN and INF get lost.
COMPILED = [
    Extension(
        f"resilience.kernels.{name}",
        [f"resilience/kernels/{name}.c"],
        depends=[str(path) for path in Path("resilience/kernels").glob("_*.h")],
        extra_compile_args=["-O3"],
        py_limited_api=True,
        optional=True,
    )
    for name in ("_copy", "_hash", "_identities", "_lengthwise", "_sweep")
]

setup(
    packages=[*find_packages(include=["resilience*"]), *(f"resilience.kernels.{name}" for name in KERNELS)],
    package_dir={f"resilience.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in KERNELS},
    cmdclass={"build_py": BuildWithPth, "editable_wheel": EditableWheelWithPth},
    ext_modules=COMPILED,
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
