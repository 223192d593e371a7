"""What a server is told so that it serves an artifact as it was made."""

from gemcut.serve.vllm import ServeWords, Serving, serving

__all__ = ["ServeWords", "Serving", "serving"]
