"""Are the data of a set complete, whole and apart from the tests? The work of `prepare_data.py check`."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from annotations import HUGE, first_ids, read_entries
from dataset import (
    LAYOUTS,
    TRAIN_SETS,
    EvaluationPairs,
    Pair,
    SetRow,
    data_root,
    files_of,
    find_files,
    select_training_pairs,
)
from maps import MAP_SIZE
from sets import (
    ALL_SETS,
    SHORT_SECONDS,
    Facts,
    Request,
    add_list_flags,
    build_each,
    build_pairs,
    inspect_pairs,
    overlap_with_tests,
    requests,
)
from shards.addresses import are_shards
from shards.check import inspect_shards
from shards.pairs import select_from_shards
from utils import Absent, UserError, number


def add_flags(parser) -> None:
    parser.add_argument("--trainset", choices=sorted(TRAIN_SETS), help="training set to check")
    parser.add_argument(
        "--testset", help=f"test set to check: {', '.join(ALL_SETS)}, several separated by commas, or all"
    )
    parser.add_argument(
        "--train_data_path", help="root of the training data, or shards (default: the set's environment variable)"
    )
    parser.add_argument("--test_data_path", help="root of the test data (default: the set's environment variable)")
    parser.add_argument("--train_list", help="file of training ids, one per line, in place of the set's own list")
    add_list_flags(parser)
    parser.add_argument("--metadata", default="./metadata", help="folder of the public lists and annotations")
    parser.add_argument("--workers", type=number(int, low=0), default=2, help="number of processes that decode")


def run(args) -> None:
    if bool(args.trainset) == bool(args.testset):
        raise UserError("say what to check: --trainset NAME or --testset NAME")
    if args.trainset:
        root = args.train_data_path or os.environ.get(TRAIN_SETS[args.trainset].root)
        sharded, broken = are_shards(root), {}
        select = select_from_shards if sharded else select_training_pairs
        selection = select(args.trainset, root, args.metadata, args.train_list, allow_missing=True)
        overlap = overlap_with_tests([pair.id for pair in selection.pairs] + selection.missing, args.metadata)
        if sharded:
            facts, broken = inspect_shards(selection.pairs, args.workers)
        else:
            facts = inspect_pairs(selection.pairs, args.workers)
        name, expected = f"training set {args.trainset}", selection.expected
        others = {} if sharded else left_over(TRAIN_SETS[args.trainset], root, selection.pairs, selection.missing)
        print(check_table(name, expected, selection.pairs, selection.missing, facts, {}, overlap, others))
        print("".join(f"{why}\n" for why in broken.values()), end="")
        give_verdict(bool(selection.missing or broken) or any(fact.error for fact in facts))
        return

    asked = requests(args)

    def build(name: str, request: Request) -> EvaluationPairs:
        try:
            return build_pairs(name, request, args, MAP_SIZE, SHORT_SECONDS, allow_missing=True)
        except Absent:
            raise
        except UserError:
            found = {what: count for what, count in problems_of(request, args).items() if count}
            print("".join(f"test set {name}: {count} boxes {what}\n" for what, count in found.items()), end="")
            raise

    wanting = False
    for name, dataset in build_each(args, build).items():
        problems = problems_of(asked[name], args)
        facts = inspect_pairs(dataset.pairs, args.workers, dataset.ground_truth.truth_of)
        expected = dataset.ground_truth.expected
        others = left_over(ALL_SETS[asked[name].name], args.test_data_path, dataset.pairs, dataset.missing)
        what = f"test set {name}", expected, dataset.pairs, dataset.missing
        print(check_table(*what, facts, problems, {}, others) + "\n")
        wanting |= bool(dataset.missing) or any(fact.error for fact in facts)
    give_verdict(wanting)


def left_over(row: SetRow, root: str | None, pairs: Sequence[Pair], missing: Sequence[str]) -> dict[str, list[str]]:
    """What lies in the set's folders beside its pairs: images and audio of other ids, and files that are neither."""
    if row.layout not in LAYOUTS:
        return {}
    found = find_files(data_root(row, root, "the data's root"), row.layout)
    used = {path for pair in pairs for path in (*files_of(pair.image), *files_of(pair.audio))}
    unused = {name for files in (found.images, found.audio) for name, path in files.items() if path not in used}
    suffixes = Counter(Path(name).suffix or "no suffix" for name in found.others)
    return {
        "images or audio of no pair": sorted(unused - set(missing)),
        "other files": [suffix for suffix, count in suffixes.most_common() for _ in range(count)],
    }


def give_verdict(wanting: bool) -> None:
    """One last line, and exit status 1 where pairs are missing or broken, so that a script can ask."""
    print("not complete: pairs are missing or broken" if wanting else "complete: every pair is there and decodes")
    if wanting:
        raise SystemExit(1)


def problems_of(request: Request, args) -> dict[str, int]:
    """`annotation_problems` of a test set's own annotation, or of the one given."""
    row = ALL_SETS[request.name]
    folder = Path(args.test_data_path or row.root) if row.lists_in_root else Path(args.metadata)
    path = request.gt_path or (row.annotation and folder / row.annotation)
    return annotation_problems(row, Path(path)) if path else {}


# ---------------------------------------------------------------- what the table shows


def annotation_problems(row: SetRow, path: Path) -> dict[str, int]:
    """Boxes of a JSON that are clipped, count as empty or cannot be read: {what: how many}; {} for other kinds."""
    if row.kind not in ("boxes", "pixels"):
        return {}
    side = 1.0 if row.kind == "boxes" else float(MAP_SIZE)
    entries = [entry for entry in read_entries(path) if isinstance(entry, dict)]
    drawn = [entry.get("bbox") or () if row.kind == "boxes" else [entry.get("gt_box")] for entry in entries]
    problems = dict.fromkeys(("not a number", "outside the image", "beyond a million", "without area"), 0)
    for box in (box for boxes in drawn for box in boxes):
        try:
            values = np.array([float(v) for v in box])
        except (TypeError, ValueError):
            values = np.full(4, np.nan)
        if values.shape != (4,) or np.isnan(values).any():
            problems["not a number"] += 1
            continue
        pixels = (np.clip(values / side, 0, 1) * MAP_SIZE).astype(int)
        problems["outside the image"] += bool((values < 0).any() or (values > side).any())
        problems["beyond a million"] += bool((np.abs(values) > HUGE).any())
        problems["without area"] += bool((pixels[2:] <= pixels[:2]).any())
    return problems


def check_table(
    name: str,
    expected: int,
    pairs: Sequence[Pair],
    missing: Sequence[str],
    facts: Sequence[Facts],
    problems: Mapping[str, int],
    overlap: Mapping[str, Sequence[str]],
    others: Mapping[str, Sequence[str]] = {},
) -> str:
    """What `prepare_data.py check` prints: counts, and the first ids of whatever is not as it should be."""

    def of(wanted) -> list[str]:
        return [pair.id for pair, fact in zip(pairs, facts, strict=True) if wanted(fact)]

    by_digest: dict[str, list[str]] = {}
    for pair, fact in zip(pairs, facts, strict=True):
        if fact.digest:
            by_digest.setdefault(fact.digest, []).append(pair.id)
    same = [names for names in by_digest.values() if len(names) > 1]
    broken = of(lambda fact: fact.error)
    rows: list[tuple[str, int, Sequence[str]]] = [
        ("expected", expected, ()),
        ("present", len(pairs), ()),
        ("missing", max(expected - len(pairs), len(missing)), missing),
        ("decodable", len(pairs) - len(broken), ()),
        ("not decodable", len(broken), broken),
        ("silent (digital zero)", *_counted(of(lambda fact: fact.silent))),
        (f"shorter than {SHORT_SECONDS:g} s", *_counted(of(lambda fact: fact.seconds < SHORT_SECONDS - 0.01))),
        ("same content as another", sum(map(len, same)), [" = ".join(names) for names in same]),
        *((what, len(names), names) for what, names in others.items() if names),
        *((f"boxes {what}", count, ()) for what, count in problems.items()),
        *((f"also in test set {tested}", len(ids), ids) for tested, ids in overlap.items()),
    ]
    lines = [f"{name}", "", *(f"{what:32} {count:>9,}   {first_ids(ids)}".rstrip() for what, count, ids in rows)]
    return "\n".join([*lines, "", *(fact.error for fact in facts if fact.error)]).rstrip()


def _counted(ids: list[str]) -> tuple[int, list[str]]:
    return len(ids), ids
