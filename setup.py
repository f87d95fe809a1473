import platform
import sys

from setuptools import Extension, setup

# Optional: where it does not compile, the package is installed all the same, and llama.cpp multiplies matrices by itself.
kernels = Extension("llmserve.engine._kernels", ["llmserve/engine/kernels.c"], optional=True)
setup(ext_modules=[kernels] if (sys.platform, platform.machine()) == ("linux", "x86_64") else [])
