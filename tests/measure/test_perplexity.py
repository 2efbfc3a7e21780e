from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from patchkit import StreamingLLM, patched
from patchkit.errors import UnsupportedModel
from patchkit.measure.perplexity import TextError, block_nll, by_position, default_edges, stream_nll
from patchkit.measure.texts import encode, read_text
from patchkit.models import load_model
from patchkit.testing import TOLERANCES, logit_error, tiny_model

EXACT = TOLERANCES[torch.float32].logits


def _ids(length: int) -> torch.Tensor:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(1))


def _whole(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 512])
def test_stream_nll_equals_one_whole_forward(family: str, chunk: int) -> None:
    model, ids = tiny_model(family), _ids(40)
    nll = stream_nll(model, ids, chunk=chunk)
    assert nll.shape == (39,) and nll.dtype == torch.float32
    assert logit_error(nll, _whole(model, ids)) <= EXACT


def test_stream_nll_of_a_patched_model_does_not_depend_on_the_chunk() -> None:
    model, ids = tiny_model("llama"), _ids(60)
    unpatched = stream_nll(model, ids)
    with patched(model, StreamingLLM(sinks=2, window=10), verbose=False):
        chunks = [stream_nll(model, ids, chunk=chunk) for chunk in (1, 13, 60)]
    assert all(logit_error(nll, chunks[0]) <= EXACT for nll in chunks)
    assert logit_error(chunks[0][:12], unpatched[:12]) <= EXACT
    assert logit_error(chunks[0][12:], unpatched[12:]) > TOLERANCES[torch.float32].differs


def test_progress_adds_up() -> None:
    seen: list[int] = []
    stream_nll(tiny_model("llama"), _ids(40), chunk=16, progress=seen.append)
    assert seen == [16, 16, 7]
    seen.clear()
    block_nll(tiny_model("llama"), _ids(40), block=16, batch=1, progress=seen.append)
    assert seen == [16, 16, 7]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_block_nll_cuts_the_context(batch: int) -> None:
    model, ids = tiny_model("llama"), _ids(40)
    nll = block_nll(model, ids, block=16, batch=batch)
    expected = torch.cat([_whole(model, ids[start : start + 17]) for start in (0, 16, 32)])
    assert logit_error(nll, expected) <= EXACT


def test_too_few_tokens_or_a_bad_chunk() -> None:
    model = tiny_model("llama")
    with pytest.raises(TextError, match="longer text"):
        stream_nll(model, [5])
    with pytest.raises(ValueError, match="chunk is 0"):
        stream_nll(model, [5, 6, 7], chunk=0)


def test_a_text_beyond_the_position_table_is_refused() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(UnsupportedModel, match="position table"):
        stream_nll(model, _ids(model.config.n_positions + 10), chunk=64)


def test_by_position() -> None:
    nll = torch.arange(100, dtype=torch.float32)
    first, second = by_position(nll, [0, 64, 128])
    assert (first.start, first.stop, first.tokens) == (0, 64, 64)
    assert first.nll == pytest.approx(31.5) and first.perplexity == pytest.approx(math.exp(31.5))
    # two blocks of 32 with means 15.5 and 47.5
    assert first.stderr == pytest.approx(math.sqrt(2 * 16**2 / 1) / math.sqrt(2))
    assert (second.start, second.stop, second.tokens) == (64, 100, 36)
    assert second.stderr == math.inf
    assert by_position(nll, [100, 200]) == []
    with pytest.raises(ValueError, match="do not rise"):
        by_position(nll, [0, 5, 5])


def test_an_overflowing_perplexity_is_infinite() -> None:
    assert by_position(torch.full((64,), 1000.0), [0, 64])[0].perplexity == math.inf


def test_default_edges() -> None:
    assert default_edges(100) == [0, 512]
    assert default_edges(512) == [0, 512]
    assert default_edges(9000) == [0, 512, 2048, 8192, 32768]


def test_encode_puts_the_boundary_first(model_dir: Path) -> None:
    tokenizer = load_model(model_dir)[1]
    ids = encode(tokenizer, "import os\n")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "import os\n"


@pytest.mark.parametrize(
    "content, says",
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"\x89PNG\r\n\xff", "not UTF-8"), (b"abc\0def", "binary"), (None, "no such text file")],
)
def test_unusable_texts(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=says):
        read_text(path)


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is a directory"):
        read_text(tmp_path)


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffhé".encode())
    assert read_text(path) == "hé"
