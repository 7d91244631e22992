"""Data loading as it was before workers sent bytes, the baseline of experiments.benchmark: do not change it.

Every tensor is made by a worker, pair by pair, in fp32, and every file is decoded in every epoch.
"""

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import transforms
from audio_io import HOP, LOG_FLOOR, LOG_SCALE, N_BINS, N_FFT, WINDOW, load_audio, num_frames, num_samples
from dataset import Sample, TrainingPairs


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32."""
    planes = np.empty((3, *pixels.shape[:2]), np.float32)
    statistics = transforms.IMAGENET_MEAN, transforms.IMAGENET_STD
    for plane, channel, mean, std in zip(planes, cv2.split(pixels), *statistics, strict=True):
        cv2.addWeighted(channel, 1 / (255 * std), channel, 0, -mean / std, dst=plane, dtype=cv2.CV_32F)
    return torch.from_numpy(planes)


def random_crop(image: Image.Image, size: int, short_side: int) -> np.ndarray:
    """RGB PIL image -> (size, size, 3) uint8."""
    scale = min(image.size) / short_side
    side, (width, height) = round(scale * size), image.size
    places = [short_side * length // min(image.size) - size + 1 for length in (height, width)]
    top, left = (round(scale * int(torch.randint(count, ()))) for count in places)
    top, left = min(top, height - side), min(left, width - side)
    part = bytearray(image.crop((left, top, left + side, top + side)).tobytes("raw", "RGBX"))
    part = torch.frombuffer(part, dtype=torch.uint8).view(side, side, 4).permute(2, 0, 1)
    resized = v2.functional.resize(part, [size, size], InterpolationMode.BICUBIC).permute(1, 2, 0).numpy()
    return cv2.cvtColor(resized, cv2.COLOR_RGBA2RGB)


def log_spectrogram(waveform: np.ndarray) -> torch.Tensor:
    """(samples,) in -1..1 -> (1, F, L)."""
    frames = torch.from_numpy(np.pad(waveform, N_FFT // 2, mode="reflect")).unfold(0, N_FFT, HOP)
    spectrum = torch.fft.rfft(frames * WINDOW).numpy()
    power = np.square(spectrum.real)
    power += np.square(spectrum.imag)
    power += LOG_FLOOR
    np.log(power, out=power)
    power /= LOG_SCALE
    return torch.from_numpy(power.T[None])


class Fp32Pairs(TrainingPairs):
    """The items of `TrainingPairs` for augment "hard" or "plain", made in the worker."""

    def raw(self, index: int) -> Sample:
        pair, size = self.pairs[index], self.image_size
        draw = int(np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw)
            position = 0.4 + 0.2 * float(torch.rand(()))
            spectrogram = log_spectrogram(load_audio(pair.audio, num_samples(self.audio_seconds), position))
            if self.augment == "hard":
                bands = transforms.draw_bands(N_BINS, num_frames(self.audio_seconds)).tolist()
                for axis, start, width in ((1, *bands[:2]), (2, *bands[2:])):
                    spectrogram.narrow(axis, start, width).zero_()
            image = transforms.load_image(pair.image, 2 * size)
            pixels = transforms.change(random_crop(image, size, int(size * 1.1)), self.augment == "hard")
        return Sample(normalise(pixels), spectrogram, torch.empty(0), pair.id, "")
