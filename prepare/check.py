"""Are the data of a set complete, whole and apart from the tests? The work of `prepare_data.py check`."""

from pathlib import Path

from dataset import TRAIN_SETS, EvaluationPairs, select_training_pairs
from inspection import SHORT_SECONDS, annotation_problems, check_table, inspect_pairs, overlap_with_tests
from scoring.metrics import MAP_SIZE
from sets import ALL_SETS, build_each, build_pairs
from utils import Absent, UserError, number


def add_flags(parser) -> None:
    parser.add_argument("--trainset", choices=sorted(TRAIN_SETS), help="training set to check")
    parser.add_argument("--testset", help=f"test set to check: {', '.join(ALL_SETS)}, a comma list, or all")
    parser.add_argument("--train_data_path", help="root of the training data (default: the set's environment variable)")
    parser.add_argument("--test_data_path", help="root of the test data (default: the set's environment variable)")
    parser.add_argument("--train_list", help="list of training ids in the place of the set's own")
    parser.add_argument("--test_list", help="list of test ids in the place of the set's own")
    parser.add_argument("--test_gt_path", help="annotation: a JSON of boxes, for flickr the folder of XML files")
    parser.add_argument("--metadata", default="./metadata", help="folder of the public lists and annotations")
    parser.add_argument("--workers", type=number(int, low=0), default=2, help="processes that decode")


def run(args) -> None:
    if bool(args.trainset) == bool(args.testset):
        raise UserError("say what to check: --trainset NAME or --testset NAME")
    if args.trainset:
        paths = args.train_data_path, args.metadata, args.train_list
        selection = select_training_pairs(args.trainset, *paths, allow_missing=True)
        overlap = overlap_with_tests([pair.id for pair in selection.pairs] + selection.missing, args.metadata)
        facts = inspect_pairs(selection.pairs, args.workers)
        name, expected = f"training set {args.trainset}", selection.expected
        print(check_table(name, expected, selection.pairs, selection.missing, facts, {}, overlap))
        give_verdict(bool(selection.missing) or any(fact.error for fact in facts))
        return

    def build(name: str) -> EvaluationPairs:
        try:
            return build_pairs(name, args, MAP_SIZE, SHORT_SECONDS, allow_missing=True)
        except Absent:
            raise
        except UserError:
            found = {what: count for what, count in problems_of(name, args).items() if count}
            print("".join(f"test set {name}: {count} boxes {what}\n" for what, count in found.items()), end="")
            raise

    wanting = False
    for name, dataset in build_each(args, build).items():
        problems = problems_of(name, args)
        facts = inspect_pairs(dataset.pairs, args.workers, dataset.ground_truth.truth_of)
        expected = dataset.ground_truth.expected
        print(check_table(f"test set {name}", expected, dataset.pairs, dataset.missing, facts, problems, {}) + "\n")
        wanting |= bool(dataset.missing) or any(fact.error for fact in facts)
    give_verdict(wanting)


def give_verdict(wanting: bool) -> None:
    """One last line, and exit status 1 where pairs are missing or broken, so that a script can ask."""
    print("not complete: pairs are missing or broken" if wanting else "complete: every pair is there and decodes")
    if wanting:
        raise SystemExit(1)


def problems_of(name: str, args) -> dict[str, int]:
    """`annotation_problems` of a test set's own annotation, or of the one given."""
    row = ALL_SETS[name]
    folder = Path(args.test_data_path or row.root) if row.lists_in_root else Path(args.metadata)
    path = args.test_gt_path or (row.annotation and folder / row.annotation)
    return annotation_problems(row, Path(path)) if path else {}
