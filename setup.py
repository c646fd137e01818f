"""The compiled part; all else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "posthoc_ema._native",
            ["posthoc_ema/_native.c"],
            depends=["posthoc_ema/_native_loops.h"],
            # No errno, no traps: else rounding is a call. Compilers that know none of these warn.
            extra_compile_args=["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math"],
            py_limited_api=True,
            optional=True,  # without a compiler everything works, in numpy
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
