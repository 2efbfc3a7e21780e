"""`patchkit.rl.logprobs`: log probabilities under the patched model, whatever mode it is in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patchkit import patch_model
from patchkit.rl import logprobs
from patchkit.testing import tiny_model

IDS = torch.arange(36).view(2, 18) % 7 * 11 + 5
SPECS = ["none", "streaming(sinks=2, window=6)", "mlp_int8(mode=weight_only, view=True)"]


def stepwise(model: Any, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of one row [1, T], from the logits that `generate` itself draws by."""
    found = []
    for end in range(1, ids.shape[1]):
        out = model.generate(
            ids[:, :end], attention_mask=torch.ones_like(ids[:, :end]), max_new_tokens=1, do_sample=False,
            return_dict_in_generate=True, output_logits=True, pad_token_id=0,
        )  # fmt: skip
        found.append((out.logits[0] / temperature).log_softmax(-1)[0, ids[0, end]])
    return torch.stack(found)


@pytest.mark.parametrize("spec", SPECS)
def test_they_are_those_of_generate(spec: str) -> None:
    model = patch_model(tiny_model("llama"), spec, verbose=False) if spec != "none" else tiny_model("llama")
    model.train()
    found = logprobs(model, IDS, temperature=0.7)
    assert found.shape == (2, 17) and found.dtype == torch.float32 and model.training
    for row in (0, 1):
        torch.testing.assert_close(found[row], stepwise(model, IDS[row : row + 1], 0.7), atol=2e-4, rtol=1e-4)
    assert torch.equal(found, logprobs(model.eval(), IDS, temperature=0.7))
    torch.testing.assert_close(logprobs(model, IDS, new=5), logprobs(model, IDS)[:, -5:])


@pytest.mark.parametrize("spec", SPECS)
def test_padding_changes_nothing(spec: str) -> None:
    model = patch_model(tiny_model("llama"), spec, verbose=False) if spec != "none" else tiny_model("llama")
    ids, mask = torch.zeros(2, 24, dtype=torch.int64), torch.zeros(2, 24, dtype=torch.int64)
    for row, (start, count) in enumerate(((0, 18), (4, 14))):  # padding on the right; on both sides
        ids[row, start : start + count], mask[row, start : start + count] = IDS[row, :count], 1
    found = logprobs(model, ids, mask, new=12)
    for row, (start, count) in enumerate(((0, 18), (4, 14))):
        alone = logprobs(model, IDS[row : row + 1, :count])[0]
        scored = found[row, : start + count - 12]
        torch.testing.assert_close(scored, alone[-len(scored) :], atol=2e-4, rtol=1e-4)
        assert not found[row, start + count - 12 :].any()


def test_the_weight_of_a_lossy_rollout() -> None:
    """The mean of the importance weights of texts that were drawn under the patch is 1 over all of them."""
    plain, model = tiny_model("llama"), patch_model(tiny_model("llama"), "mlp_int8(mode=weight_only, view=True)", verbose=False).train()
    texts = torch.cartesian_prod(torch.tensor([5]), torch.tensor([9]), torch.arange(plain.config.vocab_size))
    own, rollout = logprobs(plain, texts, new=1), logprobs(model, texts, new=1)
    assert abs(float((rollout.exp() * (own - rollout).exp()).sum()) - 1) < 1e-4 and not torch.equal(own, rollout)


@pytest.mark.parametrize(("options", "message"), [({"new": 0}, "new=0"), ({"new": 18}, "new=18"), ({"temperature": 0.0}, "temperature")])
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logprobs(tiny_model("llama"), IDS, **options)
