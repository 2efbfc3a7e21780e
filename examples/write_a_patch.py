"""Write a patch: first one attention function, then a class with an option. Both can be undone, both work in spec strings."""

import functools
from dataclasses import dataclass

import torch

from patchkit import Patch, Stage, attention_patch, patched, register_patch, report
from patchkit.models import load_model


@attention_patch("nearest", mask=lambda batch, head, query, key: key > query - 16)
def nearest(module, query, key, value, attention_mask, scaling, **kwargs):
    """Softmax attention over the last 16 tokens."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


@register_patch("hotter")
@dataclass(frozen=True)
class Hotter(Patch):
    """Divide the logits by a temperature."""

    stage = Stage.WEIGHTS
    temperature: float = 2.0

    def apply(self, target, handle):
        head = target.model.get_output_embeddings()
        handle.hook(head, functools.partial(_divide, handle.record.hits))
        handle.set_attribute(head, "temperature", self.temperature)
        handle.record.changed("language-model heads", 1)


def _divide(hits, head, args, logits):
    hits["forwards"] += 1  # the report shows that the patch acts
    return logits / head.temperature


if __name__ == "__main__":
    model, tokenizer = load_model("bundled")
    ids = tokenizer("import os\nimport sys\n\n\ndef main(argv):\n    ", return_tensors="pt").input_ids
    with torch.no_grad(), patched(model, nearest(), "hotter(temperature=4.0)"):
        print(report(model))
        print("top token, patched:  ", repr(tokenizer.decode(model(ids).logits[0, -1].argmax())))
    with torch.no_grad():
        print("top token, unpatched:", repr(tokenizer.decode(model(ids).logits[0, -1].argmax())))
