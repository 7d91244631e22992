"""Cross-modal retrieval by embeddings, and the pairing of images with wrong audio; knows no model.

N samples, n vectors of a sample, D channels. Scores are fractions of 1.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

TIED_COSINE = 1e-6  # cosine similarities that differ by less are rounding, and count as equal

# ---------------------------------------------------------------- retrieval


def partner_ranks(queries: Tensor, keys: Tensor, targets: Sequence | None = None, chunk: int = 1024) -> Tensor:
    """Rank of the best right key of every query by cosine similarity: (N, D) twice -> (N,) int64, 1 is best.

    Either side may be (N, n, D), a sample's n vectors, of which the most similar one counts. Right is the key of the
    same index or, with `targets`, any key with the query's label (N labels), or where they say so (N, N) bool. The rank
    is 1 + the number of wrong keys at least as similar (to 1e-6, in float64): ties rank last, so collapsed embeddings
    find nothing. Memory is chunk x N similarities, whatever n, and both sides in float64: 1 GB for 5,158 images of 49
    tokens and 512 channels. ValueError where the shapes differ or an embedding is not finite (a NaN would compare as
    the best).
    """
    count, shapes = len(queries), (tuple(queries.shape), tuple(keys.shape))
    ends = {(shape[0], shape[-1]) for shape in shapes if len(shape) in (2, 3)}
    if len(ends) != 1 or any(len(shape) not in (2, 3) or 0 in shape[1:] for shape in shapes):
        raise ValueError(f"embeddings {shapes[0]} and {shapes[1]} must both be (N, D), or (N, n, D)")
    if not (torch.isfinite(queries).all() and torch.isfinite(keys).all()):
        raise ValueError("an embedding holds a value that is not finite")
    labels = np.arange(count) if targets is None else np.asarray(targets)
    if len(labels) != count:
        raise ValueError(f"{len(labels)} targets for {count} embeddings")
    listed = labels.ndim == 1
    labels = torch.as_tensor(np.unique(labels, return_inverse=True)[1] if listed else labels, device=queries.device)
    queries, keys = (F.normalize(x.double(), dim=-1) for x in (queries, keys))
    queries, keys = (x if x.dim() == 3 else x[:, None] for x in (queries, keys))  # (N, n, D)
    many, n = queries.shape[1], keys.shape[1]
    rows, ranks = max(1, chunk // (many * n)), []
    for start in range(0, count, rows):
        part = queries[start : start + rows]
        products = part.flatten(0, 1) @ keys.flatten(0, 1).T  # (rows * many, N * n)
        similarity = products.view(len(part), many, count, n).amax((1, 3))  # (rows, N)
        right = labels[start : start + rows]
        right = right[:, None] == labels[None, :] if listed else right
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
    `targets`, N labels or (N, N) bool, images by audio clips. Ties rank last: `partner_ranks`.
    """
    back = targets.T if isinstance(targets, np.ndarray) and targets.ndim == 2 else targets
    forth = partner_ranks(image_embeddings, audio_embeddings, targets)
    return Ranks(forth, partner_ranks(audio_embeddings, image_embeddings, back))


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


def disjoint_partners(heard: Sequence[Collection[str]], known: Sequence[Collection[str]], seed: int) -> Derangement:
    """Pair every sample with the audio of one that holds nothing which the sample is known for, reproducibly.

    heard: labels in each sample's audio; known: labels in its image and its audio. A random permutation in which
    clashes are swapped with random samples that fit, as far as there are any; no sample is its own partner. same_label
    counts the clashes that stay. ValueError for fewer than 2.
    """
    count = len(heard)
    if count < 2:
        raise ValueError("a derangement needs at least two samples")
    sounds, views = _incidence(heard, [{*seen, *sound} for seen, sound in zip(known, heard, strict=True)])
    rng = np.random.default_rng(seed)
    permutation = rng.permutation(count)

    def clashes() -> np.ndarray:
        return np.asarray(sounds[permutation].multiply(views).sum(1)).ravel() > 0

    for i in np.flatnonzero(clashes()):
        partner, own = sounds[[permutation[i]]], views[[i]]
        if not partner.multiply(own).sum():  # an earlier swap has helped
            continue
        fits = (sounds[permutation] @ own.T).toarray().ravel() == 0  # whose partner i may have
        fits &= (views @ partner.T).toarray().ravel() == 0  # who may have the partner of i
        if fits.any():
            j = rng.choice(np.flatnonzero(fits))
            permutation[[i, j]] = permutation[[j, i]]
    for i in np.flatnonzero(permutation == np.arange(count)):
        if permutation[i] == i:
            j = rng.choice(np.flatnonzero(np.arange(count) != i))
            permutation[[i, j]] = permutation[[j, i]]
    return Derangement(permutation, int(clashes().sum()))


def shared_labels(seen: Sequence[Collection[str]], heard: Sequence[Collection[str]]) -> np.ndarray:
    """(N, N) bool, images by audio clips: True on the diagonal and where the image shows what the clip sounds like."""
    views, sounds = _incidence(seen, heard)
    return ((views @ sounds.T).toarray() > 0) | np.eye(len(seen), dtype=bool)


def _incidence(*sides: Sequence[Collection[str]]) -> list[csr_array]:
    """Sets of labels, N for each side -> matrices (N, labels) of 0 and 1 with the same columns."""
    names = {label: i for i, label in enumerate(sorted({label for side in sides for own in side for label in own}))}
    matrices = []
    for side in sides:
        rows = [i for i, own in enumerate(side) for _ in own]
        columns = [names[label] for own in side for label in own]
        matrices.append(csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(side), len(names))))
    return matrices
