"""The printed table of results: what it shows, in which order, in percent."""

import reports.table as report


def results():
    scores = {"cIoU": 0.852, "AUC": 0.6526, "cIoU_half": 0.41, "AUC_half": 0.4, "mean_iou": 0.5, "mAP": float("nan")}
    recalls = {"R@1": 0.125, "R@5": 0.5, "R@10": 1.0}
    return {
        "testset": "vggss",
        "maps": {"IQR": scores, "AUD": scores | {"listening": -0.004, "empty": 2}, "AUD_wrong": scores},
        "references": {"ceiling": {"cIoU": 1.0, "cIoU_half": 0.505}, "centred_disc": {"cIoU": 0.34}},
        "retrieval": {"by_pair": {"image_to_audio": recalls, "audio_to_image": recalls}},
        "pairs": {"scored": 5100, "expected": 5158, "left_out": ["a", "b"]},
        "checkpoint": {"path": "demo.pth", "epoch": 12, "selected_by": "validation recall"},
        "settings": {"alpha": 0.6, "interpolation": "bicubic"},
    }


def test_the_table_orders_maps_and_prints_percent():
    lines = report.results_table(results()).splitlines()
    starts = [line.split("  ")[0] for line in lines]
    order = ["AUD", "AUD_wrong", "IQR", "ceiling", "centred disc"]
    assert [start for start in starts if start in order] == order
    aud = lines[starts.index("AUD")]
    assert aud.split() == ["AUD", "85.2", "65.3", "41.0", "40.0", "-", "50.0", "-", "-"]
    assert "listening of AUD: -0.4" in "\n".join(lines)
    assert len({len(line) for line in lines if line.split("  ")[0] in order}) == 1, "columns are not aligned"
    text = "\n".join(lines)
    assert "IIoU" not in text
    for piece in (
        "R@10 100.0",
        "R@1  12.5",
        "5,100 of 5,158 pairs scored, 2 left out",
        "demo.pth, epoch 12",
        "alpha 0.6",
        "2 pairs",
    ):
        assert piece in text


def test_the_table_shows_interactive_columns_only_where_they_exist():
    with_pairs = results()
    with_pairs["maps"]["AUD"] = with_pairs["maps"]["AUD"] | {"IIoU": 0.2, "both_pointing": 0.3}
    heads = [line for line in report.results_table(with_pairs).splitlines() if line.startswith("map ")]
    assert "IIoU" in heads[1] and "both_pointing" in heads[1] and "IAUC" not in heads[1] and len(heads) == 2


def test_the_table_shows_intervals_where_they_are_known():
    known = results() | {"intervals": {"AUD": {"cIoU": [0.81, 0.89], "listening": [-0.02, 0.01]}}}
    text = report.results_table(known)
    assert "81.0 to 89.0" in text and "listening of AUD: -0.4 (-2.0 to 1.0)" in text


def test_the_table_shows_the_last_epoch_beside_the_selected_one():
    last = {"epoch": 12, "maps": results()["maps"]}
    assert "last epoch: 12, the selected one" in report.results_table(results() | {"last_epoch": last})
    other = report.results_table(results() | {"last_epoch": last | {"epoch": 20}})
    assert "last epoch: 20, IQR cIoU 85.2, pointing -; AUD cIoU 85.2" in other


def test_the_table_says_how_much_was_trained_on():
    parts = {"images": 7157, "audio": 7160, "same_video": 375}
    text = report.results_table(results() | {"training_test_overlap": 8096, "training_test_overlap_of": parts})
    assert "trained on: 8,096 (the image of 7,157, the audio of 7,160, and 375 of the same video as a train" in text
    parts = {"images": 0, "audio": 0, "same_video": 0}
    text = report.results_table(results() | {"training_test_overlap": 2820, "training_test_overlap_of": parts})
    assert "pairs that were trained on: 2,820\n" in text


def test_a_threshold_of_images_of_another_size_is_told():
    chosen = {"value": 0.25, "rule": "r", "pairs": 9, "pairs_from": "p", "offscreen": "o", "infer_image_size": 384}
    known = results()
    known["checkpoint"]["threshold"] = chosen
    for size, told in ((384, False), (224, True)):
        known["settings"]["infer_image_size"] = size
        assert ("chosen on images of 384 px, not 224" in report.results_table(known)) == told
    del chosen["infer_image_size"]  # older code did not note it
    assert "0.2500" in report.results_table(known) and "384" not in report.results_table(known)


def test_the_table_tolerates_missing_parts():
    for missing in ("references", "retrieval", "pairs", "checkpoint", "settings"):
        partial = {key: value for key, value in results().items() if key != missing}
        assert "85.2" in report.results_table(partial)
    assert "tie at the cut" in report.results_table({"testset": "x", "maps": {"AUD": {"tied_half": 3}}})
