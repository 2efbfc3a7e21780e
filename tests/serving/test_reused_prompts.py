"""Prompts that `prefix_cache` has kept: clients and figures are told how much of them was not fed."""

from __future__ import annotations

import json
from typing import Any

from served import PROMPTS, alone, client, figures, model_and_tokenizer

from patchkit import patch_model, unpatch_model

BLOCK = 8


def kept_of(content: str) -> int:
    """Tokens of a chat's prompt up to its last border."""
    (ids,) = [model_and_tokenizer()[1](f"[user] {content}\n[assistant] ", add_special_tokens=False)["input_ids"]]
    return (len(ids) - 1) // BLOCK * BLOCK


def test_clients_and_figures_see_what_was_reused() -> None:
    model, _ = model_and_tokenizer()
    patch_model(model, f"prefix_cache(block={BLOCK})", verbose=False)
    content = PROMPTS[0] * 4
    expected = alone(f"[user] {content}\n[assistant] ", max_new_tokens=6)
    with client(model) as served:

        def ask(**more: Any) -> dict[str, Any]:
            body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 6, **more}
            response = served.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            if "stream" not in more:
                return response.json()
            return json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))

        def hits() -> float:
            return figures(served.get("/metrics").text)["patchkit_prefix_hit_tokens_total"]

        answers = [ask(), ask(), ask(stream=True, stream_options={"include_usage": True})]
        seen = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
        assert seen == [0, kept_of(content), kept_of(content)] and kept_of(content) > 2 * BLOCK
        assert [answer["choices"][0]["message"]["content"] for answer in answers[:2]] == [expected] * 2
        assert hits() == sum(seen)
        # A prompt counts once for the client, and once for each choice in the figures; the first choice of a new prompt has to feed it.
        content = PROMPTS[3] * 6
        seen = [ask(n=2)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
        assert seen[0] < BLOCK < seen[1] == kept_of(content)
        assert hits() == 2 * kept_of(PROMPTS[0] * 4) + seen[0] + 3 * seen[1]
    unpatch_model(model)
