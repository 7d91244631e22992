"""Figures of films whose truth is known in every frame: who sounds when, and where everybody is.

N steps of all films: moments at which a model was asked, in the order of time within a film. A step's peak is the place
where its map is largest, x and y in 0..1 of the image. Boxes are [xmin, ymin, xmax, ymax], 0..1. Figures are fractions
of 1, times seconds. Turns begin and end; in a pause nothing sounds; a source may sound from outside of the image.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from annotations import check_id, read_text
from scoring.bootstrap import Ratio, intervals_of, values_of
from utils import Absent, UserError

Box = Sequence[float]
PAUSE = -1  # in place of a turn


class Film(NamedTuple):
    """The truth of one film."""

    name: str
    fps: float
    boxes: list[list[Box | None]]  # by object, then by frame; None where it is out of view
    turns: list[tuple[float, float, int]]  # begin, end, object


class Moment(NamedTuple):
    """What is true at one step."""

    film: str
    time: float
    turn: int  # number of the turn, or PAUSE
    onset: bool  # the turn's first step, where it does not begin with the film
    left: float  # s until the turn ends; 0 in a pause
    source: Box | None  # what sounds, where it is in view
    silent: list[Box]  # what is in view and does not sound


class Seen(NamedTuple):
    """What a model says at one step."""

    x: float
    y: float
    lit: float  # share of the image above the threshold; NaN without a threshold


def read_films(path: Path) -> list[Film]:
    """The truth of films as the built-in ones have it. UserError where the file is not that."""
    if not path.is_file():
        raise Absent(f"{path} does not exist: python prepare_data.py synthetic --video makes it and its films")
    try:
        truth = json.loads(read_text(path, "annotation"))
        fps = float(truth["fps"])
        films = [
            Film(
                check_id(str(film["id"]), path),
                fps,
                [thing["boxes"] for thing in film["objects"]],
                [(float(turn["begin"]), float(turn["end"]), int(turn["object"])) for turn in film["turns"]],
            )
            for film in truth["films"]
        ]
        whole = all(0 <= turn[2] < len(film.boxes) and all(film.boxes) for film in films for turn in film.turns)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not the truth of films as `prepare_data.py synthetic --video` writes it") from error
    if not films or not whole or not fps > 0:
        raise UserError(f"{path} holds no films, or turns of objects that it does not have")
    return films


def moments_of(film: Film, times: Sequence[float]) -> list[Moment]:
    """The truth at the steps of a film, whose times rise."""
    found, before = [], None
    for time in times:
        turn = next((i for i, (begin, end, _) in enumerate(film.turns) if begin - 1e-6 <= time < end - 1e-6), PAUSE)
        frame = round(time * film.fps - 0.25)  # the frame shown then
        shown = [boxes[min(max(frame, 0), len(boxes) - 1)] for boxes in film.boxes]
        sounding = film.turns[turn][2] if turn != PAUSE else None
        silent = [box for thing, box in enumerate(shown) if box is not None and thing != sounding]
        onset = turn not in (PAUSE, before) and film.turns[turn][0] > times[0]
        left = film.turns[turn][1] - time if turn != PAUSE else 0.0
        source = None if sounding is None else shown[sounding]
        found.append(Moment(film.name, time, turn, onset, left, source, silent))
        before = turn
    return found


def inside(seen: Seen, box: Box) -> bool:
    return box[0] <= seen.x < box[2] and box[1] <= seen.y < box[3]


def held(seen: Sequence[Seen], times: Sequence[float], window: float) -> list[Seen]:
    """What is left where windows do not overlap: the answer of the last whole window, until the next one is whole.

    seen: of windows around the steps of one film. Before the first one is whole, its answer counts already.
    """
    middles = [(max(1, int((time + 1e-6) / window)) - 0.5) * window for time in times]
    return [seen[int(np.abs(np.asarray(times) - middle).argmin())] for middle in middles]


def time_ratios(seen: Sequence[Seen], moments: Sequence[Moment], on_time: float, may_be_dark: bool) -> dict[str, Ratio]:
    """Figures of N steps.

    pointing: of the steps whose source is in view, share with the peak in its box.
    lit_sounding, lit_pauses, lit_outside: mean lit share while the source is in view, in pauses, while it is outside.
    delay: s from the moment at which a source in view begins to sound until the peak is on it; a source that is never
    pointed at counts with its whole turn. followed: share of these that are pointed at; on_time: within `on_time` s.
    false_peaks: of the steps with a silent object in view, share with the peak on one of them.
    may_be_dark: there is no peak where nothing is lit.
    """
    dark = np.array([may_be_dark and not step.lit > 0 for step in seen])
    in_view = np.array([moment.source is not None for moment in moments])
    pause = np.array([moment.turn == PAUSE for moment in moments])
    hit = np.array([m.source is not None and inside(s, m.source) for s, m in zip(seen, moments, strict=True)]) & ~dark
    others = np.array([bool(moment.silent) for moment in moments])
    false = np.array([any(inside(s, box) for box in m.silent) for s, m in zip(seen, moments, strict=True)]) & ~dark
    delay, first, followed = _delays(moments, hit)
    ratios = {
        "pointing": Ratio(hit, in_view),
        "false_peaks": Ratio(false, others),
        "delay": Ratio(delay, first),
        "followed": Ratio(followed, first),
        "on_time": Ratio(followed & (delay <= on_time + 1e-6), first),
    }
    lit = np.array([step.lit for step in seen])
    if np.isfinite(lit).all():
        spans = {"lit_sounding": in_view, "lit_pauses": pause, "lit_outside": ~in_view & ~pause}
        ratios |= {name: Ratio(lit * span, span) for name, span in spans.items()}
    return ratios


def _delays(moments: Sequence[Moment], hit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At the first step of each turn whose source is in view: the delay, that it is one, whether it is followed."""
    delay, first, followed = np.zeros(len(moments)), np.zeros(len(moments), bool), np.zeros(len(moments), bool)
    for i, moment in enumerate(moments):
        if not moment.onset or moment.source is None:
            continue
        first[i], delay[i] = True, moment.left
        for j in range(i, len(moments)):
            if (moments[j].film, moments[j].turn) != (moment.film, moment.turn):
                break
            if hit[j]:
                delay[i], followed[i] = moments[j].time - moment.time, True
                break
    return delay, first, followed


def deaf_ratios(moments: Sequence[Moment], on_time: float) -> dict[str, Ratio]:
    """Expected figures of an oracle that sees every object, hears nothing, and takes one of them at random for good."""
    count = np.array([len(moment.silent) + (moment.source is not None) for moment in moments])
    in_view = np.array([moment.source is not None for moment in moments])
    chance = in_view / np.maximum(count, 1)
    boxes = [[*moment.silent, *([moment.source] if moment.source is not None else [])] for moment in moments]
    lit = np.array([np.mean([_area(box) for box in own]) if own else 0.0 for own in boxes])
    pause = np.array([moment.turn == PAUSE for moment in moments])
    others = np.array([bool(moment.silent) for moment in moments])
    first = np.array([moment.onset and moment.source is not None for moment in moments])
    left = np.array([moment.left for moment in moments])
    spans = {"lit_sounding": in_view, "lit_pauses": pause, "lit_outside": ~in_view & ~pause}
    return {
        "pointing": Ratio(chance, in_view),
        "false_peaks": Ratio(others * (1 - chance), others),
        "delay": Ratio(first * (1 - chance) * left, first),
        "followed": Ratio(first * chance, first),
        "on_time": Ratio(first * chance, first),
    } | {name: Ratio(lit * span, span) for name, span in spans.items()}


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def over_time(
    rows: Mapping[str, tuple[Sequence[Seen], bool]],
    moments: Sequence[Moment],
    on_time: float,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """maps, intervals and references of rows {name: (its N steps, whether it may be dark)}; films are resampled."""
    ratios = {name: time_ratios(seen, moments, on_time, dark) for name, (seen, dark) in rows.items()}
    films = [moment.film for moment in moments]
    return {
        "maps": values_of(ratios),
        "intervals": intervals_of(ratios, films, resamples, seed),
        "references": values_of({"deaf_oracle": deaf_ratios(moments, on_time)}),
    }
