"""The built-in films: reproducible, who sounds when, and that images and audio show what the truth says."""

import collections
import itertools
import json

import av
import numpy as np
import pytest
from test_synthetic_generate import digests

import synthetic.video as video
from audio_io import SAMPLE_RATE
from synthetic.kinds import KINDS
from synthetic.video import FPS, FRAMES, SECONDS, SIDE, TURNS, Task


@pytest.fixture(scope="module")
def truth(film_root):
    return json.loads((film_root / video.TRUTH).read_text())


@pytest.fixture(scope="module")
def plans():
    """Sixty plans and the movements of some of them."""
    found = []
    for index in range(60):
        task = Task(None, 0, index)
        rng = np.random.default_rng([task.seed, video.STREAM, index])
        plan = video.plan_film(task, rng)
        found.append((plan, video.move_objects(plan, rng) if index % 15 == 1 else None))
    return found


def decoded(path, kind):
    with av.open(str(path)) as film:
        return [(frame.time, frame.to_ndarray(**({"format": "rgb24"} if kind == "video" else {})))
                for frame in film.decode(**{kind: 0})]  # fmt: skip


def test_same_seed_same_bytes_for_any_number_of_processes(film_root, tmp_path):
    video.generate_films(tmp_path / "one", films=2, processes=1)
    own, wanted = digests(tmp_path / "one"), digests(film_root)
    for name in ("clips/video_000000.mp4", "clips/video_000001.mp4"):
        assert own[name] == wanted[name] and len(own) == 4
    assert len({digest for name, digest in wanted.items() if name.endswith("mp4")}) == 3


def test_objects_sound_in_turns_with_two_pauses_and_one_from_outside(plans):
    for plan, _ in plans:
        times = [time for turn in plan.turns for time in (turn.begin, turn.end)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= SECONDS and len(plan.turns) == TURNS
        assert all(turn.end - turn.begin >= 1.5 - 1e-9 for turn in plan.turns)
        edges = [0, *times, SECONDS]
        assert sum(end > begin for begin, end in zip(edges[::2], edges[1::2], strict=True)) == video.PAUSES
        things = [turn.object for turn in plan.turns]
        assert all(a != b for a, b in itertools.pairwise(things))
        assert set(things) == set(range(len(plan.kinds)))
        outside = [turn for turn in plan.turns if turn.object == plan.leaver and turn.end > plan.leaves]
        assert len(outside) == 1 and outside[0].begin >= plan.leaves + video.EXIT_SECONDS
        assert any(turn.object == plan.leaver and turn.end <= plan.leaves for turn in plan.turns)
    assert {len(plan.kinds) for plan, _ in plans} == {2, 3}
    assert len({tuple(turn.object for turn in plan.turns) for plan, _ in plans}) > 4


def test_every_kind_is_in_view_equally_often(plans):
    for first in range(0, 60, 20):
        counts = collections.Counter(kind for plan, _ in plans[first : first + 20] for kind in plan.kinds)
        assert set(counts) == set(KINDS) and set(counts.values()) == {5}


def test_objects_move_and_never_overlap(plans):
    for plan, moved in plans:
        if moved is None:
            continue
        centres, sides = moved
        assert (np.ptp(centres, axis=0).max(1) > 0.04 * SIDE).all()
        assert (np.abs(np.diff(centres, axis=0)) < 0.3 * SIDE).all()  # no jump
        for i in range(len(sides)):
            for j in range(i):
                gap = np.abs(centres[:, i] - centres[:, j]).max(1) - (sides[i] + sides[j]) / 2
                assert gap.min() > 0
        inside = (centres - sides[:, None] / 2 >= 0).all(2) & (centres + sides[:, None] / 2 <= SIDE).all(2)
        stays = np.arange(len(sides)) != plan.leaver
        assert inside[:, stays].all() and inside[: round(plan.leaves * FPS), plan.leaver].all()
        assert not inside[-1, plan.leaver]


def test_a_film_is_what_a_player_expects(film_root):
    for path in sorted((film_root / "clips").iterdir()):
        with av.open(str(path)) as film:
            (image,), (audio,) = film.streams.video, film.streams.audio
            assert (image.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (image.codec_context.pix_fmt, image.average_rate) == ("yuv420p", FPS)
            assert film.duration / av.time_base == pytest.approx(SECONDS, abs=0.1)
        frames = decoded(path, "video")
        assert [time for time, _ in frames] == pytest.approx([number / FPS for number in range(FRAMES)])


def test_boxes_are_around_the_objects_of_every_frame(film_root, truth, monkeypatch):
    """A film without its objects differs from the film only inside of the boxes, and up to their edges."""
    entry, rng = truth["films"][1], np.random.default_rng([0, video.STREAM, 1])
    plan = video.plan_film(Task(None, 0, 1), rng)
    moved = video.move_objects(plan, rng)
    state = rng.bit_generator.state
    drawn, boxes = video.draw_film(plan, *moved, rng)
    assert boxes == [thing["boxes"] for thing in entry["objects"]]
    rng.bit_generator.state = state
    with monkeypatch.context() as change:
        change.setattr(video, "_paste", lambda *_: None)
        empty, _ = video.draw_film(plan, *moved, rng)
        empty = list(empty)
    stored = [image for _, image in decoded(film_root / "clips" / f"{entry['id']}.mp4", "video")]
    for number, image in enumerate(drawn):
        if number % 16:
            continue
        assert np.abs(image - stored[number].astype(int)).mean() < 4  # the encoder's loss
        changed = np.abs(image - empty[number].astype(int)).sum(2) > 12
        for thing in entry["objects"]:
            box = thing["boxes"][number]
            if box is None:
                continue
            left, top, right, bottom = (v * SIDE for v in box)
            own = np.s_[int(top) : int(bottom) + 2, int(left) : int(right) + 2]
            rows, columns = (np.flatnonzero(changed[own].any(axis)) for axis in (1, 0))
            if min(right - left, bottom - top) > 8:
                assert rows[0] <= 4 and columns[0] <= 4
                assert rows[-1] >= bottom - int(top) - 5 and columns[-1] >= right - int(left) - 5
            changed[own] = False
        assert not changed.any()


def test_audio_begins_and_ends_with_the_turns(film_root, truth):
    silent = 0
    for entry in truth["films"]:
        pieces = decoded(film_root / "clips" / f"{entry['id']}.mp4", "audio")
        assert pieces[0][0] == pytest.approx(0, abs=0.001)
        sound = np.concatenate([samples[0] for _, samples in pieces])
        assert SECONDS * SAMPLE_RATE <= len(sound) < (SECONDS + 0.2) * SAMPLE_RATE and np.abs(sound).max() < 1

        def level(begin, end, sound=sound):
            return np.sqrt(np.mean(sound[round(begin * SAMPLE_RATE) : round(end * SAMPLE_RATE)] ** 2))

        turns = entry["turns"]
        loudest = max(level(turn["begin"], turn["end"]) for turn in turns)
        assert min(level(turn["begin"], turn["end"]) for turn in turns) > 0.5 * loudest
        edges = [0, *(time for turn in turns for time in (turn["begin"], turn["end"])), SECONDS]
        pauses = [span for span in zip(edges[::2], edges[1::2], strict=True) if span[1] > span[0]]
        for begin, end in pauses:
            quiet = level(begin + 0.08, end - 0.08)
            assert quiet < 1e-4 if entry["silent_pauses"] else 1e-4 < quiet < 0.5 * loudest
        silent += entry["silent_pauses"]
    assert 0 < silent < len(truth["films"])


def test_a_repeated_sound_is_whole_and_without_a_click():
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    sound = np.sin(2 * np.pi * 440 * time)
    long = video.repeat(sound, 3 * SAMPLE_RATE)
    assert len(long) == 3 * SAMPLE_RATE and np.abs(np.diff(long)).max() < 0.3
    loud = np.sqrt(np.convolve(long**2, np.ones(800) / 800, "valid"))
    assert loud.min() > 0.4 and loud.max() < 1.1
