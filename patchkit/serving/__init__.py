"""A server with OpenAI's API on a patched model: `app` makes an ASGI application, `patchkit serve` runs one.

Needs Starlette, uvicorn and prometheus-client, which are optional: `pip install 'patchkit[serve]'`.
"""

from __future__ import annotations

from patchkit.serving.application import app

__all__ = ["app"]
