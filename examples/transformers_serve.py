"""Let transformers' own server serve a patched model: python examples/transformers_serve.py [MODEL [PORT]]

Without a port, the server is asked once and ends. Needs `pip install 'transformers[serving]'`. What it lacks is in docs/serving.md.
"""

import sys
from typing import Any

import uvicorn
from starlette.testclient import TestClient
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from patchkit import patch_model, report
from patchkit.models import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "bundled")
patch_model(model, "speculative(draft=prompt_lookup(min_ngram=1), k=3)")


class InMemory(ModelManager):
    """Gives the patched model, whatever name a request has."""

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return model, tokenizer


manager, state = InMemory(device="cpu"), GenerationState()
text = [handler(manager, state) for handler in (ChatCompletionHandler, CompletionHandler, ResponseHandler)]
app = build_server(manager, *text, TranscriptionHandler(manager, state), SystemOneHandler(manager, state), state)
if len(sys.argv) > 2:
    uvicorn.run(app, port=int(sys.argv[2]))
else:
    body = {"model": "patched", "prompt": "x = 1\ny = 2\nx = 1\ny =", "max_tokens": 24}
    print(TestClient(app).post("/v1/completions", json=body).json()["choices"][0]["text"])
print(report(model))
