#!/usr/bin/env bash
# The second base in one run of at most twelve minutes on one large GPU; with TOY=1 the same steps in small, on a CPU.
#
#   python tools/pretrain_render.py drawings.json.xz nbs/pretrain/node_modules     # where the artwork is: 12 MB that travel
#   bash tools/pretrain_gpu.sh drawings.json.xz OUT                                # where the GPU is
#   bash tools/pretrain_gpu.sh join OUT FOLDER                                     # back home: the pieces become folders
#
# What must travel: the checkout without stylelora/assets/{base,scorer_clip,evaluator}, the packed drawings, and wheels of
# what the machine lacks (WHEELS=folder; installed without an index). What comes back: OUT/base128.tar.00 and on, of at most
# 15 MiB each, and OUT/log.txt. Every network has its seconds, so the run lands whatever the card; WIDTH, BATCH and the
# seconds are parameters (environment variables).
set -euo pipefail
if [ "$1" = join ]; then mkdir -p "$3"; cat "$2"/base128.tar.* | tar -x -C "$3"; ls "$3"; exit; fi
ART=$(realpath "$1"); mkdir -p "$2"; OUT=$(realpath "$2"); cd "$(dirname "$0")/.."
PY=${PY:-python3}; export PYTHONPATH="$PWD" MPLBACKEND=agg PYTHONUNBUFFERED=1
exec > >(tee "$OUT/log.txt") 2>&1
if [ -n "${WHEELS:-}" ]; then $PY -m pip install --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl; fi
if [ -n "${TOY:-}" ]; then
  SIZE=64 DEVICE=cpu JOBS=2 MOST=6 WIDTH="[32, 32, 64]" BATCH=8 COPIES=2 GATES="concepts=4 cells_each=4 steps=3"
  AE=4 CLIP=4 EVAL=4 STYLES=4 UNET=6 PAIRS=4
else
  SIZE=128 DEVICE=cuda JOBS=${JOBS:-16} MOST=0 WIDTH=${WIDTH:-[64, 128, 256]} BATCH=${BATCH:-512} COPIES=3
  GATES="concepts=300 cells_each=128 steps=50" PAIRS=128
  AE=${AE:-130} CLIP=${CLIP:-45} EVAL=${EVAL:-45} STYLES=${STYLES:-30} UNET=${UNET:-210}
fi
W=${WORK:-$(mktemp -d)}; S=$W/store
run() { local nb=$1; shift; echo "== $nb $(date +%T)"
  $PY tools/pretrain.py "$PWD/nbs/pretrain/$nb.ipynb" plain=1 budget=second size=$SIZE store="$S" device=$DEVICE threads=0 "$@"; }
echo "== store $(date +%T)"; $PY tools/pretrain_render.py "$S" "$ART" size=$SIZE jobs=$JOBS most=$MOST
run 06_autoencoder anchor_from= seconds=$AE batch=$((BATCH < 256 ? BATCH : 256)) lr=1e-3 folder="$W/ae" save_to="$W/vae"
run 07_clip seconds=$CLIP concepts_per_batch=$PAIRS folder="$W/clip_run" save_to="$W/scorer_clip"
run 08_evaluator seconds=$EVAL folder="$W/evaluator_run" save_to="$W/evaluator"
run 09_styles seconds=$STYLES folder="$W/styles_run" save_to="$W/styles"
run 10_unet start_from= seconds=$UNET "channels=$WIDTH" batch=$BATCH copies=$COPIES lr=1e-3 weight=min_snr vae_from="$W/vae" \
  clip_from="$W/scorer_clip" folder="$W/unet" save_to="$W/base"
run 11_gates base="$W/base" evaluator_from="$W/evaluator" write_to="$W/gates" $GATES
for log in "$W"/*/log.jsonl; do cp "$log" "$W/$(basename "$(dirname "$log")").jsonl"; done
tar -c -C "$W" base scorer_clip evaluator styles gates $(cd "$W" && ls *.jsonl) | split -b 15M -d - "$OUT/base128.tar."
ls -l "$OUT"; echo "== done $(date +%T)"
