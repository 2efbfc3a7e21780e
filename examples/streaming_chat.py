"""A chat that never ends: one cache for the whole conversation, whose memory does not grow.

python examples/streaming_chat.py [MODEL] [WINDOW]     # then type; an empty line ends it. smollm2 is a model that answers
"""

import sys

import torch
from transformers import TextStreamer

from patchkit import StreamingLLM, patch_model
from patchkit._compat import CACHE, cache_of  # transformers calls it past_key_values before 5.24
from patchkit.models import load_model
from patchkit.views import cache_bytes

name = sys.argv[1] if len(sys.argv) > 1 else "bundled"
window = int(sys.argv[2]) if len(sys.argv) > 2 else 252

model, tokenizer = load_model(name)
patch_model(model, StreamingLLM(sinks=4, window=window))
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
messages, seen, cache = [], torch.empty(1, 0, dtype=torch.long), None
LAST_REPLY = "\0"  # a placeholder in the conversation: the tokens of the reply are in the cache

while message := input("> ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n"):
    text = message + "\n"
    if tokenizer.chat_template:
        talk = messages[:-1] + [{"role": "assistant", "content": LAST_REPLY}] * bool(messages) + [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False).split(LAST_REPLY)[-1]
    new = tokenizer(text, return_tensors="pt", add_special_tokens=not messages and not tokenizer.chat_template)["input_ids"]
    if messages and tokenizer.chat_template and seen[0, -1] == new[0, 0]:
        new = new[:, 1:]  # the template closes the reply, which the model has done itself
    prompt = torch.cat([seen, new], dim=1)  # token ids only; what the model still sees is in the cache
    options = {"max_new_tokens": 128, "do_sample": False, "return_dict_in_generate": True, CACHE: cache}
    output = model.generate(input_ids=prompt, streamer=streamer, **options)
    seen, cache = output.sequences, cache_of(output)
    reply = tokenizer.decode(seen[0, prompt.shape[1] :], skip_special_tokens=True)
    messages += [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]
    print(f"[{seen.shape[1]} tokens so far, {cache_bytes(cache) / 2**20:.2f} MiB of cache]")
