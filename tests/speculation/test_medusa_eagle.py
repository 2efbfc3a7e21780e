from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.speculation.calibration import Calibration
from patchkit.speculation.drafter import Drafter, Proposal, Session, State
from patchkit.speculation.drafters.eagle import Eagle, PreparedEagle
from patchkit.speculation.drafters.medusa import Medusa
from patchkit.speculation.heads import EagleHead, MedusaHeads
from patchkit.speculation.tree import parents_of
from patchkit.testing import tiny_model
from patchkit.training.heads import hidden_states

MODEL = tiny_model("llama")
VOCABULARY = MODEL.config.vocab_size


def _eagle_head(model: Any = MODEL, seed: int = 0) -> EagleHead:
    size = model.config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = EagleHead(size, size, n_heads=2)
        for parameter in head.parameters():
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    return head.eval().requires_grad_(False)


class Unmoved(Calibration):
    """Learns nothing, so that proposals depend on the text alone."""

    def add(self, kind: Any, accepted: bool) -> None:
        return


DRAFTERS: dict[str, Drafter] = {
    "medusa": Medusa(MedusaHeads.start(MODEL, 4, "random")),
    "medusa tree": Medusa(MedusaHeads.start(MODEL, 3, "random"), tree=((0,), (1,), (0, 0), (0, 2), (0, 0, 0))),
    "eagle": Eagle(_eagle_head(), tree="chain"),
    "eagle tree": PreparedEagle(_eagle_head(), calibration=Unmoved()),
    "lite": Eagle(alpha=0.7),
}


def _sampler(drafted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return (logits.float() / 1.3).softmax(-1)


def _texts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def _state(tokens: torch.Tensor, lengths: list[int], pads: list[int], sampled: bool = False) -> State:
    return State(F.pad(tokens, (0, 20)), list(lengths), list(pads), _sampler if sampled else None)


def _fed(tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of texts without padding."""
    return hidden_states(MODEL, tokens)


def _begun(drafter: Drafter, text: torch.Tensor, prompt: int, hidden: torch.Tensor | None = None) -> Session:
    """A session that has seen the first ``prompt`` tokens of one text."""
    session = drafter.begin(MODEL, _state(text, [prompt], [0]))
    session.observe((_fed(text) if hidden is None else hidden)[:, :prompt], [prompt])
    return session


def _propose(session: Session, state: State, k: int = 4) -> Proposal:
    torch.manual_seed(0)
    proposal = session.propose(state, k)
    assert proposal is not None
    assert proposal.tokens.shape[0] == state.rows and proposal.tokens.dtype == torch.int64 and proposal.tokens.shape[1] <= k
    assert proposal.counts == [proposal.tokens.shape[1]] * state.rows
    return proposal


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("sampled", [False, True])
def test_rejected_tokens_leave_no_trace(name: str, sampled: bool) -> None:
    """Rounds with any number of accepted tokens, and rounds without a proposal: as a session that saw the final text at once."""
    text = _texts(1, 40)
    hidden = _fed(text)
    session = _begun(DRAFTERS[name], text, 9)
    known = 10
    for accepted, asked in ((2, True), (0, True), (4, True), (3, False), (0, False), (1, True), (4, True)):
        if asked:
            _propose(session, _state(text, [known], [0], sampled))
        rejected = torch.randn(1, 4 - accepted, hidden.shape[2]) * 100
        session.observe(torch.cat([hidden[:, known - 1 : known + accepted], rejected], 1), [accepted + 1])
        known += accepted + 1
    fresh = _begun(DRAFTERS[name], text, known - 1)
    one, other = (_propose(s, _state(text, [known], [0], sampled)) for s in (session, fresh))
    assert torch.equal(one.tokens, other.tokens)
    if sampled and "tree" not in name:
        torch.testing.assert_close(one.probabilities, other.probabilities, atol=1e-5, rtol=1e-4)
    else:
        assert one.probabilities is None


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_row_drafts_the_same_alone_and_in_a_batch(name: str) -> None:
    """Rows with padding of their own, their own accepted counts, and rows that leave."""
    texts, pads, prompt = _texts(3, 40), [0, 3, 5], 10
    columns = torch.stack([F.pad(text, (pad, 0))[:40] for text, pad in zip(texts, pads, strict=True)])
    hidden = torch.stack([F.pad(_fed(text[None])[0], (0, 0, pad, 0), value=7.0)[:40] for text, pad in zip(texts, pads, strict=True)])
    together = DRAFTERS[name].begin(MODEL, _state(columns, [prompt - 1] * 3, pads))
    alone = [DRAFTERS[name].begin(MODEL, _state(columns[row : row + 1], [prompt - 1], [pads[row]])) for row in range(3)]
    together.observe(hidden[:, : prompt - 1], [prompt - 1] * 3)
    for row, session in enumerate(alone):
        session.observe(hidden[row : row + 1, : prompt - 1], [prompt - 1])
    rows, known = [0, 1, 2], [prompt] * 3
    for accepted, keep in (([0, 3, 1], None), ([4, 0, 2], None), ([1, 1, 4], [2, 0]), ([0, 4], None), ([2, 0], [1]), ([3], None)):
        proposal = _propose(together, _state(columns[rows], known, [pads[row] for row in rows]))
        fed = torch.randn(len(rows), 5, hidden.shape[2])
        for i, row in enumerate(rows):
            single = _propose(alone[row], _state(columns[row : row + 1], [known[i]], [pads[row]]))
            assert torch.equal(single.tokens[0], proposal.tokens[i]) and parents_of(single, 0) == parents_of(proposal, i)
            fed[i, : accepted[i] + 1] = hidden[row, known[i] - 1 : known[i] + accepted[i]]
            alone[row].observe(fed[i : i + 1], [accepted[i] + 1])
        together.observe(fed, [count + 1 for count in accepted])
        known = [k + count + 1 for k, count in zip(known, accepted, strict=True)]
        if keep is not None:
            together.select_rows(keep)
            rows, known = [rows[i] for i in keep], [known[i] for i in keep]


@pytest.mark.parametrize("name", [name for name in DRAFTERS if "tree" not in name])
def test_tokens_are_drawn_from_the_probabilities(name: str) -> None:
    text = _texts(1, 12)
    state = _state(text, [12], [0], sampled=True)
    session = _begun(DRAFTERS[name], text, 11)
    torch.manual_seed(0)
    draws, counts = 2000, torch.zeros(VOCABULARY)
    for _ in range(draws):
        proposal = session.propose(state, 1)
        assert proposal is not None and proposal.probabilities is not None
        counts[proposal.tokens[0, 0]] += 1
    expected = proposal.probabilities[0, 0] * draws
    assert proposal.probabilities.dtype == torch.float32
    torch.testing.assert_close(expected.sum(), torch.tensor(float(draws)))
    # Tokens rarer than 5 draws are counted together, as the test wants; 5 standard deviations of chi-square with n degrees of freedom.
    rare = expected < 5
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    freedom = len(expected) - 1
    assert freedom >= 3 and ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_later_draws_are_seen_by_the_sampler() -> None:
    seen: list[list[int]] = []

    def sampler(drafted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append(drafted[0].tolist())
        return logits.float().softmax(-1)

    text = _texts(1, 12)
    state = State(F.pad(text, (0, 9)), [12], [0], sampler)
    session = _begun(DRAFTERS["eagle"], text, 11)
    drafted = _propose(session, state, 3).tokens[0].tolist()
    assert seen == [drafted[:n] for n in range(3)]


def test_lite_extrapolates_the_last_two_hidden_states() -> None:
    text = _texts(1, 12)
    hidden = _fed(text)
    session = _begun(DRAFTERS["lite"], text, 11)
    before, last = hidden[0, 9], hidden[0, 10]
    one = last + 0.7 * (last - before)
    two = one + 0.7 * (one - last)
    expected = MODEL.lm_head(torch.stack([one, two])).argmax(-1)
    assert torch.equal(_propose(session, _state(text, [12], [0]), 2).tokens[0], expected)


def test_eagle_computes_what_its_equations_say() -> None:
    """Against one causal pass over true and drafted features, without buffers, written out anew."""
    head, text = _eagle_head(), _texts(1, 12)
    session, features = _begun(DRAFTERS["eagle"], text, 11), _fed(text)[0, :11]
    drafted: list[int] = []
    for _ in range(4):
        following = torch.tensor(text[0, 1:].tolist() + drafted)
        assert len(following) == len(features)
        features = torch.cat([features, _reference(head, MODEL.get_input_embeddings()(following), features)[-1:]])
        drafted.append(int(MODEL.lm_head(features[-1]).argmax()))
    assert _propose(session, _state(text, [12], [0])).tokens[0].tolist() == drafted


@pytest.mark.parametrize("sharp", [1, 20, 60])
@pytest.mark.parametrize("prompt", [7, 11])
def test_the_tree_of_eagle_holds_the_likeliest_of_all_paths(sharp: float, prompt: int) -> None:
    """Against every path of the four likeliest tokens after each other, each computed by one causal pass."""
    head, text, nodes = _eagle_head(), _texts(1, 12)[:, : prompt + 1], 4
    session, true = _begun(DRAFTERS["eagle tree"], text, prompt), _fed(text)[0, :prompt]
    session.lm_head = lambda hidden: sharp * MODEL.lm_head(hidden)  # type: ignore[attr-defined]
    found: dict[tuple[int, ...], float] = {}

    def follow(path: tuple[int, ...], features: torch.Tensor, probability: float) -> None:
        following = torch.tensor([*text[0, 1:].tolist(), *path])
        features = torch.cat([features, _reference(head, MODEL.get_input_embeddings()(following), features)[-1:]])
        best = (sharp * MODEL.lm_head(features[-1])).softmax(-1).topk(nodes)
        for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            found[(*path, token)] = probability * chance
            if len(path) + 1 < nodes:
                follow((*path, token), features, probability * chance)

    follow((), true, 1.0)
    proposal = _propose(session, _state(text, [prompt + 1], [0]), nodes)
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(proposal.tokens[0].tolist(), parents_of(proposal, 0), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert paths == sorted(found, key=lambda path: -found[path])[:nodes]
    assert sharp == 1 or len(paths[-1]) > 1
    assert proposal.chances is not None
    probabilities = [found[path] / (found[path[:-1]] if len(path) > 1 else 1) for path in paths]
    assert proposal.chances[0] == pytest.approx(probabilities, abs=1e-4)


def test_training_sees_what_drafting_computes() -> None:
    """`unrolled`, which training uses, against the same reference, from every position on."""
    head, text = _eagle_head(), _texts(1, 12)
    hidden, embedded = _fed(text)[0], MODEL.get_input_embeddings()(text[0, 1:])
    outputs = head.unrolled(embedded[None], hidden[None, :-1], 3)
    for start in range(1, 9):
        features = hidden[: start + 1]
        for j in range(3):
            features = torch.cat([features, _reference(head, embedded[: len(features)], features)[-1:]])
            torch.testing.assert_close(outputs[j][0, start + j], features[-1], atol=1e-4, rtol=1e-4)


def _reference(head: EagleHead, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[T, D] from [T, E] and [T, D]."""
    weights = head.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    length, size = features.shape
    x = torch.cat([norm(embedded, "norm_embedding"), norm(features, "norm_feature")], 1) @ weights["joined.weight"].T
    queries, keys, values = (norm(x, "norm_attention") @ weights["qkv.weight"].T).view(length, 3, head.n_heads, -1).unbind(1)
    width = size // head.n_heads
    angle = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    turned = []
    for part in (queries, keys):
        even, odd = part[..., 0::2], part[..., 1::2]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned.append(torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2))
    scores = torch.einsum("qhd,khd->hqk", *turned) / math.sqrt(width)
    scores = scores + torch.full((length, length), float("-inf")).triu(1)
    x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).reshape(length, size) @ weights["attended.weight"].T
    gate, up = (norm(x, "norm_mlp") @ weights["gate_up.weight"].T).chunk(2, -1)
    return norm(x + (gate * gate.sigmoid() * up) @ weights["down.weight"].T, "norm_out")


def test_tree_holds_the_ranked_tokens_of_each_head() -> None:
    drafter = DRAFTERS["medusa tree"]
    assert isinstance(drafter, Medusa) and isinstance(drafter.heads, MedusaHeads)
    text = _texts(2, 12)
    hidden = _fed(text)
    session = drafter.begin(MODEL, _state(text, [11, 11], [0, 0]))
    session.observe(hidden[:, :11], [11, 11])
    ranked = drafter.heads.logits(hidden[:, 10], MODEL.lm_head).argsort(-1, descending=True)
    proposal = _propose(session, _state(text, [12, 12], [0, 0]), 9)
    assert proposal.parents == (-1, -1, 0, 0, 2)
    expected = torch.stack([ranked[:, 0, 0], ranked[:, 0, 1], ranked[:, 1, 0], ranked[:, 1, 2], ranked[:, 2, 0]], 1)
    assert torch.equal(proposal.tokens, expected)
    cut = _propose(session, _state(text, [12, 12], [0, 0]), 3)
    assert cut.parents == (-1, -1, 0) and torch.equal(cut.tokens, expected[:, :3])


def test_a_text_whose_beginning_was_cached() -> None:
    text = _texts(1, 12)
    state = _state(text, [12], [0])
    for name in ("medusa", "lite"):
        session = DRAFTERS[name].begin(MODEL, _state(text, [11], [0]))
        session.observe(_fed(text)[:, 8:11], [3])
        assert torch.equal(_propose(session, state, 4).tokens, _propose(_begun(DRAFTERS[name], text, 11), state, 4).tokens)
    eagle = DRAFTERS["eagle"].begin(MODEL, _state(text, [11], [0]))
    eagle.observe(_fed(text)[:, 8:11], [3])
    short = _begun(DRAFTERS["eagle"], text[:, 8:], 3, _fed(text)[:, 8:])
    assert torch.equal(_propose(eagle, state).tokens, _propose(short, _state(text[:, 8:], [4], [0])).tokens)


def test_medusa_proposes_no_more_than_it_has_heads() -> None:
    text = _texts(1, 12)
    assert _propose(_begun(DRAFTERS["medusa"], text, 11), _state(text, [12], [0]), 9).tokens.shape == (1, 4)


@pytest.mark.parametrize("name", DRAFTERS)
def test_nothing_is_proposed_before_anything_was_seen(name: str) -> None:
    state = _state(_texts(1, 4), [4], [0])
    assert DRAFTERS[name].begin(MODEL, state).propose(state, 2) is None


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Eagle(alpha=float("nan")), "alpha"),
        (lambda: Eagle(tree="static"), "tree"),  # type: ignore[arg-type]
        (lambda: Medusa(init="zero"), "init"),  # type: ignore[arg-type]
        (lambda: Medusa(n_heads=0), "at least one"),
        (lambda: Medusa(tree=()), "no node"),
        (lambda: Medusa(tree=((0, 0), (0,))), "no parent before it"),
        (lambda: Medusa(tree=((0,), (0,))), "twice"),
    ],
)
def test_bad_options_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_heads_that_do_not_go_with_the_model_are_refused() -> None:
    with pytest.raises(PatchError, match="medusa heads, not eagle heads"):
        Eagle(MedusaHeads.start(MODEL)).check(Target(MODEL))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="hidden size"):
        Eagle("bundled").check(Target(MODEL))
    with pytest.raises(PatchError, match="deep"):
        Medusa(n_heads=1, tree=((0,), (0, 0))).check(Target(MODEL))
    with pytest.raises(PatchError, match="no file of draft heads"):
        Medusa("nowhere").check(Target(MODEL))
    Medusa().check(Target(MODEL))
