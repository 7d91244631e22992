"""The simple reference: max-pooled contrastive learning on the encoders of `model_slot`, without slots and decoders.

The objective of EZ-VSL (Mo and Morgado, "Localizing Visual Sounds the Easy Way", ECCV 2022): an audio clip fits an
image as well as it fits the image's best token. Training and evaluation use it like `JointSlotModel`.
B batch, D channels, h x w image grid, N = h * w image tokens, T audio tokens, F bins, L frames.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from audio_io import num_frames
from model_slot import Compared, Maps, TokenMasks, at_least_fp32, contrast_both_ways
from resnet import build_encoders, default_dim, own_audio_encoder

OBJECTIVE = "maxpool"


class MaxPooled(NamedTuple):
    """What the model computes from pairs, which is also all that the loss over a batch needs of them."""

    image_tokens: torch.Tensor  # (B, N, D) unit length
    audio_vectors: torch.Tensor  # (B, D) unit length


def max_pool_scores(image_tokens: torch.Tensor, audio_vectors: torch.Tensor) -> torch.Tensor:
    """Unit image tokens (B, N, D) and audio vectors (M, D) -> (B, M) in -1..1: max over tokens i of v_ni . a_m."""
    return torch.einsum("nid,md->nmi", image_tokens, audio_vectors).amax(2)


def max_pool_contrast_loss(image_tokens: torch.Tensor, audio_vectors: torch.Tensor, tau: float) -> torch.Tensor:
    """Contrast audio clips with the best tokens of images, both ways over the batch: unit (B, N, D), (B, D) -> scalar.

    With S_nm = max over tokens i of v_ni . a_m: CE(S / tau) + CE(S^T / tau), where the diagonal is right. Source:
    EZ-VSL's multiple-instance contrastive loss.
    """
    return contrast_both_ways(max_pool_scores(image_tokens, audio_vectors) / tau)


class MaxPoolModel(nn.Module):
    """Both encoders and nothing else: 22.87 M parameters at full size.

    The audio vector is the maximum over the T tokens, which completes the encoder's maximum over frequency. (EZ-VSL
    pools before its projection, here it is after it: the encoder is the joint-slot model's.) There is no image query
    and so no IMG_QUERY and no IQR: the map is AUD, v_i . a. Nothing is masked, and false negatives stay in, as in
    EZ-VSL.
    The settings are those of `JointSlotModel`; ValueError where they leave no token.
    """

    primary_map = "AUD"  # the map that the model is judged by

    def __init__(
        self,
        image_encoder: str = "resnet18",
        dim: int | None = None,
        image_size: int = 224,
        audio_seconds: float = 5.0,
        tau: float = 0.03,
        audio_encoder: str | None = None,
        standardise: bool = False,
        token_shift: float = 0.0,
    ) -> None:
        super().__init__()
        dim, self.tau = dim or default_dim(image_encoder), tau
        audio_encoder = audio_encoder or own_audio_encoder(image_encoder)
        self.shape = {
            "image_encoder": image_encoder,
            "audio_encoder": audio_encoder,
            "dim": dim,
            "image_size": image_size,
            "audio_seconds": audio_seconds,
        }
        frames = num_frames(audio_seconds)
        encoders = build_encoders(image_encoder, audio_encoder, dim, image_size, frames, standardise, token_shift)
        self.imgnet, self.audnet, self.infer_image_size = encoders.image, encoders.audio, image_size

    @property
    def config(self) -> dict[str, Any]:
        """Every constructor argument and the objective, as a checkpoint stores them."""
        return {"objective": OBJECTIVE} | self.shape | self.imgnet.config | {"tau": self.tau}

    # ------------------------------------------------------------ training

    def draw_masks(self, batch: int) -> TokenMasks:
        """Empty, (B, 0) each: nothing is hidden, and nothing is drawn."""
        return TokenMasks(*torch.zeros(2, batch, 0, dtype=torch.bool))

    def forward(
        self,
        image: torch.Tensor,
        spectrogram: torch.Tensor,
        masks: TokenMasks | None = None,
        wanted: Collection[str] = ("info_nce",),
        compare: Callable[[Compared], dict[str, torch.Tensor]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss by name, {"info_nce": scalar}; compare: as in `JointSlotModel`. masks and wanted have no effect."""
        return (compare or self.batch_losses)(self.compared(self.represent(image, spectrogram)))

    def represent(self, image: torch.Tensor, spectrogram: torch.Tensor, masks: TokenMasks | None = None) -> MaxPooled:
        """Images (B, 3, H, W), spectrograms (B, 1, F, L) -> their unit vectors, in fp32. masks have no effect."""
        return MaxPooled(self.attend_image(image)[0], self.attend_audio(spectrogram))

    @staticmethod
    def compared(pairs: MaxPooled, wanted: Collection[str] = ("info_nce",)) -> Compared:
        """All of it, by name."""
        return pairs._asdict()

    def batch_losses(self, batch: Compared) -> dict[str, torch.Tensor]:
        """`max_pool_contrast_loss`, under the name that the contrastive loss has in every objective."""
        with torch.autocast(batch["image_tokens"].device.type, enabled=False):
            return {"info_nce": max_pool_contrast_loss(**batch, tau=self.tau)}

    # ------------------------------------------------------------ inference

    def attend_image(self, image: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images (B, 3, H, W) -> unit tokens (B, N, D), and their grid (h, w)."""
        features = self.imgnet(image)
        tokens = at_least_fp32(features.flatten(2).transpose(1, 2))  # (B, N, D)
        return F.normalize(tokens, dim=2), tuple(features.shape[2:])

    def attend_audio(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """Spectrograms (B, 1, F, L) -> unit vectors (B, D)."""
        return F.normalize(at_least_fp32(self.audnet(spectrogram).amax(2)), dim=1)

    @torch.no_grad()
    def localize(self, image: torch.Tensor, spectrogram: torch.Tensor, infer_sharpening: float = 0.1) -> Maps:
        """AUD and AUD_share (B, h, w) in -1..1, and no image map: see `maps`."""
        tokens, grid = self.attend_image(image)
        return self.maps(tokens, self.attend_audio(spectrogram), grid)

    @torch.no_grad()
    def embed(self, image: torch.Tensor, spectrogram: torch.Tensor) -> MaxPooled:
        """Unit tokens of images (B, N, D), of which retrieval takes the best, and unit audio vectors (B, D)."""
        return self.represent(image, spectrogram)

    @staticmethod
    def maps(image: torch.Tensor, audio: torch.Tensor, grid: tuple[int, int], infer_sharpening: float = 0.1) -> Maps:
        """AUD from image tokens (B, N, D) and audio vectors (B, D): their cosine, absolute and so AUD_share, too.

        infer_sharpening has no effect: it would only scale a map that is scored after min-max normalisation.
        """
        cosine = torch.einsum("bid,bd->bi", image, audio).unflatten(1, grid)
        return Maps(cosine, None, cosine)

    @staticmethod
    def confidences(image: torch.Tensor, audio: torch.Tensor, infer_sharpening: float = 0.1) -> dict[str, torch.Tensor]:
        """Confidence that the source is in view, (B,) in -1..1: the score of the pair that training contrasts."""
        return {"confidence": torch.einsum("bid,bd->bi", image, audio).amax(1)}

    @staticmethod
    def embedding(state: torch.Tensor) -> torch.Tensor:
        """What retrieval compares of a modality: the state itself, so that it ranks by the score of training."""
        return state
