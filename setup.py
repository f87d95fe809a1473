from setuptools import Extension, setup

# Optional: without a compiler the package is installed all the same, and matrices are multiplied by llama.cpp alone.
setup(
    ext_modules=[Extension("llmserve.engine._matmul", ["llmserve/engine/matmul.c"], extra_compile_args=["-O2"], optional=True)]
)
