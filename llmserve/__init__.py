"""OpenAI-compatible LLM inference server inside Python's own web stack."""

__version__ = "0.1.0"
