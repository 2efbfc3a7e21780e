"""One set of patches on one model, as all checks of it share it: views of the model, sequences, and the proof to write to."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from patchkit import api
from patchkit.anatomy.target import Target
from patchkit.definitions import NoDefinition
from patchkit.patch import Patch, Promises
from patchkit.prove.checks.compare import Difference, difference
from patchkit.prove.checks.feeding import NotJudged, fed, in_chunks, one_by_one, watched
from patchkit.prove.proof import Check, Proof
from patchkit.testing import Snapshot, snapshot
from patchkit.tolerance import TOLERANCES
from patchkit.views import twin

Advance = Callable[[str], object]
# Tokens of a probe after every patch has begun to act.
BEYOND = 40
# Bounded positions are rebased after this many tokens at the latest. If a model keeps more than `LONG` tokens, sequences of the checks are
# too short to reach that.
_WRAP = 1024
LONG = 2048


class Case:
    """One set of patches on one model, with the state that all its checks share.

    Attributes:
        plain, full: the model without patches, and with all patches.
        before: snapshot of ``full`` before it was patched; None once it has been compared.
        reach: number of tokens beyond which every patch acts.
        probe: length of the sequences of most checks.
        longest: largest number of tokens that the model can take; None without a limit.
        thorough: long sequences are fed in more chunks.
    """

    def __init__(
        self,
        proof: Proof,
        model: PreTrainedModel,
        patches: list[Patch],
        texts: list[torch.Tensor],
        advance: Advance,
        thorough: bool = True,
    ) -> None:
        self.proof, self.model, self.patches, self.advance, self.thorough = proof, model, patches, advance, thorough
        self.spec = spec_of(patches) or "unpatched"
        self.plain: Any = twin(model)
        # Every call of generate is to be greedy, whatever the checkpoint's generation config is.
        self.pad = _pad(model)
        self.plain.generation_config = GenerationConfig(do_sample=False, pad_token_id=self.pad)
        fresh = self.twin()
        self.before: Snapshot | None = snapshot(fresh)
        self.full: Any = api.patch_model(fresh, *patches, verbose=False) if patches else fresh
        self.target = Target(self.plain)
        self.promises: dict[Patch, Promises] = {patch: patch.promises(self.target) for patch in patches}
        self._views: dict[tuple[str, ...], Any] = {}
        self.reach = max((promise.same_up_to for promise in self.promises.values()), default=0)
        self.tolerance = TOLERANCES[model.dtype]
        self.stream = torch.cat(texts)
        self.longest = self._longest()
        self.probe = self.sequence(self.reach + BEYOND).shape[1]
        self.first: torch.Tensor | None = None
        self.once: dict[str, Any] = {}

    # -- the model ---------------------------------------------------------------------------------------------------------

    def twin(self) -> Any:
        """A new unpatched view of the same weights."""
        return twin(self.plain)

    def view(self, patches: Sequence[Patch]) -> Any:
        """A view of the model with these patches only."""
        if not patches:
            return self.plain
        key = tuple(patch.spec for patch in patches)
        if len(patches) == len(self.patches):
            return self.full
        if key not in self._views:
            self._views[key] = api.patch_model(self.twin(), *patches, verbose=False)
        return self._views[key]

    def without(self, patch: Patch) -> Any:
        """A view of the model with all patches but one."""
        return self.view([other for other in self.patches if other is not patch])

    def facts(self, patch: Patch) -> Any:
        """The report of ``patch`` on the patched model."""
        return next(each for each in api.report(self.full).patches if each.name == patch.name)

    @property
    def rounding(self) -> list[Patch]:
        """The patches that round."""
        return [patch for patch, promise in self.promises.items() if promise.rounds]

    def _longest(self) -> int | None:
        if any(name.endswith("inv_freq") for name, _ in self.plain.named_buffers()):
            return None
        limits = (self.target.position_limit, getattr(self.target.config, "max_seq_len", None))
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def vocabulary(self) -> int:
        """V, the number of logits of a position."""
        count: int = (self.plain.get_output_embeddings() or self.plain.get_input_embeddings()).weight.shape[0]
        return count

    @property
    def wrap(self) -> int:
        """Number of tokens after which bounded positions have been rebased and growing buffers have grown."""
        return min(self.target.position_limit or _WRAP, _WRAP)

    # -- sequences ------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def cycle(self) -> torch.Tensor:
        """Six tokens that are rare in the documents."""
        count = Counter(self.stream.tolist())
        vocabulary = self.plain.get_input_embeddings().weight.shape[0]
        rarest = sorted((token for token in range(min(vocabulary, 1000)) if token != self.pad), key=lambda token: count[token])
        return torch.tensor(rarest[:6], device=self.model.device)

    def sequence(self, length: int, number: int = 0) -> torch.Tensor:
        """Token ids [1, length] from the documents, from another place for every number."""
        if self.longest is not None:
            length = min(length, self.longest)
        start = number * 997 % len(self.stream)
        repeats = math.ceil((start + length) / len(self.stream))
        return self.stream.repeat(repeats)[start : start + length][None].to(self.model.device)

    def places(self, length: int) -> list[int]:
        """Positions in a sequence of this length at which patches begin to act or positions are rebased."""
        return [place for place in sorted({self.reach, self.wrap, 2 * self.wrap}) if 0 < place < length]

    def watched(self, length: int, rows: int = 1) -> torch.Tensor | None:
        """Positions [P] at which logits of ``rows`` sequences of this length are compared; None for all."""
        return watched(length, rows * self.vocabulary * self.model.dtype.itemsize, self.places(length))

    def chunkings(self, length: int) -> list[list[int]]:
        """Chunkings of a sequence, as numbers of tokens per forward: whole without a cache (no numbers), whole, chunks, single tokens.

        Chunkings in which the unpatched model does not agree with itself are left out: some recurrent models restart with every chunk.
        """
        chunkings = [[length], in_chunks(length, self.places(length), self.thorough), one_by_one(length, self.reach)]
        return [[], *(chunks for chunks, own in zip(chunkings, self._own_by_chunking, strict=True) if own <= self.tolerance.differs)]

    @functools.cached_property
    def _own_by_chunking(self) -> list[float]:
        """The unpatched model's difference between a probe as a whole and in each other chunking."""
        ids, at = self.sequence(self.probe), self.watched(self.probe)
        whole = list(fed(self.plain, ids, [], at=at))
        chunkings = ([self.probe], in_chunks(self.probe, self.places(self.probe), self.thorough), one_by_one(self.probe, self.reach))
        return [difference(fed(self.plain, ids, chunks, at=at), whole).largest for chunks in chunkings]

    @property
    def own(self) -> float:
        """The unpatched model's difference between chunkings in which it agrees with itself."""
        return max((own for own in self._own_by_chunking if own <= self.tolerance.differs), default=0.0)

    # -- judging -----------------------------------------------------------------------------------------------------------

    def check(self, about: str, promise: str, run: Callable[[], Check | None]) -> None:
        """Add the check that ``run`` returns; an exception is a broken promise, or a reason not to judge."""
        self.advance(f"{self.spec}: {promise}")
        started = time.perf_counter()
        try:
            found = run()
        except (NotJudged, NoDefinition) as reason:
            found = Check(self.spec, about, promise, "not judged", detail=str(reason))
        except Exception as error:
            found = Check(self.spec, about, promise, "broken", detail=f"{type(error).__name__}: {error}")
        if found is not None:
            self.proof.add(found, time.perf_counter() - started)


def spec_of(patches: Sequence[Patch]) -> str:
    """The patches as one spec string."""
    return " + ".join(patch.spec for patch in patches)


def _pad(model: PreTrainedModel) -> int:
    config = model.generation_config
    ids = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id")]
    flat = [each[0] if isinstance(each, list) else each for each in ids if each is not None and each != []]
    return next(iter(flat), 0)


__all__ = ["BEYOND", "LONG", "Advance", "Case", "Difference", "NotJudged", "spec_of"]
