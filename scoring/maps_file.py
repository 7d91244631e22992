"""Localization maps on disk, our own and those of any other method: `maps.npz`.

    id             N strings
    <any name>     (N, h, w) floats, integers or booleans, at any resolution, larger where the sound comes from
    confidence     optional, N floats, larger where the source is more likely in view (extended sets)
    interpolation  optional: "bicubic" (default), or "bilinear" with aligned corners, as EZ-VSL, FNAC, SLAVC use it
    alpha          optional: if given, AUD, IMG_QUERY and OBJ_PRIOR are also summed to IQR, OGL and IQR_OGL

Maps that mean the same in every image may be asked with negative audio (scoring/negatives.py). Beside NAME:

    NAME_silence, NAME_noise, NAME_offscreen  optional, (N, h, w), or (N, S, h, w) for S seeds
    NAME_threshold                            optional, a number: above it NAME says that something sounds
    threshold                                 optional, that of every NAME without one of its own

The file is written and read batch by batch: only one batch of maps is in memory. B batch, N samples, S seeds.
"""

import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scoring.negatives import NEGATIVES
from utils import UserError, as_user_error, atomic_path, reserve, writing

SCALARS = (
    "confidence",
    "confidence_map",
    "presence",
)  # per sample; detection metrics by the first one have no suffix
SETTINGS = ("interpolation", "alpha", "threshold")  # of the whole file
FUSED = ("IQR", "OGL", "IQR_OGL")  # formed from the others, by alpha
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
)


class MapBatch(NamedTuple):
    ids: list[str]
    maps: dict[str, torch.Tensor]  # (B, h, w) each, float
    scalars: dict[str, torch.Tensor]  # (B,) each
    negatives: dict[str, dict[str, torch.Tensor]]  # NAME: negative: (B, S, h, w)


class MapWriter:
    """Collects the maps of a pass over N samples, batch by batch, and writes them in one go."""

    def __init__(self, path: str | Path, count: int) -> None:
        self.path, self.count, self.ids, self.arrays = Path(path), count, [], {}
        self.drafts = tempfile.TemporaryDirectory()

    def add(self, ids: Sequence[str], arrays: Mapping[str, torch.Tensor]) -> None:
        """Append B ids and {name: (B, ...)}; the names and shapes are the same in every call."""
        start = len(self.ids)
        self.ids += ids
        for name, values in arrays.items():
            values = values.detach().cpu().numpy()
            if name not in self.arrays:
                self.arrays[name] = self._room(f"{len(self.arrays)}.npy", values)
            self.arrays[name][start : start + len(values)] = values

    def _room(self, name: str, values: np.ndarray) -> np.memmap:
        """An array for the values of all samples, on disk. Unwritable where it has no room for them."""
        draft, shape = Path(self.drafts.name) / name, (self.count, *values.shape[1:])
        with writing(draft):
            array = np.lib.format.open_memmap(draft, "w+", values.dtype, shape)
        reserve(draft, draft.stat().st_size)
        return array

    def finish(self, **settings: Any) -> Path:
        """Write the file, whole or not at all; settings: `interpolation`, `alpha`."""
        arrays = {name: array[: len(self.ids)] for name, array in self.arrays.items()}
        with atomic_path(self.path) as temporary:
            np.savez(temporary, id=np.array(self.ids), **arrays, **settings)
        self.arrays = {}
        self.drafts.cleanup()
        return self.path


class StoredMaps:
    """A file of maps. UserError, naming the file and the array, for anything that is not as described above."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with np.load(self.path, allow_pickle=False) as file:
                names = list(file)
                numbers = [name for name in names if name.removesuffix("_threshold") in {*names} - {name}]
                small = {name: file[name] for name in names if name in ("id", *SCALARS, *SETTINGS, *numbers)}
        except FileNotFoundError:
            raise UserError(f"there is no file of maps {path}") from None
        except DAMAGE as error:
            mend = "; save ids as numpy.array(ids, dtype=str)" if "allow_pickle" in str(error) else ""
            raise UserError(f"{path} is not an .npz file of maps: {error}{mend}") from error
        if "id" not in small:
            raise UserError(f"{path} has no array `id`: it holds {', '.join(names) or 'nothing'}")
        if small["id"].ndim != 1 or small["id"].dtype.kind not in "USiu":
            raise UserError(f"{path}: `id` must be a list of strings, not {small['id'].dtype} {small['id'].shape}")
        with as_user_error(UnicodeDecodeError):
            self.ids = [i.decode() if isinstance(i, bytes) else str(i) for i in small.pop("id").tolist()]
        self.interpolation = str(small.pop("interpolation", "bicubic"))
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"{path}: `interpolation` must be bicubic or bilinear, not {self.interpolation!r}")
        self.alpha = self._number("alpha", small.pop("alpha"), 0, 1) if "alpha" in small else None
        thresholds = {name: self._number(name, small.pop(name)) for name in (*numbers, "threshold") if name in small}
        self.scalars = {name: self._confidence(name, values) for name, values in small.items()}
        self.names = [name for name in names if name not in ("id", *SCALARS, *SETTINGS, *numbers)]
        self._find_negatives(thresholds)
        sums = [name for name in self.names if name in FUSED]
        if sums and self.alpha is not None and "AUD" in self.names:
            raise UserError(f"{path} holds {', '.join(sums)} and `alpha`, by which they would be formed: leave one out")
        if not self.names:
            raise UserError(f"{path} holds no maps: beside `id` it needs at least one array (N, h, w)")

    def _find_negatives(self, thresholds: Mapping[str, float]) -> None:
        """Take the arrays NAME_silence and so on out of the names.

        negatives: {NAME: its negatives} of absolute maps, which have some or a threshold; thresholds: {NAME: number}.
        """
        of_name = {name: [kind for kind in NEGATIVES if f"{name}_{kind}" in self.names] for name in self.names}
        asked = {f"{name}_{kind}" for name, kinds in of_name.items() for kind in kinds}
        self.names = [name for name in self.names if name not in asked]
        common = thresholds.get("threshold")
        if common is not None and not any(of_name[name] for name in self.names):
            raise UserError(f"{self.path}: `threshold` has no use without maps of negative audio, such as NAME_silence")
        given = {name: thresholds.get(f"{name}_threshold", common if of_name[name] else None) for name in self.names}
        self.thresholds = {name: number for name, number in given.items() if number is not None}
        self.negatives = {name: of_name[name] for name in self.names if of_name[name] or name in self.thresholds}

    def _number(self, name: str, value: np.ndarray, low: float = -math.inf, high: float = math.inf) -> float:
        number = float(value) if value.size == 1 and value.dtype.kind in "fiu" else math.nan
        if not (math.isfinite(number) and low <= number <= high):
            within = f" in {low:g}..{high:g}" if math.isfinite(low) else ""
            raise UserError(f"{self.path}: `{name}` must be a number{within}, not {value!s:.80}")
        return number

    def _confidence(self, name: str, values: np.ndarray) -> np.ndarray:
        if values.shape != (len(self.ids),) or values.dtype.kind not in "fiub" or not np.isfinite(values).all():
            raise UserError(f"{self.path}: `{name}` must be {len(self.ids)} finite numbers, as many as ids")
        return values.astype(np.float64)

    def batches(self, size: int) -> Iterator[MapBatch]:
        """Batches in the file's order."""
        readers = {name: self._rows(name, size) for name in self.names}
        asked = {
            name: {kind: self._rows(f"{name}_{kind}", size, seeds=True) for kind in kinds}
            for name, kinds in self.negatives.items()
        }
        for start in range(0, len(self.ids), size):
            ids = self.ids[start : start + size]
            maps = {name: torch.from_numpy(self._finite(name, ids, next(rows))) for name, rows in readers.items()}
            scalars = {name: torch.from_numpy(values[start : start + size]) for name, values in self.scalars.items()}
            negatives = {
                name: {
                    kind: torch.from_numpy(self._finite(f"{name}_{kind}", ids, next(rows)))
                    for kind, rows in kinds.items()
                }
                for name, kinds in asked.items()
            }
            self._check_seeds(negatives)
            yield MapBatch(ids, maps, scalars, negatives)

    def _check_seeds(self, negatives: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for name, kinds in negatives.items():
            seeds = {kind: maps.shape[1] for kind, maps in kinds.items()}
            if len({*seeds.values()} - {1}) > 1:
                listed = ", ".join(f"{name}_{kind} {count}" for kind, count in seeds.items())
                raise UserError(f"{self.path}: negatives of one map need equally many seeds, or one: {listed}")

    def _rows(self, name: str, size: int, seeds: bool = False) -> Iterator[np.ndarray]:
        """An array of the file read in pieces of `size` rows; np.load would read all of it at once.

        seeds: the array is (N, h, w) or (N, S, h, w), and the pieces are (size, S, h, w).
        """
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                shape, fortran, dtype = HEADER_READERS[version](file)
                dims = (3, 4) if seeds else (3,)
                if len(shape) not in dims or shape[0] != len(self.ids) or 0 in shape or dtype.kind not in "fiub":
                    several = f" or ({len(self.ids)}, seeds, h, w)" if seeds else ""
                    raise UserError(
                        f"{self.path}: `{name}` must be ({len(self.ids)}, h, w){several} numbers, one map per id, "
                        f"not {dtype} {shape}"
                    )
                shape = (shape[0], 1, *shape[1:]) if seeds and len(shape) == 3 else shape
                if fortran:
                    raise UserError(f"{self.path}: `{name}` is stored by columns: save numpy.ascontiguousarray of it")
                for start in range(0, shape[0], size):
                    count = min(size, shape[0] - start)
                    data = file.read(count * math.prod(shape[1:]) * dtype.itemsize)
                    yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
        except DAMAGE as error:
            raise UserError(f"{self.path}: `{name}` cannot be read ({error}): the file is damaged") from error

    def _finite(self, name: str, ids: Sequence[str], maps: np.ndarray) -> np.ndarray:
        maps = maps.astype(np.float64 if maps.dtype == np.float64 else np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            flat = maps.reshape(len(maps), -1)
            bad = ~np.isfinite(flat.max(1) - flat.min(1))  # the range must be finite, too
        if bad.any():
            raise UserError(
                f"{self.path}: the map `{name}` of {ids[int(bad.argmax())]} holds a value that is not finite"
            )
        return maps
