"""Prompts are functions: the docstring is the template, the return annotation decides what comes back."""

from __future__ import annotations

from .base import Prompt
from .decorator import context, prompt
from .durable import BlockingBatch
from .function import AsyncPromptFunction, AsyncStreamFunction, PromptFunction, StreamFunction
from .replies import Partial
from .running import Middleware, Next, RenderedCall, middleware, run
from .streaming import AsyncStream, Stream
from .values import Audio, Content, File, Image

__all__ = [
    "AsyncPromptFunction", "AsyncStream", "AsyncStreamFunction", "Audio", "BlockingBatch", "Content", "File", "Image", "Middleware",
    "Next", "Partial", "Prompt", "PromptFunction", "RenderedCall", "Stream", "StreamFunction", "context", "middleware",
    "prompt", "run",
]  # fmt: skip
