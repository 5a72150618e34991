#!/usr/bin/env bash
# The second base in one run of at most twelve minutes on one large GPU, by the clock; with TOY=1 the same steps in small, on a CPU.
#
#   python tools/pretrain_render.py drawings.json.xz nbs/pretrain/node_modules     # where the artwork is: 10 MB that travel
#   bash tools/pretrain_gpu.sh drawings.json.xz OUT                                # where the GPU is
#   bash tools/pretrain_gpu.sh join OUT FOLDER                                     # back home: the pieces become folders
#
# What must travel: the checkout without stylelora/assets/{base,scorer_clip,evaluator}, the packed drawings, wheels of what
# the machine lacks (WHEELS=folder; installed without an index), and an autoencoder to go on from, if there is one
# (VAE=folder below the checkout). What comes back: OUT/base128.tar.00 and on, of at most 15 MiB each, and OUT/log.txt.
#
# While the pictures are rendered, the networks are tried in small on the same device, so a fault shows in the first minute.
# UNTIL is the last second of training, counted from the start; WIDTH, BATCH and the seconds of the other networks are
# parameters too (environment variables).
set -euo pipefail
if [ "$1" = join ]; then mkdir -p "$3"; cat "$2"/base128.tar.* | tar -x -C "$3"; ls "$3"; exit; fi
BEGIN=$(date +%s); ART=$(realpath "$1"); mkdir -p "$2"; OUT=$(realpath "$2"); cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" MPLBACKEND=agg PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
PY=${PY:-python3}; W=${WORK:-$(mktemp -d)}; S=$W/store
exec > >(tee "$OUT/log.txt") 2>&1
say() { echo "== $* ($(($(date +%s) - BEGIN)) s)"; }
stop() { for p in $(pgrep -P "$1" || true); do stop "$p"; done; if [ "$1" != $$ ]; then kill "$1" 2> /dev/null || true; fi; }
trap 'c=$?; if [ $c != 0 ]; then say failed; stop $$; fi' EXIT
if [ -n "${TOY:-}" ]; then
  SIZE=64 DEVICE=cpu JOBS=2 MOST=6 AHEAD=1 WIDTH=${WIDTH:-[32, 32, 64]} BATCH=${BATCH:-8} MANY=8 PAIRS=4 STYLES=4 AE=4 SMALL=4
  TIME="seconds=6" GATES="concepts=4 cells_each=4 steps=3"
else
  SIZE=128 DEVICE=cuda JOBS=${JOBS:-16} MOST=0 AHEAD=4 WIDTH=${WIDTH:-[64, 128, 192]} BATCH=${BATCH:-512} MANY=256 PAIRS=128
  STYLES=48 AE=${AE:-130} SMALL=${SMALL:-70} TIME="until=$((BEGIN + ${UNTIL:-600}))"
  GATES="concepts=300 cells_each=128 steps=50"
fi
if [ -n "${WHEELS:-}" ]; then
  $PY -m pip install -q --no-index --no-deps --target "$W/site" "$WHEELS"/*.whl; export PYTHONPATH="$PYTHONPATH:$W/site"
fi

run() { # notebook, folder of its store, further parameters
  local nb=$1 store=$2; shift 2; say "$nb"
  $PY tools/pretrain.py "$PWD/nbs/pretrain/$nb.ipynb" plain=1 budget=second size=$SIZE store="$store" device=$DEVICE threads=0 \
    ahead=$AHEAD "$@" 2>&1 | tr '\r' '\n' | { grep -v 'img/s\|^$' || true; } || return 1
  say "$nb done"
}
autoencoder() { run 06_autoencoder "$1/store" "start_from=${VAE:-}" anchor_from= lr=1e-3 batch=$MANY folder="$1/ae" save_to="$1/vae" "${@:2}"; }
clip() { run 07_clip "$1/store" folder="$1/clip_run" save_to="$1/scorer_clip" "${@:2}"; }
evaluator() { run 08_evaluator "$1/store" batch=$MANY images=2000000 folder="$1/evaluator_run" save_to="$1/evaluator" "${@:2}"; }
styles() { run 09_styles "$1/store" images=2000000 styles_per_batch=$STYLES folder="$1/styles_run" save_to="$1/styles" "${@:2}"; }
unet() {
  run 10_unet "$1/store" start_from= "channels=$WIDTH" batch=$BATCH copies=3 lr=1e-3 hold=0.4 weight=min_snr save_every=150 \
    images=20000000 vae_from="$1/vae" clip_from="$1/scorer_clip" folder="$1/unet" save_to="$1/base" "${@:2}"
  tail -n 1 "$1/unet/log.jsonl"
}
both() { local bad=0; wait "$1" || bad=1; wait "$2" || bad=1; return $bad; } # fails where one of them failed

say "rendering, and a trial in small"
$PY tools/pretrain_render.py "$S" "$ART" size=$SIZE jobs=$JOBS most=$MOST > "$OUT/render.txt" 2>&1 & RENDER=$!
T=$W/trial; mkdir -p "$T"; $PY tools/pretrain_render.py "$T/store" "$ART" size=$SIZE jobs=2 most=6 > /dev/null
evaluator "$T" seconds=3 & E=$!
styles "$T" seconds=3 & Y=$!
autoencoder "$T" seconds=3
clip "$T" concepts_per_batch=4 seconds=3
both $E $Y
unet "$T" seconds=5
say "the trial passed"
done_share() { $PY -c "import numpy, sys; print(int(100 * (numpy.load(sys.argv[1]) > 0).mean()))" "$S/done-$SIZE.npy"; }
while [ "$(done_share)" -lt 35 ] && kill -0 $RENDER 2> /dev/null; do sleep 2; done
autoencoder "$W" seconds=$AE & A=$!
wait $RENDER; say "rendered"
clip "$W" concepts_per_batch=$PAIRS seconds=$SMALL & C=$!
evaluator "$W" seconds=$((SMALL * 3 / 2)) & E=$!
styles "$W" seconds=$SMALL & Y=$!
both $A $C
unet "$W" "$TIME"
both $E $Y || say "a scorer failed, the rest comes back"
run 11_gates "$S" base="$W/base" evaluator_from="$W/evaluator" write_to="$W/gates" $GATES || say "no gates, the rest comes back"
for log in "$W"/*/log.jsonl; do cp "$log" "$W/$(basename "$(dirname "$log")").jsonl"; done
for look in "$W"/unet/eval-*.json "$W"/ae/eval-*.json; do cp "$look" "$W/$(basename "$(dirname "$look")")-$(basename "$look")"; done
(cd "$W" && tar -c base scorer_clip $(ls -d evaluator styles gates ./*.json ./*.jsonl 2> /dev/null)) | split -b 15M -d - "$OUT/base128.tar."
ls -l "$OUT"; say "done"
