"""Builds the C++ index helpers. Everything else about the distribution is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup


class BuildBesideSource(build_ext):
    """Leaves the extension in the source tree too, whichever way the project is installed.

    Scripts at the top of the repository import megatron from the repository, not from where it was installed.
    """

    def run(self) -> None:
        super().run()
        if not self.inplace:
            self.copy_extensions_to_source()


setup(
    ext_modules=[
        Pybind11Extension(
            "megatron.data.helpers",
            ["megatron/data/helpers.cpp", "megatron/data/blend_index.cpp"],
            depends=["megatron/data/blend_index.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildBesideSource},
)
