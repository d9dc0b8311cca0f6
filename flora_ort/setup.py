"""A wheel with the library in it, for this platform and any Python."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildWithLibrary(build_py):
    """Builds the library beside the sources first."""

    def run(self) -> None:
        """See the base class."""
        spec = importlib.util.spec_from_file_location("flora_ort_build", Path(__file__).parent / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build()
        super().run()


class PlatformWheel(bdist_wheel):
    """For any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """See the base class."""
        return "py3", "none", super().get_tag()[2]


class WithBinary(Distribution):
    """Of a platform."""

    def has_ext_modules(self) -> bool:
        """See the base class."""
        return True


commands: dict[str, Any] = {"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel}
setup(cmdclass=commands, distclass=WithBinary)
