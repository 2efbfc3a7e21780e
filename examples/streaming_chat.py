"""A chat that never ends: one cache for the whole conversation, whose memory does not grow.

python examples/streaming_chat.py [MODEL] [WINDOW]     # then type; an empty line ends it
"""

import sys

import torch
from transformers import TextStreamer

from patchkit import StreamingLLM, patch_model
from patchkit.models import load_model
from patchkit.quality.latency import cache_bytes

name = sys.argv[1] if len(sys.argv) > 1 else "bundled"
window = int(sys.argv[2]) if len(sys.argv) > 2 else 252

model, tokenizer = load_model(name)
patch_model(model, StreamingLLM(sinks=4, window=window))
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
history, cache = torch.empty(1, 0, dtype=torch.long), None

while message := input("> ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n"):
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": message}]
        message = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    new = tokenizer(message + "\n", return_tensors="pt", add_special_tokens=cache is None)["input_ids"]
    history = torch.cat([history, new], dim=1)  # token ids only; what the model still sees is in the cache
    output = model.generate(
        input_ids=history, past_key_values=cache, max_new_tokens=64, streamer=streamer, do_sample=False, return_dict_in_generate=True
    )
    history, cache = output.sequences, output.past_key_values
    print(f"[{history.shape[1]} tokens so far, {cache_bytes(cache) / 2**20:.2f} MiB of cache]")
