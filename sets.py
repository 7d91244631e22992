"""Test sets by name: the table of all of them, the command line's flags for them, what is there and what is not."""

from collections.abc import Callable

from annotations import GroundTruth
from dataset import TEST_SETS, EvaluationPairs, build_ground_truth, build_test_set
from dataset_avs import AVS_SETS, build_avs_set, build_avs_truth
from inspection import undecodable
from utils import Absent, UserError, boolean

ALL_SETS = TEST_SETS | AVS_SETS


def add_test_set_flags(group, default: str | None) -> None:
    """The flags that name test sets, the same in testing and training."""
    group.add_argument("--testset", default=default, help=f"{', '.join(ALL_SETS)}, a comma list, or all")
    group.add_argument("--test_data_path", help="root of the test data (default: the set's environment variable)")
    group.add_argument("--test_gt_path", help="annotation: a JSON of boxes, for flickr the folder of XML files")
    group.add_argument("--test_list", help="list of ids in the place of the set's own")
    group.add_argument("--metadata", default="./metadata", help="folder of the public lists and annotations")
    group.add_argument(
        "--allow_missing", type=boolean, default=False, help="true: go on without missing or broken pairs, counted"
    )


def parse_testsets(text: str) -> list[str]:
    names = list(ALL_SETS) if text == "all" else text.split(",")
    unknown = [name for name in names if name not in ALL_SETS]
    if unknown:
        raise UserError(
            f"unknown test set {', '.join(unknown)}: choose from {', '.join(ALL_SETS)}, a comma list, or all"
        )
    return names


def build_test_sets(args, image_size: int, audio_seconds: float) -> dict[str, EvaluationPairs]:
    """The sets that --testset names, with their pictures and sounds, as a model takes them.

    With --allow_missing without the pairs that are missing or, after decoding every pair once, cannot be decoded.
    """

    def build(name: str) -> EvaluationPairs:
        pairs = build_pairs(name, args, image_size, audio_seconds, args.allow_missing)
        if not args.allow_missing:
            return pairs
        broken = undecodable(pairs.pairs, args.num_workers, pairs.ground_truth.truth_of)
        return pairs.without(broken) if broken else pairs

    return build_each(args, build)


def build_pairs(name: str, args, image_size: int, audio_seconds: float, allow_missing: bool) -> EvaluationPairs:
    """One set of the table by name."""
    make = build_avs_set if name in AVS_SETS else build_test_set
    paths = args.test_data_path, args.test_gt_path, args.metadata
    return make(name, *paths, image_size, audio_seconds, args.test_list, allow_missing)


def build_ground_truths(args) -> dict[str, GroundTruth]:
    """What the sets that --testset names ask for; their pictures and sounds need not be there."""

    def build(name: str) -> GroundTruth:
        if name in AVS_SETS:
            return build_avs_truth(
                name, args.test_data_path, args.test_gt_path, args.metadata, args.test_list, args.allow_missing
            )
        return build_ground_truth(name, args.test_data_path, args.test_gt_path, args.metadata, args.test_list)

    return build_each(args, build)


def build_each(args, build: Callable) -> dict:
    """Every named set; for `all` those whose data are there, the others named with the reason."""
    built, names = {}, parse_testsets(args.testset)
    if args.test_gt_path and len(names) == 1 and names[0] in AVS_SETS and AVS_SETS[names[0]].kind == "masks":
        raise UserError(f"--test_gt_path does not apply to {names[0]}: its masks lie below the data's root")
    for name in names:
        try:
            built[name] = build(name)
        except Absent as error:
            if args.testset != "all":
                raise
            print(f"left out: {name} ({error})")
    if not built:
        raise UserError("--testset all: the data of no test set are there")
    return built
