"""What the families that stand on transformers share: a timed call of `generate`, and the bytes of weights and caches."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peer import Answer, Clock, Way

THREADS = 2
torch.set_num_threads(THREADS)
transformers.logging.set_verbosity_error()


def load(path: Any, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


class Timed:
    """A stopping criterion that never stops anything, and tells the clock what is there."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, tokens: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self.clock.note(tokens.shape[1])
        return torch.zeros(len(tokens), dtype=torch.bool)


class Held(Timed):
    """One that notes how much memory keys and values take that was not taken before the call."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.before, self.cache = bytes_of_keys_and_values(), 0

    def __call__(self, tokens: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self.cache = bytes_of_keys_and_values() - self.before
        return super().__call__(tokens, scores, **options)


@contextmanager
def passes_counted(model: Any, clock: Clock) -> Iterator[None]:
    """Count the passes through the first decoder layer: of an eager model, one per pass over its weights."""

    def count(*arguments: Any) -> None:
        clock.passes += 1

    hook = model.get_decoder().layers[0].register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def generate(model: Any, prompt: list[int], new_tokens: int, timed: Timed, **options: Any) -> list[int]:
    """Greedy new tokens after one prompt."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([timed]),
        **options,
    )
    return output[0, len(prompt) :].tolist()


# From a prompt's length and the most new tokens to options of `generate`.
Options = Callable[[int, int], dict[str, Any]]


def no_options(prompt: int, new_tokens: int) -> dict[str, Any]:
    return {}


def way_of(
    model: Any,
    options: Options = no_options,
    *,
    counted: bool = True,
    window: int | None = None,
    slots: int | None = None,
    dtype: str | None = None,
    cache: bool = False,
) -> Way:
    """A model's own `generate` as a way to decode.

    Args:
        counted: whether passes are counted by a hook; not where it would change what is measured, as in compiled models.
        cache: whether the memory of its cache is of interest.
    """

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        clock = Clock()
        if not counted:
            return clock.answer(generate(model, prompt, new_tokens, Timed(clock), **options(len(prompt), new_tokens)))
        with passes_counted(model, clock):
            ids = generate(model, prompt, new_tokens, Timed(clock), **options(len(prompt), new_tokens))
        return clock.answer(ids, counted=True)

    def cache_bytes(prompt: list[int]) -> int:
        held = Held(Clock())
        generate(model, prompt, 2, held, **options(len(prompt), 2))
        return held.cache

    dtype = dtype or str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return Way(answer, bytes_per_pass(model), kv_bytes_per_token(model), dtype, window, slots, cache_bytes if cache else None)


def bytes_per_pass(model: Any) -> int:
    """Bytes of the stored weights that a pass over one token reads: all but the embeddings, of which it reads a row; a head that shares its
    weight with them is read whole."""
    read: dict[int, int] = {}
    for module in model.modules():
        if not isinstance(module, torch.nn.Embedding):
            for tensor in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False)):
                read[id(tensor)] = stored_bytes(tensor)
    return sum(read.values())


def stored_bytes(tensor: Any) -> int:
    """Bytes that a tensor takes; of one that holds others, such as torchao's, theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())


def kv_bytes_per_token(model: Any) -> int:
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize)


def bytes_of_keys_and_values() -> int:
    """Bytes that floating-point tensors of four dimensions hold, whoever holds them: in a decoder that waits for its next token, those are
    keys and values, and masks that are small beside them."""
    gc.collect()  # what earlier calls have left must not be counted, nor be freed between two counts
    storages = {}
    for found in gc.get_objects():
        if type(found) is torch.Tensor and found.ndim == 4 and found.is_floating_point():
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
