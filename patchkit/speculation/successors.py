"""`Successors`: for every token of the vocabulary, the tokens that are likeliest after it."""

from __future__ import annotations

import torch


class Successors:
    """An adjacency matrix of tokens: rows of ``width`` int32 on the CPU, the likeliest successor first.

    Args:
        width: successors that are kept of each token, at 4 bytes each.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._matrix = torch.zeros(0, width, dtype=torch.int32)  # a row for each token, -1 where there is no successor

    @property
    def n_bytes(self) -> int:
        """Bytes of the matrix."""
        return self._matrix.nbytes

    def after(self, token: int) -> list[int]:
        """Return the known successors of a token, the likeliest first."""
        return [each for each in self._matrix[token].tolist() if each >= 0] if token < len(self._matrix) else []

    def update(self, tokens: torch.Tensor, likeliest: torch.Tensor, vocabulary: int) -> None:
        """Replace the successors of tokens.

        Args:
            tokens: [N] int64; of a token that comes twice the first one counts.
            likeliest: [N, at most width] int64, the new successors of each.
            vocabulary: number of tokens, V.
        """
        self._reserve(vocabulary)
        # numpy writes repeated indices in order, which torch does not promise.
        self._matrix.numpy()[tokens.cpu().numpy()[::-1], : likeliest.shape[1]] = likeliest.cpu().numpy()[::-1]

    def read(self, sequence: list[int]) -> None:
        """Put in front of the successors of each token those that follow it in a sequence, the latest first."""
        if not sequence:
            return
        self._reserve(max(sequence) + 1)
        following: dict[int, dict[int, None]] = {}
        for token, after in zip(sequence[-2::-1], sequence[:0:-1], strict=True):
            following.setdefault(token, {})[after] = None
        for token, found in following.items():
            merged = list(found | dict.fromkeys(self.after(token)))[: self.width]
            self._matrix[token, : len(merged)] = torch.tensor(merged, dtype=torch.int32)

    def _reserve(self, vocabulary: int) -> None:
        if vocabulary > len(self._matrix):
            self._matrix = torch.nn.functional.pad(self._matrix, (0, 0, 0, vocabulary - len(self._matrix)), value=-1)
