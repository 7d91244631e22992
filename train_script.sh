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
#   PROCESSES=4                                                             so many on this machine, one GPU each
#   OBJECTIVE=paper|listen    listen: each sound gets a map of its own where several things are in view
#   ABLATION=no_match|no_div|no_recon|no_false_negatives|no_mask|one_slot   leaves one part of the method out
#   SEEDS="0 1 2"                                                           one training each
# The last three end the folder's name, NAME_listen_no_div_seed1; one table of all, differences to the first:
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
    sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
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

# Hyper-parameters, once for each kind of training set. What is not named here is the paper's value, train_slot.py's default.
case $trainset in
    *_144k | vggss_heard) recipe=(--epochs 50 --infer_sharpening 1.0) ;;
    synthetic)
        recipe=(--arch small --imagenet_weights none --image_size 112 --audio_seconds 1.6 --augment plain
            --epochs 10 --batch_size 64 --lr 1e-3 --lr_warmup 0.06 --lr_schedule cosine --clip 5
            --tau 0.05 --iterations 3 --reciprocal_k 0 --infer_sharpening 0.02 --eval_every 0) ;;
    *) recipe=(--epochs 100) ;;
esac

case ${OBJECTIVE:=paper} in
    paper) ;;
    listen)
        recipe+=(--share_contrast 1 --foreign_claims 4 --lam3 0 --infer_sharpening 0.1 --infer_smoothing 0.1)
        name=${name}_listen
        for word in "$@"; do # they would undo it, and the name would not say so
            case ${word%%=*} in --share_contrast | --foreign_claims | --lam3 | --num_slots | --foreign_tokens | --objective)
                refuse "OBJECTIVE=listen and $word do not go together: listen is --share_contrast 1 --foreign_claims 4 --lam3 0" ;;
            esac
        done
        ;;
    *)
        refuse "OBJECTIVE=$OBJECTIVE: choose paper or listen (max-pool contrast: --objective maxpool_contrastive)"
        ;;
esac

case ${ABLATION:=} in
    "") ;;
    no_match)
        [ "$OBJECTIVE" = paper ] || refuse "OBJECTIVE=listen has no attention matching to leave out"
        recipe+=(--lam3 0)
        ;;
    no_div) recipe+=(--lam2 0) ;;
    no_recon) recipe+=(--lam1 0) ;;
    no_false_negatives)
        if [ "$trainset" = synthetic ]; then
            refuse "the synthetic recipe leaves no false negatives out to begin with: compare it with --reciprocal_k 5"
        fi
        recipe+=(--reciprocal_k 0)
        ;;
    no_mask) recipe+=(--mask_ratio 0) ;;
    one_slot)
        [ "$OBJECTIVE" = paper ] || refuse "OBJECTIVE=listen needs a second slot, which takes what the sound does not claim"
        recipe+=(--num_slots 1)
        ;;
    *)
        refuse "ABLATION=$ABLATION: choose no_match, no_div, no_recon, no_false_negatives, no_mask or one_slot"
        ;;
esac
if [ -n "$ABLATION" ]; then # the user's flags come last and would undo it
    for word in "$@"; do
        case ${word%%=*} in --lam1 | --lam2 | --lam3 | --reciprocal_k | --mask_ratio | --num_slots | --objective)
            refuse "ABLATION=$ABLATION and $word do not go together: the name would not say what was trained" ;;
        esac
    done
fi
name=$name${ABLATION:+_$ABLATION}

# A training ends by printing the test_model.py command for what it made.
command=("$python")
if [ -n "${PROCESSES:-}" ]; then command+=(-m torch.distributed.run --standalone --nproc_per_node "$PROCESSES"); fi
command+=(train_slot.py --trainset "$trainset" --testset "$testset" --gpu "$gpu" "${recipe[@]}")
if [ -z "${SEEDS:-}" ]; then
    exec "${command[@]}" --experiment_name "$name" "$@" # a signal to this script is one to the training
fi
trap 'kill -TERM "$child"; wait "$child"; exit 143' TERM INT
for seed in $SEEDS; do
    "${command[@]}" --experiment_name "${name}_seed$seed" "$@" --seed "$seed" &
    child=$!
    wait "$child"
done
