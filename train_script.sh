#!/usr/bin/env bash
# bash train_script.sh TRAINSET TESTSET GPU [NAME] [further flags of train_slot.py]
#
#   TRAINSET  vggss_10k vggss_144k vggss_heard flickr_10k flickr_144k synthetic custom; vggss, flickr: all pairs found
#   TESTSET   vggss vggss_heard vggss_unheard flickr vggss_plus_silent flickr_plus_silent s4 ms3 s4_box ms3_box is3 is3_seg
#             vpo_ss vpo_ss_seg vpo_ms vpo_ms_seg synthetic synthetic_distractor synthetic_interactive
#             synthetic_offscreen custom, several with commas, or all: every one whose data are present
#   GPU       number of a CUDA device, or cpu
#   NAME      folder below checkpoints/ (default: TRAINSET)
#
# Thin words for flags, in front of the command:
#   PROCESSES=4          as many processes on this machine, one GPU each
#   OBJECTIVE=listen     --objective listen: maps that follow the audio; or maxpool
#   ABLATION=no_match|no_div|no_recon|no_false_negatives|no_mask|one_slot     leaves one part of the method out
#   SEEDS="0 1 2"        --seed, one training each
# The last three end the folder's name, NAME_listen_no_div_seed1. One table of all, with differences to the first:
#   python test_model.py --compare checkpoints/NAME_{seed,[^s]}*/results/SET/results.json
#
# Nobody edits this file to say where data lie: set these variables, in your shell or in front of the command.
export VGGSOUND_ROOT="${VGGSOUND_ROOT:-/path/to/VGGSound/}"      # holds frames/ and audio/
export FLICKR_ROOT="${FLICKR_ROOT:-/path/to/Flickr/}"            # holds frames/ and audio/, or Data/; and Annotations/
export AVSBENCH_ROOT="${AVSBENCH_ROOT:-/path/to/AVSBench/}"      # holds s4_data/ and ms3_data/, or s4/ and ms3/
export IS3_ROOT="${IS3_ROOT:-/path/to/IS3/}"                    # holds images/ or visual_frames/, audio_wav/, gt_masks/
export VPO_ROOT="${VPO_ROOT:-/path/to/VPO/}"                    # the same with gray_masks/, or COCO_AV/ and COCO_AV_MS/
export CUSTOM_ROOT="${CUSTOM_ROOT:-/path/to/pairs/}"             # your own frames/ and audio/
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # on few cores, threads that spin take time from the loader processes
set -euo pipefail
cd "$(dirname "$0")"

refuse() {
    echo "$1" >&2
    exit 2
}

if [ $# -lt 3 ]; then
    sed -n '2,18s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
trainset=$1 testset=$2 gpu=$3
name=$trainset
shift 3
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    name=$1
    shift
fi

python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi

flags=() # hyper-parameters stand in recipes.py, by training set and objective
case ${OBJECTIVE:=paper} in
    paper) ;;
    listen | maxpool)
        flags+=(--objective "$OBJECTIVE")
        name=${name}_$OBJECTIVE
        ;;
    *) refuse "OBJECTIVE=$OBJECTIVE: choose paper, listen or maxpool" ;;
esac
case ${ABLATION:=} in
    "") ;;
    no_match) flags+=(--lam3 0) ;;
    no_div) flags+=(--lam2 0) ;;
    no_recon) flags+=(--lam1 0) ;;
    no_false_negatives) flags+=(--reciprocal_k 0) ;;
    no_mask) flags+=(--mask_ratio 0) ;;
    one_slot) flags+=(--num_slots 1) ;;
    *) refuse "ABLATION=$ABLATION: choose no_match, no_div, no_recon, no_false_negatives, no_mask or one_slot" ;;
esac
case $OBJECTIVE-$trainset-$ABLATION in
    listen-*-no_match | listen-*-one_slot | maxpool-*-no_*)
        refuse "OBJECTIVE=$OBJECTIVE has no part that ABLATION=$ABLATION could leave out" ;;
    *-synthetic-no_false_negatives)
        refuse "the recipe of synthetic has no false-negative rule to leave out: compare it with --reciprocal_k 5" ;;
esac
if [ "$OBJECTIVE$ABLATION" != paper ]; then # the user's flags come last and would undo what the name says
    for word in "$@"; do
        case ${word%%=*} in --objective | --weights | --lam[123] | --reciprocal_k | --mask_ratio | --num_slots)
            refuse "OBJECTIVE=$OBJECTIVE ABLATION=$ABLATION and $word do not go together: give all of it as flags" ;;
        esac
    done
fi
name=$name${ABLATION:+_$ABLATION}

# A training ends by printing the test_model.py command for what it made.
command=("$python")
if [ -n "${PROCESSES:-}" ]; then command+=(-m torch.distributed.run --standalone --nproc_per_node "$PROCESSES"); fi
command+=(train_slot.py --trainset "$trainset" --testset "$testset" --gpu "$gpu" ${flags[@]+"${flags[@]}"})
if [ -z "${SEEDS:-}" ]; then
    exec "${command[@]}" --experiment_name "$name" "$@" # a signal to this script is one to the training
fi
trap 'kill -TERM "$child"; wait "$child"; exit 143' TERM INT
for seed in $SEEDS; do
    "${command[@]}" --experiment_name "${name}_seed$seed" "$@" --seed "$seed" &
    child=$!
    wait "$child"
done
