"""Audio that nothing in view causes: silence, noise, and the audio of another pair (Juanola et al., arXiv 2410.01020).

F bins, L frames.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import Dataset

from audio_io import Heard, log_spectrogram, num_samples
from dataset import EvaluationPairs, Sample, TrainingPairs, finish_one
from scoring.retrieval import derangement
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

    class_of: {id: class}; where it does not know every pair, the other audio is that of any other id.
    The order of the pairs changes no partner and no noise. UserError for fewer than two pairs.
    """

    def __init__(
        self, dataset: EvaluationPairs | TrainingPairs, seed: int = 0, class_of: Mapping[str, str] | None = None
    ) -> None:
        self.dataset, self.seed = dataset, seed
        if len(dataset) < 2:
            raise UserError(f"{len(dataset)} pair has no off-screen audio to be asked with: give two or more")
        classes = [(class_of or {}).get(pair.id) for pair in dataset.pairs]
        self.knows_classes = all(classes)
        labels = classes if self.knows_classes else [pair.audio for pair in dataset.pairs]
        order = np.argsort([pair.id for pair in dataset.pairs])
        with as_user_error(ValueError):
            drawn = derangement([labels[i] for i in order], seed)
        self.partner, self.place = (np.empty(len(dataset), dtype=int) for _ in range(2))
        self.partner[order] = order[drawn.permutation]
        self.place[order] = np.arange(len(dataset))
        self.same_class = drawn.same_label if self.knows_classes else None

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
        drawn = noise_waveform(self.dataset.audio_seconds, self.seed, int(self.place[index]))
        return self.dataset.raw(index), (Heard(drawn),), self.dataset.heard(int(self.partner[index]))
