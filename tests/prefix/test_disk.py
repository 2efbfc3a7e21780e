"""Blocks on disk: another process finds them, and what is damaged is a miss."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit import PrefixCache, patch_model, report
from patchkit.prefix import prefix_statistics
from patchkit.streaming.runtime import runtime_of
from patchkit.testing import tiny_model

BLOCK = 8
STREAMING, LINEAR = "streaming(sinks=2, window=6)", "linear(window=6)"
# Slices; states as a whole, the last with token ids in it; states beside slices; recurrent states.
SHARED = [
    ("llama", "none"),
    ("llama", STREAMING),
    ("llama", LINEAR),
    ("llama", "streaming(sinks=2, window=6, refresh=reencode(every=5))"),
    ("gemma3_text", "none"),
    ("qwen3_next", "none"),
]


def prompt(tokens: int = 37, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(seed))


def with_disk(folder: Path | None, spec: str = "none", family: str = "llama", **options: Any) -> Any:
    cache = PrefixCache(block=BLOCK, disk=None if folder is None else str(folder), **options)
    return patch_model(tiny_model(family), *([] if spec == "none" else [spec]), cache, verbose=False)


def generated(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **options)


def warned(model: Any) -> dict[str, int]:
    return {text: count for text, count in report(model).patches[-1].warnings.items() if count}


@pytest.mark.parametrize("spec", ["none", "mlp_int8(mode=weight_only)", "speculative(k=2)"])
def test_another_model_with_these_weights_finds_the_bits_of_a_miss(tmp_path: Path, spec: str) -> None:
    miss = generated(with_disk(tmp_path, spec), prompt())
    model = with_disk(tmp_path, spec)
    hit = generated(model, prompt())
    assert torch.equal(hit.logits[0], miss.logits[0]) and torch.equal(hit.sequences, miss.sequences)
    found = report(model).patches
    by_name = {each.name: each.hits for each in found}["prefix_cache"]
    assert by_name["disk reads"] == 4 and by_name["reused tokens"] == 32 and "disk writes" not in by_name
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(list(folder.iterdir())) == 4


@pytest.fixture(scope="module")
def of_another_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a process that has ended has kept the prompt under all of `SHARED`."""
    folder = tmp_path_factory.mktemp("shared")
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from prefix.test_disk import *
for family, spec in SHARED:
    generated(with_disk(Path({str(folder)!r}), spec, family), prompt())
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.parametrize(("family", "spec"), SHARED)
def test_another_process_finds_them(of_another_process: Path, family: str, spec: str) -> None:
    model = with_disk(of_another_process, spec, family)
    hit, miss = generated(model, prompt()), generated(with_disk(None, spec, family), prompt())
    assert torch.equal(hit.logits[0], miss.logits[0]) and torch.equal(hit.sequences, miss.sequences)
    assert prefix_statistics(model).reused_tokens == 32 and "disk writes" not in report(model).patches[-1].hits


def test_other_weights_patches_and_salts_have_other_files(tmp_path: Path) -> None:
    generated(with_disk(tmp_path), prompt())
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[1, 2] += 1e-3  # none of the values that a stamp looks at
    patch_model(other, PrefixCache(block=BLOCK, disk=str(tmp_path)), verbose=False)
    models = [other, with_disk(tmp_path, "mlp_int8"), with_disk(tmp_path, family="qwen2"), with_disk(tmp_path).to(torch.bfloat16)]
    for model in models:
        generated(model, prompt())
        assert prefix_statistics(model).reused_tokens == 0
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(("place", "spec"), [*((place, "none") for place in (0, 4, 40, 500, -1)), (500, STREAMING), (-1, STREAMING)])
def test_one_flipped_byte_is_a_miss_and_said_once(tmp_path: Path, place: int, spec: str) -> None:
    expected = generated(with_disk(tmp_path, spec), prompt())
    for path in tmp_path.glob("*/*"):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(bytes(data))
    model = with_disk(tmp_path, spec)
    for _ in range(2):
        found = generated(model, prompt())
        assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.logits[0], expected.logits[0])
    assert prefix_statistics(model).reused_tokens == 32  # of the second call, from memory
    (text,) = warned(model)
    assert "damaged" in text


@pytest.mark.parametrize("spec", ["none", STREAMING])
def test_a_damaged_file_is_written_again(tmp_path: Path, spec: str) -> None:
    generated(with_disk(tmp_path, spec), prompt())
    largest = max(tmp_path.glob("*/*"), key=lambda path: path.stat().st_size)  # the last block
    largest.write_bytes(largest.read_bytes()[:-1])
    for expected in ({"none": 24, STREAMING: 16}[spec], 32):
        model = with_disk(tmp_path, spec)
        generated(model, prompt())
        assert prefix_statistics(model).reused_tokens == expected


def test_files_of_other_tokens_and_cut_files_are_a_miss(tmp_path: Path) -> None:
    generated(with_disk(tmp_path), prompt())
    generated(with_disk(tmp_path), prompt(seed=1))
    first, *others = sorted(tmp_path.glob("*/*"))
    for path in others:
        path.write_bytes(first.read_bytes())
    first.write_bytes(first.read_bytes()[:100])
    for seed in range(2):
        model = with_disk(tmp_path)
        assert torch.equal(generated(model, prompt(seed=seed)).logits[0], generated(with_disk(None), prompt(seed=seed)).logits[0])
        assert prefix_statistics(model).reused_tokens == 0


def test_the_files_have_a_bound(tmp_path: Path) -> None:
    generated(with_disk(tmp_path), prompt())
    size = max(path.stat().st_size for path in tmp_path.glob("*/*"))
    model = with_disk(tmp_path, disk_bytes=5 * size)
    for seed in range(4):
        generated(model, prompt(seed=seed))
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 5 * size
    assert prefix_statistics(model).left_alone == 0
    tiny = with_disk(tmp_path / "tiny", disk_bytes=10)
    generated(tiny, prompt())
    assert not list(tmp_path.glob("tiny/*/*"))


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    model = with_disk(tmp_path / "file" / "below")
    for _ in range(2):
        generated(model, prompt())
    assert prefix_statistics(model).hits == 1
    assert all("prefix_cache" in text for text in warned(model)) and warned(model)


@pytest.mark.parametrize("given", ["", 3, True])
def test_bad_folders_are_refused_by_name(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="disk="):
        PrefixCache(disk=given)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        PrefixCache(disk=str(tmp_path / "file"))


def test_the_files_of_a_stream_are_few_and_of_one_size(tmp_path: Path) -> None:
    """A state is all that is kept of a stream, so there are no files of blocks without one; and its bytes do not grow with the text."""
    sizes = []
    for tokens in (8 * 8 + 1, 64 * 8 + 1):
        folder = tmp_path / str(tokens)
        generated(with_disk(folder, STREAMING), prompt(tokens))
        files = list(folder.glob("*/*"))
        assert len(files) == (tokens // 8).bit_length()  # behind 1, 2, 4, ... blocks
        sizes.append(max(path.stat().st_size for path in files) - 8 * (tokens - 1))
    assert abs(sizes[0] - sizes[1]) < 64  # numbers of another length in the text
    later = with_disk(tmp_path / "513", STREAMING)
    branch = torch.cat([prompt(513)[:, :300], prompt(20, 7)], 1)
    found, expected = generated(later, branch), generated(with_disk(None, STREAMING), branch)
    assert torch.equal(found.logits[0], expected.logits[0]) and prefix_statistics(later).reused_tokens == 256


def test_a_state_that_is_kept_later_is_added_to_its_block(tmp_path: Path) -> None:
    """Where prompts branch off, a block gets a state that it had none of."""
    head = prompt(8 * 7 + 3)
    for seed in range(3):
        model = with_disk(tmp_path, "none", "gemma3_text")  # as three processes
        ids = torch.cat([head, prompt(20, 5 + seed)], 1)
        found, expected = generated(model, ids), generated(with_disk(None, "none", "gemma3_text"), ids)
        assert torch.equal(found.logits[0], expected.logits[0])
        assert prefix_statistics(model).reused_tokens == (0, 8 * 4, 8 * 7)[seed]


def test_other_converted_attention_has_other_files(tmp_path: Path) -> None:
    """The parts of hybrid attention are no weights of the model, and a spec only names their file."""
    for change in (0.0, 0.5):
        model = with_disk(tmp_path, LINEAR)
        with torch.no_grad():
            for rule in runtime_of(model.model).plan.rules.values():
                for parameter in (each for part in rule.parts.values() for each in part.parameters()):
                    parameter.add_(change)
        generated(model, prompt())
        assert prefix_statistics(model).reused_tokens == 0
    assert len(list(tmp_path.iterdir())) == 2
