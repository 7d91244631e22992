"""Audio that nothing in view causes: silence, noise, and the audio of another pair (Juanola et al., arXiv 2410.01020).

F bins, L frames.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from audio_io import Heard, log_spectrogram, num_samples
from dataset import EvaluationPairs, Pair, Sample, TrainingPairs, finish_one
from scoring.retrieval import Derangement, derangement, disjoint_partners
from utils import UserError, as_user_error


def silence(seconds: float) -> torch.Tensor:
    """(1, F, L) log power spectrogram of digital zeros."""
    return log_spectrogram(np.zeros(num_samples(seconds), np.float32))


def noise(seconds: float, *seed: int) -> torch.Tensor:
    """(1, F, L) log power spectrogram of `noise_waveform`."""
    return log_spectrogram(noise_waveform(seconds, *seed))


def noise_waveform(seconds: float, *seed: int) -> torch.Tensor:
    """(samples,) standard normal, drawn by these numbers alone."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(num_samples(seconds), np.float32))


class WithNegativeAudio(Dataset):
    """Every item of a set, with the spectrograms (1, F, L) of noise and of a pair of another class.

    class_of: {id: class}; where it does not know every pair, the other audio is that of any other id, of another image
    or video where the set says which share one. Where a set knows more, of what an image shows or a sound holds, the
    other audio holds nothing of it. The order of the pairs changes no partner and no noise. UserError for fewer than
    two pairs.
    """

    def __init__(
        self, dataset: EvaluationPairs | TrainingPairs, seed: int = 0, class_of: Mapping[str, str] | None = None
    ) -> None:
        self.dataset, self.seed = dataset, seed
        if len(dataset) < 2:
            raise UserError(f"{len(dataset)} pair has no off-screen audio to be asked with: give two or more")
        classes = {pair.id: (class_of or {}).get(pair.id) for pair in dataset.pairs}
        self.knows_classes = all(classes.values())
        order = np.argsort([pair.id for pair in dataset.pairs])
        with as_user_error(ValueError):
            drawn = self._draw([dataset.pairs[i] for i in order], classes)
        self.partner, self.place = (np.empty(len(dataset), dtype=int) for _ in range(2))
        self.partner[order] = order[drawn.permutation]
        self.place[order] = np.arange(len(dataset))
        self.same_class = drawn.same_label if self.knows_classes else None

    def _draw(self, pairs: Sequence[Pair], classes: Mapping[str, str | None]) -> Derangement:
        truth = getattr(self.dataset, "ground_truth", None)
        if not self.knows_classes:
            units = truth.unit_of if truth else {}
            return derangement([units.get(pair.id, str(pair.audio)) for pair in pairs], self.seed)
        if not (truth and (truth.seen or truth.heard)):
            return derangement([classes[pair.id] for pair in pairs], self.seed)
        heard, seen = (
            [known.get(pair.id, {classes[pair.id]}) for pair in pairs] for known in (truth.heard, truth.seen)
        )
        return disjoint_partners(heard, seen, self.seed)

    @property
    def offscreen(self) -> str:
        """Whose audio the off-screen one is, in words."""
        if not self.knows_classes:
            return "another id (classes are not known)"
        shared = f" ({self.same_class} of the same one, for lack of another)" if self.same_class else ""
        return f"another class{shared}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Sample, torch.Tensor, torch.Tensor]:
        return finish_one(self.raw(index))

    def raw(self, index: int) -> tuple[Sample, tuple[Heard], tuple[Heard]]:
        return self.dataset.raw(index), self.noise(index), self.offscreen_audio(index)

    def noise(self, index: int) -> tuple[Heard]:
        return (Heard(noise_waveform(self.dataset.audio_seconds, self.seed, int(self.place[index]))),)

    def offscreen_audio(self, index: int) -> tuple[Heard]:
        return self.dataset.heard(int(self.partner[index]))
