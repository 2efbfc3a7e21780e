"""Heads that draft from a model's last hidden states: `MedusaHeads` and `EagleHead`, and their files.

Heads borrow the model's LM head and embeddings, so a file holds little more than a layer. It names the model it was trained
for, by sizes and by a fingerprint of the LM head, and is refused for any other.

Shapes: R rows, T positions, N heads, D hidden size, E embedding size, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from patchkit.errors import PatchError, UnsupportedModel
from patchkit.trained_for import TrainedFor

Init = Literal["tie", "copy", "random"]
_FORMAT = "patchkit heads 1"
_ROPE_BASE = 10000.0


class Heads(nn.Module):
    """What `MedusaHeads` and `EagleHead` share.

    Attributes:
        options: the constructor's arguments, kept in the file.
        trained_for: the model they were trained for; None for heads that were not trained.
    """

    kind: ClassVar[str]

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options
        self.trained_for: TrainedFor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.options.items())})"

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write a safetensors file with weights of ``dtype``.

        Raises:
            PatchError: the heads were not trained for a model.
        """
        if self.trained_for is None:
            raise PatchError("these heads were not trained for a model, so there is nothing to save: train them with train_heads")
        metadata = {
            "format": _FORMAT,
            "kind": self.kind,
            "options": json.dumps(self.options),
            "trained_for": json.dumps(asdict(self.trained_for)),
        }
        save_file({name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in self.state_dict().items()}, path, metadata)

    def check_fits(self, model: Any) -> None:
        """Refuse a model that these heads were not trained for.

        Raises:
            UnsupportedModel: another hidden size, vocabulary, embedding size or LM head.
        """
        have = TrainedFor.of(model)
        wanted = self.trained_for or have
        if self.options["hidden_size"] != have.hidden_size:
            what = f"a hidden size of {self.options['hidden_size']}, and this one's is {have.hidden_size}"
        elif wanted.vocabulary != have.vocabulary:
            what = f"a vocabulary of {wanted.vocabulary} tokens, and this one's has {have.vocabulary}"
        elif wanted.embedding_size != have.embedding_size:
            what = f"embeddings of width {wanted.embedding_size}, and this one's have {have.embedding_size}"
        elif wanted.fingerprint != have.fingerprint:
            what = "another LM head: the sizes agree, the weights do not"
        elif (name := wanted.other_weight(have)) is not None:
            what = f"the same LM head, but another {name}"
        else:
            return
        raise UnsupportedModel(
            f"these {self.kind} heads were trained for a {wanted.model_type} model with {what}. Train heads for this model: "
            f"patchkit train-heads MODEL --kind {self.kind} --text FILE"
        )


class MedusaHeads(Heads):
    """Medusa (Cai et al. 2024, https://arxiv.org/abs/2401.10774): N heads guess the N tokens after the next one, each on its own.

    Head i is one residual block, ``h + silu(W_i h + b_i)``, under the model's own LM head.

    Args:
        hidden_size: D.
        n_heads: N.
        vocabulary: V, if every head has an LM head of its own, which `MedusaHeads.start` fills; 0: the model's is shared.
    """

    kind = "medusa"

    def __init__(self, hidden_size: int, n_heads: int = 4, vocabulary: int = 0):
        super().__init__({"hidden_size": hidden_size, "n_heads": n_heads, "vocabulary": vocabulary})
        self.blocks = nn.Linear(hidden_size, n_heads * hidden_size)
        self.lm_heads = nn.Parameter(torch.empty(n_heads, vocabulary, hidden_size)) if vocabulary else None

    @classmethod
    def start(cls, model: Any, n_heads: int = 4, init: Init = "tie", seed: int = 0) -> MedusaHeads:
        """Untrained heads for ``model``: "tie" predicts what the LM head does, with its weight shared; "copy" too, with a copy of
        the weight for each head; "random" has random blocks under the shared weight."""
        facts = TrainedFor.of(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = cls(facts.hidden_size, n_heads, facts.vocabulary if init == "copy" else 0)
        if init != "random":
            nn.init.zeros_(heads.blocks.weight)
            nn.init.zeros_(heads.blocks.bias)
        weight = model.get_output_embeddings().weight
        if heads.lm_heads is not None:
            heads.lm_heads.data.copy_(weight.detach().expand_as(heads.lm_heads))
        return heads.to(weight.device, weight.dtype).eval().requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] to what each head hands to its LM head, [..., N, D]."""
        return hidden.unsqueeze(-2) + F.silu(self.blocks(hidden)).unflatten(-1, (-1, hidden.shape[-1]))

    def logits(self, hidden: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
        """[..., D] to [..., N, V]; head i's are about the token i + 2 positions after the one that ``hidden`` was computed at."""
        blocks = self(hidden)
        if self.lm_heads is None:
            return lm_head(blocks)
        return torch.einsum("...nd,nvd->...nv", blocks, self.lm_heads)


class KeyValues:
    """Keys and values of an `EagleHead`: buffers [R, room, H, d] that grow, in which a slot is written anew when drafts were rejected."""

    def __init__(self, head: EagleHead, rows: int):
        weight = head.qkv.weight
        self.keys = weight.new_zeros(rows, 0, head.n_heads, head.head_size)  # zeros: what no row may see must still be finite
        self.values = self.keys.clone()
        self.angles = head.angles(torch.arange(0, device=weight.device))
        self.head = head

    def reserve(self, room: int) -> None:
        """Make room for ``room`` slots."""
        if room > self.keys.shape[1]:
            room = max(room, 2 * self.keys.shape[1], 256)
            more = (0, 0, 0, 0, 0, room - self.keys.shape[1])
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
            self.angles = self.head.angles(torch.arange(room, device=self.keys.device))

    def select_rows(self, rows: list[int]) -> None:
        """Keep these rows."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class EagleHead(Heads):
    """EAGLE (Li et al. 2024, https://arxiv.org/abs/2401.15077): one decoder layer that continues the last hidden states.

    From the hidden state at a position and the embedding of the token after it, it computes the hidden state at that token.
    LayerNorm, which torch runs as one operation where RMSNorm takes several: on a CPU, operations are what a step costs.

    Args:
        hidden_size, embedding_size: D and E.
        n_heads: attention heads; default one for every 64 dimensions.
        intermediate_size: of the gated MLP; default 8/3 D, rounded up to a multiple of 32.
    """

    kind = "eagle"

    def __init__(self, hidden_size: int, embedding_size: int, n_heads: int | None = None, intermediate_size: int | None = None):
        n_heads = n_heads or next(n for n in range(max(1, hidden_size // 64), 0, -1) if hidden_size % (2 * n) == 0)
        intermediate_size = intermediate_size or -(-8 * hidden_size // 96) * 32
        super().__init__({
            "hidden_size": hidden_size, "embedding_size": embedding_size, "n_heads": n_heads, "intermediate_size": intermediate_size
        })  # fmt: skip
        self.n_heads, self.head_size = n_heads, hidden_size // n_heads
        self.norm_embedding = nn.LayerNorm(embedding_size)
        self.norm_feature = nn.LayerNorm(hidden_size)
        self.joined = nn.Linear(embedding_size + hidden_size, hidden_size, bias=False)
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attended = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.norm_out = nn.LayerNorm(hidden_size)
        nn.init.zeros_(self.attended.weight)
        nn.init.zeros_(self.down.weight)

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """[..., 1, d/2] complex64: by how much positions turn queries and keys."""
        frequencies = _ROPE_BASE ** -(torch.arange(0, self.head_size, 2, device=positions.device) / self.head_size)
        angle = (positions[..., None, None] * frequencies).float()
        return torch.polar(torch.ones_like(angle), angle)

    def enter(self, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Next tokens' embeddings [R, T, E] and hidden states [R, T, D] as the layer's input [R, T, D]."""
        return self.joined(torch.cat((self.norm_embedding(embedded), self.norm_feature(features)), -1))

    def project(self, x: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys, turned, and values of the layer's input, each [R, T, H, d]."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3 * self.n_heads, self.head_size))
        queries_keys, values = qkv.split((2 * self.n_heads, self.n_heads), -2)
        turned = torch.view_as_complex(queries_keys.float().unflatten(-1, (-1, 2))) * angles
        queries, keys = torch.view_as_real(turned).flatten(-2).to(x.dtype).chunk(2, -2)
        return queries, keys, values

    def leave(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's input and the heads' outputs [R, T, H, d] as the next hidden states [R, T, D]."""
        x = x + self.attended(attended.flatten(-2))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, -1)
        return self.norm_out(x + self.down(F.silu(gate) * up))

    def forward(self, embedded: torch.Tensor, features: torch.Tensor, memory: KeyValues, slots: slice | torch.Tensor) -> torch.Tensor:
        """The next hidden states [R, T, D].

        Args:
            embedded: [R, T, E], the embedding of the token after each position.
            features: [R, T, D], the hidden state at each position.
            memory: room for every slot; it is written at ``slots``.
            slots: of the T positions: a slice if R = 1, else [R, T] int64. A position sees the slots up to its own.
        """
        x = self.enter(embedded, features)
        queries, keys, values = self.project(x, memory.angles[slots])
        rows, steps = x.shape[:2]
        if isinstance(slots, slice):
            at: Any = (slice(None), slots)
            seen = slots.stop
            mask = None if steps == 1 else torch.arange(seen, device=x.device) <= torch.arange(slots.start, seen, device=x.device)[:, None]
        else:
            at = (torch.arange(rows, device=x.device)[:, None], slots)
            seen = int(slots.max()) + 1
            mask = (torch.arange(seen, device=x.device) <= slots[..., None])[:, None]
        memory.keys[at], memory.values[at] = keys, values
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            memory.keys[:, :seen].transpose(1, 2),
            memory.values[:, :seen].transpose(1, 2),
            attn_mask=mask,
        )
        return self.leave(x, attended.transpose(1, 2))

    def unrolled(self, embedded: torch.Tensor, features: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """What the head computes in drafts of 1 ... ``steps`` tokens that end at each position, for training.

        As EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840) does: the head is shown its own outputs of up to ``steps - 1``
        positions, in features and in keys and values, as it will see them when it drafts.

        Args:
            embedded, features: [R, T, E] and [R, T, D], as for `forward`, of a whole text.

        Returns:
            ``steps`` tensors [R, T, D]; the first ``j`` positions of the one of index ``j`` mean nothing.
        """
        length = features.shape[1]
        positions = torch.arange(length, device=features.device)
        angles = self.angles(positions)
        outputs: list[torch.Tensor] = []
        drafted: list[tuple[torch.Tensor, torch.Tensor]] = []
        for j in range(steps):
            x = self.enter(embedded, features)
            queries, keys, values = self.project(x, angles)
            if j == 0:
                true_keys, true_values = keys, values
                attended = F.scaled_dot_product_attention(
                    queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True
                )
                outputs.append(self.leave(x, attended.transpose(1, 2)))
                features = outputs[-1].roll(1, 1)
                continue
            drafted.append((keys, values))
            # A draft that ends here began j positions earlier: up to there it saw true features, from there on its own.
            scores = torch.einsum("rqhd,rkhd->rhqk", queries, true_keys)
            scores = scores.masked_fill(positions > (positions[:, None] - j).clamp(min=0), float("-inf"))
            own = [(queries * k.roll(j - i, 1)).sum(-1).transpose(1, 2)[..., None] for i, (k, _) in enumerate(drafted, 1)]
            weights = (torch.cat([scores, *own], -1) * self.head_size**-0.5).softmax(-1)
            attended = torch.einsum("rhqk,rkhd->rqhd", weights[..., :length], true_values)
            for i, (_, v) in enumerate(drafted, 1):
                attended = attended + weights[..., length + i - 1].transpose(1, 2)[..., None] * v.roll(j - i, 1)
            outputs.append(self.leave(x, attended))
            features = outputs[-1].roll(1, 1)
        return outputs


_KINDS: dict[str, type[Heads]] = {cls.kind: cls for cls in (MedusaHeads, EagleHead)}


def load_heads(path: str | Path, kind: str | None = None, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Heads from a file that `Heads.save` wrote, frozen and in evaluation mode.

    Args:
        path: the file, or "bundled" for the ones of ``kind`` that ship for stdlib-7m.
        kind: "medusa" or "eagle", if only that will do.

    Raises:
        PatchError: no such file, not a file of heads, or heads of another kind.
    """
    if str(path) == "bundled":
        from patchkit.models import bundled_path

        path = bundled_path() / f"{kind}_heads.safetensors"
    path = Path(path).expanduser()
    if not path.is_file():
        raise PatchError(f"there is no file of draft heads at {path}: train them with patchkit train-heads, or give 'bundled'")
    return _loaded(path, path.stat().st_mtime_ns, kind, torch.device(device), dtype)


@functools.lru_cache(maxsize=4)
def _loaded(path: Path, modified: int, kind: str | None, device: torch.device, dtype: torch.dtype) -> Heads:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise PatchError(f"{path} cannot be read as safetensors ({error}): train the heads again") from error
    if metadata.get("format") != _FORMAT:
        raise PatchError(f"{path} holds no draft heads of patchkit: give a file that patchkit train-heads wrote")
    if kind is not None and metadata["kind"] != kind:
        raise PatchError(f"{path} holds {metadata['kind']} heads, not {kind} heads: give them to the drafter of that name")
    heads = _KINDS[metadata["kind"]](**json.loads(metadata["options"]))
    heads.load_state_dict(tensors)
    heads.trained_for = TrainedFor(**json.loads(metadata["trained_for"]))
    return heads.to(device, dtype).eval().requires_grad_(False)


_Heads = TypeVar("_Heads", bound=Heads)


def heads_for(model: Any, heads: str | Path | Heads, cls: type[_Heads]) -> _Heads:
    """Heads of one kind, from a file or as they are, on the device and in the precision of the model's LM head.

    Raises:
        PatchError: see `load_heads`; heads of another kind.
    """
    weight = model.get_output_embeddings().weight
    if isinstance(heads, str | Path):
        heads = load_heads(heads, cls.kind, weight.device, weight.dtype)
    if not isinstance(heads, cls):
        raise PatchError(f"these are {getattr(heads, 'kind', type(heads).__name__)} heads, not {cls.kind} heads: give a {cls.__name__}")
    first = next(heads.parameters())
    if (first.device, first.dtype) != (weight.device, weight.dtype):
        heads = copy.deepcopy(heads).to(weight.device, weight.dtype)
    return heads
