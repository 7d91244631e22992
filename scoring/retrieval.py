"""Cross-modal retrieval by embeddings, and the pairing of images with wrong audio; knows no model.

N samples, n vectors of a sample, D channels. Scores are fractions of 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TIED_COSINE = 1e-6  # cosine similarities that differ by less are rounding, and count as equal

# ---------------------------------------------------------------- retrieval


def partner_ranks(queries: Tensor, keys: Tensor, targets: Sequence | None = None, chunk: int = 1024) -> Tensor:
    """Rank of the best right key of every query by cosine similarity: (N, D) twice -> (N,) int64, 1 is best.

    Either side may be (N, n, D), a sample's n vectors, of which the most similar one counts. Right is the key of the
    same index or, with `targets` (N labels), any key with the query's label. The rank is 1 + the number of wrong keys
    at least as similar (to 1e-6, in float64): ties rank last, so collapsed embeddings find nothing. Memory is chunk x N
    similarities, whatever n, and both sides in float64: 1 GB for 5,158 images of 49 tokens and 512 channels.
    ValueError where the shapes differ or an embedding is not finite (a NaN would compare as the best).
    """
    count, shapes = len(queries), (tuple(queries.shape), tuple(keys.shape))
    ends = {(shape[0], shape[-1]) for shape in shapes if len(shape) in (2, 3)}
    if len(ends) != 1 or any(len(shape) not in (2, 3) or 0 in shape[1:] for shape in shapes):
        raise ValueError(f"embeddings {shapes[0]} and {shapes[1]} must both be (N, D), or (N, n, D)")
    if not (torch.isfinite(queries).all() and torch.isfinite(keys).all()):
        raise ValueError("an embedding holds a value that is not finite")
    labels = np.arange(count) if targets is None else np.unique(np.asarray(targets), return_inverse=True)[1]
    if len(labels) != count:
        raise ValueError(f"{len(labels)} targets for {count} embeddings")
    labels = torch.as_tensor(labels, device=queries.device)
    queries, keys = (F.normalize(x.double(), dim=-1) for x in (queries, keys))
    queries, keys = (x if x.dim() == 3 else x[:, None] for x in (queries, keys))  # (N, n, D)
    many, n = queries.shape[1], keys.shape[1]
    rows, ranks = max(1, chunk // (many * n)), []
    for start in range(0, count, rows):
        part = queries[start : start + rows]
        products = part.flatten(0, 1) @ keys.flatten(0, 1).T  # (rows * many, N * n)
        similarity = products.view(len(part), many, count, n).amax((1, 3))  # (rows, N)
        right = labels[start : start + rows, None] == labels[None, :]
        best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        ranks.append(1 + (~right & (similarity >= best - TIED_COSINE)).sum(1))
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


class Ranks(NamedTuple):
    """`partner_ranks` both ways, (N,) int64 each."""

    image_to_audio: Tensor
    audio_to_image: Tensor

    def recall(self, ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict[str, float]]:
        """Recall at k in both directions: {"image_to_audio" | "audio_to_image": {"R@1": fraction, ...}}."""
        return {
            direction: {f"R@{k}": (ranks <= k).double().mean().item() for k in ks}
            for direction, ranks in self._asdict().items()
        }

    def scores(self) -> Tensor:
        """(N,) float64, each pair's percentile rank, mean of both directions: 1 best, about 0.5 chance, 0 collapsed."""
        ranks = torch.stack(self).double()
        return (1 - (ranks - 1) / max(ranks.shape[1] - 1, 1)).mean(0)


def ranks_both_ways(image_embeddings: Tensor, audio_embeddings: Tensor, targets: Sequence | None = None) -> Ranks:
    """image_embeddings, audio_embeddings (N, D), or (N, n, D) of which the best counts; by pair, or by class with
    `targets`, N labels. Ties rank last: `partner_ranks`.
    """
    pairs = (image_embeddings, audio_embeddings), (audio_embeddings, image_embeddings)
    return Ranks(*(partner_ranks(queries, keys, targets) for queries, keys in pairs))


def retrieval_recall(
    image_embeddings: Tensor, audio_embeddings: Tensor, targets: Sequence | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, float]]:
    """`Ranks.recall` of `ranks_both_ways`."""
    return ranks_both_ways(image_embeddings, audio_embeddings, targets).recall(ks)


def retrieval_score(image_embeddings: Tensor, audio_embeddings: Tensor) -> float:
    """Mean of `Ranks.scores` by pair. It needs no boxes, so a checkpoint can be chosen by it without a test set."""
    return ranks_both_ways(image_embeddings, audio_embeddings).scores().mean().item()


def within_one_error(scores: Tensor, of_best: Tensor) -> bool:
    """Whether scores (N,) of the same pairs as `of_best` (N,) are on average less than one standard error below it.

    The error is that of the mean of their N differences, so what both find hard or easy alike does not count.
    """
    difference = scores.double() - of_best.double()
    error = difference.std().item() / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return difference.mean().item() >= -error


# ---------------------------------------------------------------- wrong audio


class Derangement(NamedTuple):
    """permutation (N,) int64: sample i gets the audio of permutation[i]; same_label: pairs that share a label."""

    permutation: np.ndarray
    same_label: int


def derangement(labels: Sequence, seed: int) -> Derangement:
    """Pair every sample with one of another label (class name, or id where classes are unknown), reproducibly.

    A random permutation, whose clashes are swapped with random samples that fit. Where one label holds more than half
    of the samples some pairs must share it: as few as possible, and no sample is its own partner. ValueError for fewer
    than 2.
    """
    labels = np.unique(np.asarray(labels), return_inverse=True)[1]
    count = len(labels)
    if count < 2:
        raise ValueError("a derangement needs at least two samples")
    rng = np.random.default_rng(seed)
    permutation = rng.permutation(count)

    def swap(i: int, allowed: np.ndarray) -> None:
        j = rng.choice(np.flatnonzero(allowed))
        permutation[[i, j]] = permutation[[j, i]]

    for i in np.flatnonzero(labels[permutation] == labels):
        fits = (labels != labels[i]) & (labels[permutation] != labels[i])
        if labels[permutation[i]] == labels[i] and fits.any():
            swap(i, fits)
    for i in np.flatnonzero(permutation == np.arange(count)):
        if permutation[i] == i:  # an earlier swap may have moved it
            swap(i, (labels == labels[i]) & (np.arange(count) != i))
    return Derangement(permutation, int((labels[permutation] == labels).sum()))
