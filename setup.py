import platform
import sys

from setuptools import Extension, setup

# -O3 by name: CFLAGS of the environment, as those for llama.cpp, take the place of Python's own.
# Optional: where it does not compile, the package is installed all the same, and llama.cpp multiplies matrices by itself.
kernels = Extension("llmserve.engine._kernels", ["llmserve/engine/kernels.c"], extra_compile_args=["-O3"], optional=True)
setup(ext_modules=[kernels] if (sys.platform, platform.machine()) == ("linux", "x86_64") else [])
