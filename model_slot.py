"""Joint slot attention on image and audio (Kim et al., CVPR 2025): the whole model and its losses.

B batch, K slots, D channels, h x w image grid, N = h * w image tokens, T audio tokens, F bins, L frames.
Slot TARGET holds what is seen and heard, slot OFF_TARGET the rest. Weight names are those of the released checkpoints.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from audio_io import num_frames
from resnet import build_encoders, default_dim, own_audio_encoder

TARGET, OFF_TARGET = 0, 1
ATTENTION_FLOOR = 1e-8
PAPER_LOSSES = ("info_nce", "reconstruction", "slot_divergence", "attention_matching")
MAP_LOSSES = {"share_contrast", "foreign_claims"}  # ours; they compare shares of all images over the batch
BEST_SHARE = 0.1  # of an image's tokens, those that fit the audio best: 5 of 49


Compared = dict[str, torch.Tensor]  # what the losses that compare pairs need of each pair, by name


class SlotState(NamedTuple):
    """What slot attention computes from one modality."""

    slots: torch.Tensor  # (B, K, D) after the last iteration, not normalised
    query: torch.Tensor  # (B, K, D) of the last iteration, before its GRU step
    keys: torch.Tensor  # (B, N or T, D)


class Maps(NamedTuple):
    audio_map: torch.Tensor  # (B, h, w) AUD: audio query over image keys
    image_map: torch.Tensor | None  # (B, h, w) IMG_QUERY: image query over image keys; None where a model has none
    share: torch.Tensor  # (B, h, w) AUD_share: what the audio claims of each token, an absolute map that may stay dark


class Embeddings(NamedTuple):
    image_slots: torch.Tensor  # (B, K, D), not normalised
    audio_slots: torch.Tensor  # (B, K, D), not normalised


class TokenMasks(NamedTuple):
    """Which tokens training hides; True is hidden."""

    image: torch.Tensor  # (B, N) bool
    audio: torch.Tensor  # (B, T) bool


class Represented(NamedTuple):
    """What the model computes from pairs; all losses are functions of it."""

    image: SlotState
    audio: SlotState
    image_tokens: torch.Tensor  # (B, N, D) of the encoder, before masking
    audio_tokens: torch.Tensor  # (B, T, D) of the encoder, before masking
    silence: SlotState | None = None  # of silence or noise, where training wants it


# ---------------------------------------------------------------- joint slot attention


def slot_attention(query: torch.Tensor, keys: torch.Tensor, sharpening: float = 1.0) -> torch.Tensor:
    """Queries (B, K, D) over keys (B, N, D) -> (B, K, N): `slot_share` plus 1e-8, then each row sums to 1."""
    share = slot_share(query, keys, sharpening) + ATTENTION_FLOOR
    return share / share.sum(dim=2, keepdim=True)


def slot_share(query: torch.Tensor, keys: torch.Tensor, sharpening: float = 1.0) -> torch.Tensor:
    """Queries (B, K, D) over keys (B, N, D) -> (B, K, N): softmax over slots, each slot's share of every token.

    sharpening multiplies the logits (below 1 it flattens). Always computed in fp32, as 1e-8 is 0 in fp16.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, keys = at_least_fp32(query), at_least_fp32(keys)
        logits = query @ keys.transpose(1, 2) / query.shape[-1] ** 0.5  # (B, K, N)
        return (logits * sharpening).softmax(dim=1)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32; a float64 one is returned unchanged."""
    return x if x.dtype == torch.float64 else x.float()


class JointSlotAttention(nn.Module):
    """Slot attention of both modalities from the same initial slots (paper, section 3.2).

    Both modalities m in {img, aud} share `slots` and the algorithm, but have layers of their own. These carry the
    released names `{m}_to_q` and so on, hence the look-up by name.
    """

    def __init__(self, dim: int, num_slots: int, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.slots = nn.Parameter(torch.randn(1, num_slots, dim))
        self.mask_token_img = nn.Parameter(torch.randn(1, 1, dim))
        self.mask_token_aud = nn.Parameter(torch.randn(1, 1, dim))
        for modality in ("img", "aud"):
            layers = {
                "norm_input": nn.LayerNorm(dim),
                "norm_slots": nn.LayerNorm(dim),
                "norm_pre_ff": nn.LayerNorm(dim),
                "to_q": nn.Linear(dim, dim),
                "to_k": nn.Linear(dim, dim),
                "to_v": nn.Linear(dim, dim),
                "gru": nn.GRUCell(dim, dim),
                "mlp": nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(inplace=True), nn.Linear(2 * dim, dim)),
            }
            for name, layer in layers.items():
                self.add_module(f"{modality}_{name}", layer)

    def mask_tokens(self, modality: str, tokens: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D), with the modality's mask token wherever `masked` (B, N) is True."""
        return torch.where(masked[..., None], getattr(self, f"mask_token_{modality}").to(tokens.dtype), tokens)

    def forward(self, modality: str, tokens: torch.Tensor, trace: list[torch.Tensor] | None = None) -> SlotState:
        """modality "img" or "aud", tokens (B, N, D) -> SlotState, in fp32 (it costs a few percent of a step).

        trace: a list that receives the intra attention of every iteration, (B, K, N) each, the last one last.
        """
        norm_input, norm_slots, norm_pre_ff, to_q, to_k, to_v, gru, mlp = (
            getattr(self, f"{modality}_{name}")
            for name in ("norm_input", "norm_slots", "norm_pre_ff", "to_q", "to_k", "to_v", "gru", "mlp")
        )
        with torch.autocast(tokens.device.type, enabled=False):
            x = norm_input(at_least_fp32(tokens))
            keys, values = to_k(x), to_v(x)  # (B, N, D)
            slots = self.slots.expand(x.shape[0], -1, -1)  # (B, K, D); len(x) would fix B in torch.export
            for _ in range(self.iterations):
                query = to_q(norm_slots(slots))  # (B, K, D)
                attention = slot_attention(query, keys)  # (B, K, N)
                if trace is not None:
                    trace.append(attention)
                update = attention @ values  # (B, K, D)
                slots = gru(update.flatten(0, 1), slots.flatten(0, 1)).view_as(update)
                slots = slots + mlp(norm_pre_ff(slots))
        return SlotState(slots, query, keys)


# ---------------------------------------------------------------- decoders


class PositionEmbedding(nn.Module):
    """Learned (h, w, D): the first half of the channels by column, the second by row."""

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(height, dim // 2)
        self.col_embed = nn.Embedding(width, dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self) -> torch.Tensor:
        rows, columns = self.row_embed.weight, self.col_embed.weight
        h, w = len(rows), len(columns)
        return torch.cat([columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)], dim=-1)  # (h, w, D)


class MlpDecoder(nn.Module):
    """Spatial-broadcast decoder: slots (B, K, D) -> tokens (B, h * w, D), each slot's part weighted by its alpha."""

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.pos_emb = PositionEmbedding(height, width, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim),
            nn.ReLU(inplace=True),
            nn.Linear(dim, dim),
            nn.ReLU(inplace=True),
            nn.Linear(dim, dim),
            nn.ReLU(inplace=True),
            nn.Linear(dim, dim + 1),
        )

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        first, rest = self.mlp[0], self.mlp[1:]  # the first layer of a sum, slot + position, is that of both summed
        at_position = F.linear(self.pos_emb().flatten(0, 1), first.weight)  # (h * w, D)
        decoded = rest(first(slots)[:, :, None] + at_position)  # (B, K, h * w, D + 1)
        features, alpha = decoded[..., :-1], decoded[..., -1:].softmax(dim=1)
        return (features * alpha).sum(dim=1)


# ---------------------------------------------------------------- losses (all in fp32)


def false_negative_keep_mask(image_target: torch.Tensor, audio_target: torch.Tensor, k: int) -> torch.Tensor:
    """Unit target slots (B, D) of both modalities -> (B, B) bool, False where a pair is a k-reciprocal false negative.

    m is a shared neighbour of n when it is among the k most similar samples of n in both modalities (n counts among
    them); m and n are false negatives of each other when that holds both ways and m != n (paper, section 3.4).
    """
    shared = _nearest(image_target, k) & _nearest(audio_target, k)
    false_negative = shared & shared.T
    return ~false_negative | torch.eye(len(shared), dtype=torch.bool, device=shared.device)


def _nearest(target: torch.Tensor, k: int) -> torch.Tensor:
    """(B, D) unit vectors -> (B, B) bool, True at [n, m] where m is among the k most similar of n."""
    similarity = target @ target.T
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, similarity.topk(k, dim=1).indices, True)


def info_nce_loss(
    image_target: torch.Tensor, audio_target: torch.Tensor, tau: float, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Contrast unit target slots (B, D) both ways over the batch; pairs where `keep` (B, B) is False are left out."""
    return contrast_both_ways(image_target @ audio_target.T / tau, keep)


def info_nce_chance(keep: torch.Tensor) -> torch.Tensor:
    """`info_nce_loss` where all pairs are alike, with the negatives that `keep` (B, B) leaves; itself no loss."""
    return keep.sum(0).float().log().mean() + keep.sum(1).float().log().mean()


def contrast_both_ways(logits: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Scores (B, B), images by audio clips -> cross entropy of each image's own audio plus that of each clip's image.

    Pairs where `keep` (B, B) is False are left out.
    """
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    labels = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)


def slot_divergence_loss(slots: torch.Tensor) -> torch.Tensor:
    """Unit slots (B, K, D) -> mean over samples and ordered pairs i != j of relu(cos(s_i, s_j)); 0 for one slot."""
    num_slots = slots.shape[1]
    if num_slots == 1:
        return slots.new_zeros(())
    cosine = slots @ slots.transpose(1, 2)  # (B, K, K)
    itself = torch.eye(num_slots, dtype=torch.bool, device=slots.device)
    return cosine.masked_fill(itself, 0).relu().sum() / (len(slots) * num_slots * (num_slots - 1))


def attention_matching_loss(image: SlotState, audio: SlotState) -> torch.Tensor:
    """Pulls the target slot's cross attention to its detached intra attention, over image and over audio keys."""
    losses = []
    for own, other in ((image, audio), (audio, image)):
        intra = slot_attention(own.query, own.keys)[:, TARGET].detach()
        cross = slot_attention(other.query, own.keys)[:, TARGET]
        losses.append(F.mse_loss(cross, intra))
    return losses[0] + losses[1]


def _mean_of_best(values: torch.Tensor) -> torch.Tensor:
    """(..., N) -> (...): mean over the tenth of the tokens where the value is largest."""
    return values.topk(max(1, round(BEST_SHARE * values.shape[-1])), dim=-1).values.mean(-1)


def shares_of_others(audio_query: torch.Tensor, image_keys: torch.Tensor) -> torch.Tensor:
    """`slot_share` of every slot of every audio clip in every image: (M, K, D), (B, N, D) -> (M, K, B, N)."""
    logits = torch.einsum("mkd,nid->mkni", audio_query, image_keys) / image_keys.shape[2] ** 0.5
    return logits.softmax(dim=1)


def share_contrast_loss(shares: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Contrast how much of each image each audio clip claims, both ways: `shares_of_others` of a batch, (B, K, B, N).

    With S_nm the mean over tokens of the target slot's share, plus 1e-8, of audio clip m in image n:
    -mean log(S_nn / sum_m S_nm) - mean log(S_nn / sum_m S_mn); pairs where `keep` (B, B) is False are left out. It
    rewards claiming every token of the sounding object, and penalises any token that other images show as well:
    background, and objects that are silent here. Claiming everything except what cannot be the source also lowers the
    loss, though less, and training may get stuck there: `foreign_claim_loss` penalises it.
    """
    claimed = shares[:, TARGET].mean(2) + ATTENTION_FLOOR  # (B, B), audio clips by images
    return contrast_both_ways(claimed.log().T, keep)


def foreign_claim_loss(shares: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Penalise what audio clips claim of other images: `shares_of_others`, (B, K, B, N).

    Mean of -log F_nm over all m != n except where `keep` (B, B), symmetric, is False. F_nm is the mean over tokens of
    the share that audio clip m leaves to its other slots in image n.
    """
    return _mean_of_foreign(-_free(shares).log(), keep)


def _free(shares: torch.Tensor) -> torch.Tensor:
    """(M, K, ..., N) -> (M, ...): mean over tokens of what the target slot leaves; 1 - share would round to 0."""
    return shares[:, OFF_TARGET:].sum(1).mean(-1).clamp(min=torch.finfo(shares.dtype).tiny)


def _mean_of_foreign(values: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """(B, B), audio clips by images -> mean off the diagonal where `keep` is True; 0 if there is nothing to average."""
    counted = ~torch.eye(len(values), dtype=torch.bool, device=values.device)
    counted = counted if keep is None else counted & keep
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def silence_loss(silence_query: torch.Tensor, image_keys: torch.Tensor) -> torch.Tensor:
    """Penalise what silence and noise claim: queries (B, K, D) of such audio, each over one image's keys (B, N, D).

    -mean log F, with F as in `foreign_claim_loss`.
    """
    return -_free(slot_share(silence_query, image_keys)).log().mean()


def reconstruction_loss(decoded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """MSE of decoded tokens and the encoder's, (B, N, D) both; no gradient reaches the encoder through the target."""
    return F.mse_loss(at_least_fp32(decoded), at_least_fp32(tokens.detach()))


def default_reciprocal_k(batch_size: int) -> int:
    """k = 20 at batch 256, in proportion for other batches."""
    return max(1, round(20 * batch_size / 256))


# ---------------------------------------------------------------- inference


def map_confidence(image: SlotState, audio: SlotState, infer_sharpening: float = 0.1) -> torch.Tensor:
    """Confidence, by AUD, that the source is in view: (B,) in 0..1, mean of the top quarter of the target slot's share.

    The share is that of the audio query over the image keys, before it is summed over tokens.
    """
    share = slot_share(audio.query, image.keys, infer_sharpening)[:, TARGET]  # (B, N)
    return share.topk(max(1, share.shape[1] // 4), dim=1).values.mean(1)


def presence_confidence(image: SlotState, audio: SlotState) -> torch.Tensor:
    """Confidence that the source is in view: (B,) in 0..1, the mean of the top tenth of the target slot's share.

    The share is that of the audio query over the image keys, unsharpened; the top tenth, because a source may be small.
    """
    share = slot_share(audio.query, image.keys)[:, TARGET]  # (B, N)
    return _mean_of_best(share)


# ---------------------------------------------------------------- the model


class JointSlotModel(nn.Module):
    """Encoders, joint slot attention, decoders. Full size: 31.82 M parameters, 22.87 M without slots and decoders.

    image_encoder, audio_encoder: names of resnet.py (audio None: the same); dim: D, even (None: the encoder's own);
    image_size (px) and audio_seconds set the decoders' grids; mask_ratio and reciprocal_k act on training only.
    reciprocal_k: None scales 20 per 256 with the batch, 0 turns the false-negative rule off. standardise, token_shift:
    of the image encoder.
    """

    primary_map = "IQR"  # the map that the model is judged by

    def __init__(
        self,
        image_encoder: str = "resnet18",
        dim: int | None = None,
        num_slots: int = 2,
        iterations: int = 5,
        image_size: int = 224,
        audio_seconds: float = 5.0,
        tau: float = 0.03,
        mask_ratio: float = 0.1,
        reciprocal_k: int | None = None,
        audio_encoder: str | None = None,
        standardise: bool = False,
        token_shift: float = 0.0,
    ) -> None:
        super().__init__()
        dim, audio_encoder = dim or default_dim(image_encoder), audio_encoder or own_audio_encoder(image_encoder)
        if dim % 2:
            raise ValueError(f"dim {dim} must be even: half of it encodes columns, half rows")
        self.tau, self.mask_ratio, self.reciprocal_k = tau, mask_ratio, reciprocal_k
        self.shape = {  # what builds the same network again
            "image_encoder": image_encoder,
            "audio_encoder": audio_encoder,
            "dim": dim,
            "num_slots": num_slots,
            "iterations": iterations,
            "image_size": image_size,
            "audio_seconds": audio_seconds,
        }
        frames = num_frames(audio_seconds)
        encoders = build_encoders(image_encoder, audio_encoder, dim, image_size, frames, standardise, token_shift)
        self.imgnet, self.audnet, side, steps = encoders
        self.slot_attn = JointSlotAttention(dim, num_slots, iterations)
        self.infer_image_size = image_size  # in tests; decoders, which have no part in maps, know that of training only
        self.tokens = side * side, steps  # N, T
        self.img_decoder = MlpDecoder(side, side, dim)
        self.aud_decoder = MlpDecoder(1, steps, dim)

    @property
    def config(self) -> dict[str, Any]:
        """Every constructor argument, as a checkpoint stores it."""
        training = {"tau": self.tau, "mask_ratio": self.mask_ratio, "reciprocal_k": self.reciprocal_k}
        return self.shape | self.imgnet.config | training

    def encode(self, image: torch.Tensor, spectrogram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W), spectrograms (B, 1, F, L) -> image tokens (B, N, D), audio tokens (B, T, D)."""
        return self.imgnet(image).flatten(2).transpose(1, 2), self.audnet(spectrogram).transpose(1, 2)

    def attend_image(self, image: torch.Tensor) -> tuple[SlotState, tuple[int, int]]:
        """Images (B, 3, H, W) -> slots, query and keys, and the grid (h, w) of the keys."""
        features = self.imgnet(image)
        return self.slot_attn("img", features.flatten(2).transpose(1, 2)), tuple(features.shape[2:])

    def attend_audio(self, spectrogram: torch.Tensor) -> SlotState:
        """Spectrograms (B, 1, F, L) -> slots, query and keys."""
        return self.slot_attn("aud", self.audnet(spectrogram).transpose(1, 2))

    def draw_masks(self, batch: int, tokens: tuple[int, int] | None = None) -> TokenMasks:
        """Hide each token of `batch` pairs independently with probability mask_ratio, by PyTorch's CPU generator.

        tokens: N and T, where they differ from those of the sizes that the model was built for.
        """
        return TokenMasks(*(torch.rand(batch, count) < self.mask_ratio for count in tokens or self.tokens))

    def forward(
        self,
        image: torch.Tensor,
        spectrogram: torch.Tensor,
        masks: TokenMasks | None = None,
        wanted: Collection[str] = PAPER_LOSSES,
        compare: Callable[[Compared], dict[str, torch.Tensor]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Unweighted losses by name, scalars; what training calls. masks and spectrogram: see `represent`.

        wanted: names of losses; those of the map (MAP_LOSSES) are computed only if one of them is. compare: called in
        place of `batch_losses` where these rows are only a part of the batch (training/step.py).
        """
        pairs = self.represent(image, spectrogram, masks)
        own = self.compared(pairs, wanted)
        of_pairs = self.pair_losses(pairs)
        return (compare or self.batch_losses)(own) | of_pairs

    def represent(self, image: torch.Tensor, spectrogram: torch.Tensor, masks: TokenMasks | None = None) -> Represented:
        """Images and spectrograms -> slots of both. Tokens are masked in training mode only; None draws the masks.

        spectrogram (B, 1, F, L), or (B, 2, F, L), the second ones of silence or noise, which is not masked.
        """
        audio = torch.cat(spectrogram.split(1, dim=1))  # (B or 2B, 1, F, L): batch norm sees all of them together
        image_tokens, audio_tokens = self.encode(image, audio)
        own, *silence = audio_tokens.split(len(image))
        pairs = self.represent_tokens(image_tokens, own, masks)
        return pairs._replace(silence=self.slot_attn("aud", *silence)) if silence else pairs

    def represent_tokens(
        self, image_tokens: torch.Tensor, audio_tokens: torch.Tensor, masks: TokenMasks | None = None
    ) -> Represented:
        """The same from the encoders' tokens, (B, N, D) and (B, T, D)."""
        seen, heard = image_tokens, audio_tokens
        if self.training and self.mask_ratio:
            masks = masks or self.draw_masks(len(seen), (seen.shape[1], heard.shape[1]))
            seen = self.slot_attn.mask_tokens("img", seen, masks.image.to(seen.device))
            heard = self.slot_attn.mask_tokens("aud", heard, masks.audio.to(heard.device))
        return Represented(self.slot_attn("img", seen), self.slot_attn("aud", heard), image_tokens, audio_tokens)

    @staticmethod
    def compared(pairs: Represented, wanted: Collection[str] = PAPER_LOSSES) -> Compared:
        """What `batch_losses` needs of each pair: all that several processes, or parts of a batch, exchange.

        image_target, audio_target (B, D), unit target slots; where a loss of the map is wanted, audio_query (B, K, D)
        and image_keys (B, N, D) as well.
        """
        image, audio = pairs.image, pairs.audio
        targets = {
            "image_target": F.normalize(image.slots[:, TARGET], dim=1),
            "audio_target": F.normalize(audio.slots[:, TARGET], dim=1),
        }
        if MAP_LOSSES.isdisjoint(wanted):
            return targets
        return targets | {"audio_query": audio.query, "image_keys": image.keys}

    def batch_losses(self, batch: Compared) -> dict[str, torch.Tensor]:
        """Losses that compare pairs with each other: they must see the whole batch, not a part of it."""
        image_target, audio_target = batch["image_target"], batch["audio_target"]
        keep = self._keep_mask(image_target.detach(), audio_target.detach())
        with torch.autocast(image_target.device.type, enabled=False):
            losses = {"info_nce": info_nce_loss(image_target, audio_target, self.tau, keep)}
            if keep is not None:  # without the rule it is 2 log B
                losses["info_nce_chance"] = info_nce_chance(keep)
            if "image_keys" in batch:
                shares = shares_of_others(batch["audio_query"], batch["image_keys"])
                losses["share_contrast"] = share_contrast_loss(shares, keep)
                losses["foreign_claims"] = foreign_claim_loss(shares, keep)
        return losses

    def pair_losses(self, pairs: Represented) -> dict[str, torch.Tensor]:
        """Losses of each pair by itself, averaged over pairs: a batch's is the mean of its parts', weighted by size."""
        image, audio = pairs.image, pairs.audio
        image_unit, audio_unit = F.normalize(image.slots, dim=2), F.normalize(audio.slots, dim=2)
        reconstruction = self._reconstruct(image.slots, pairs.image_tokens, audio.slots, pairs.audio_tokens)
        with torch.autocast(image.slots.device.type, enabled=False):
            losses = {
                "reconstruction": reconstruction,  # decoders may run in half precision, the error is taken in fp32
                "slot_divergence": slot_divergence_loss(image_unit) + slot_divergence_loss(audio_unit),
                "attention_matching": attention_matching_loss(image, audio),
            }
            if pairs.silence is not None:
                losses["silence"] = silence_loss(pairs.silence.query, image.keys)
            return losses

    @torch.no_grad()
    def localize(self, image: torch.Tensor, spectrogram: torch.Tensor, infer_sharpening: float = 0.1) -> Maps:
        """Maps of the target slot over the image grid, (B, h, w) each: see `maps`."""
        image_state, grid = self.attend_image(image)
        return self.maps(image_state, self.attend_audio(spectrogram), grid, infer_sharpening)

    @torch.no_grad()
    def embed(self, image: torch.Tensor, spectrogram: torch.Tensor) -> Embeddings:
        """Slots of both modalities, (B, K, D) each, not normalised; retrieval uses row TARGET."""
        return Embeddings(self.attend_image(image)[0].slots, self.attend_audio(spectrogram).slots)

    @staticmethod
    def maps(image: SlotState, audio: SlotState, grid: tuple[int, int], infer_sharpening: float = 0.1) -> Maps:
        """Maps from the state of both modalities, so that an image can be combined with any audio clip.

        audio_map and image_map each sum to 1, so they always light something. share is the target slot's `slot_share`
        of each token, 0..1, not sharpened: near 0 everywhere where nothing in view sounds.
        """
        maps = [slot_attention(m.query, image.keys, infer_sharpening)[:, TARGET] for m in (audio, image)]
        share = slot_share(audio.query, image.keys)[:, TARGET]
        return Maps(*(m.unflatten(1, grid) for m in (*maps, share)))

    @staticmethod
    def confidences(image: SlotState, audio: SlotState, infer_sharpening: float = 0.1) -> dict[str, torch.Tensor]:
        """Confidences that the source is in view, by name, (B,) each: cosine of the target slots, and by the map."""
        return {
            "confidence": F.cosine_similarity(image.slots[:, TARGET], audio.slots[:, TARGET]),
            "confidence_map": map_confidence(image, audio, infer_sharpening),
            "presence": presence_confidence(image, audio),
        }

    @staticmethod
    def embedding(state: SlotState) -> torch.Tensor:
        """What retrieval compares of a modality: the target slots (B, D), not normalised."""
        return state.slots[:, TARGET]

    def _keep_mask(self, image_target: torch.Tensor, audio_target: torch.Tensor) -> torch.Tensor | None:
        batch = len(image_target)
        k = default_reciprocal_k(batch) if self.reciprocal_k is None else self.reciprocal_k
        if k >= batch:
            raise ValueError(
                f"reciprocal_k {k} leaves no negative in a batch of {batch}: lower it or enlarge the batch"
            )
        with torch.autocast(image_target.device.type, enabled=False):
            return false_negative_keep_mask(image_target, audio_target, k) if k else None

    def _reconstruct(self, image_slots, image_tokens, audio_slots, audio_tokens) -> torch.Tensor:
        losses = []
        for decoder, slots, tokens in (
            (self.img_decoder, image_slots, image_tokens),
            (self.aud_decoder, audio_slots, audio_tokens),
        ):
            decoded = decoder(slots)  # (B, N, D)
            if decoded.shape != tokens.shape:
                raise ValueError(
                    f"{tokens.shape[1]} tokens reach a decoder of {decoded.shape[1]}: this model was built for "
                    f"images of {self.shape['image_size']} px and {self.shape['audio_seconds']} s of audio"
                )
            losses.append(reconstruction_loss(decoded, tokens))
        return losses[0] + losses[1]
