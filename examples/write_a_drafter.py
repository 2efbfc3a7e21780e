"""Write a drafter: options, and a session that proposes tokens. No drafter can change a text, so it need not be right."""

import itertools
from dataclasses import dataclass

import torch

from patchkit import patched
from patchkit.models import load_model
from patchkit.speculation import Drafter, Proposal, Session, statistics_of


@dataclass(frozen=True)
class Bigram(Drafter, name="bigram"):
    """Propose, again and again, the token that last followed the current one."""

    longest: int = 8

    def begin(self, model, state):
        return BigramSession(self.longest)


class BigramSession(Session):
    def __init__(self, longest):
        self.longest = longest

    def propose(self, state, k):
        rows = [self.continued(state.text(row).tolist(), min(k, self.longest)) for row in range(state.rows)]
        return Proposal(torch.tensor(rows, device=state.tokens.device), [len(row) for row in rows])

    def continued(self, text, count):
        after = dict(itertools.pairwise(text))  # the latest pair stays
        tokens = text[-1:]
        for _ in range(count):
            tokens.append(after.get(tokens[-1], tokens[-1]))
        return tokens[1:]


if __name__ == "__main__":
    model, tokenizer = load_model("bundled")
    ids = tokenizer("import os\nimport sys\nimport re\nimport", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=32, do_sample=False)
    with patched(model, "speculative(draft=bigram(longest=4), k=4)"):  # or Speculative(draft=Bigram(4), k=4)
        assert torch.equal(model.generate(ids, max_new_tokens=32, do_sample=False), plain)
        print(statistics_of(model))
