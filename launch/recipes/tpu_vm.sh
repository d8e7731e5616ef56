#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or several that are joined: bash launch/recipes/tpu_vm.sh ACTION
#   create   one slice, at once or not at all       queue    SLICES slices, when there is room    state   of that
#   install  Python, the checkout and the shared disk on all workers
#   train    starts a run; resume: goes on with it  log      of worker 0
#   stop     saves and ends the run                 delete   the slices
set -euo pipefail

# Placeholders.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-central1-a}
NAME=${NAME:-cocoedit}
TYPE=${TYPE:-v5litepod-16}           # launch.bench_sharding --topology takes the same name
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
SLICES=${SLICES:-1}
SPOT=${SPOT:-}                       # --spot: cheaper, and may be taken away at any time
REPOSITORY=${REPOSITORY:-https://git.example.org/cocoedit-jax.git}
NFS=${NFS:-10.0.0.2:/share}          # a disk that all workers see, such as Filestore
JUDGE=${JUDGE:-http://judge.example.org:8000/v1}
CHIPS=${CHIPS:-16}                   # of one slice, as devices: two on each chip of tpu7x

SHARED=/mnt/shared
per_step=$((CHIPS * SLICES)) # must divide the 288 samples of a step, or name another configuration
place=(--project="$PROJECT" --zone="$ZONE")
nodes=("$NAME")
if [ "$SLICES" -gt 1 ]; then
    nodes=()
    for ((i = 0; i < SLICES; i++)); do nodes+=("$NAME-$i"); done # as --node-prefix names them
fi

on_all() {
    for node in "${nodes[@]}"; do
        gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1"
    done
}

train() {
    # A unit of systemd outlives the connection, and is sent SIGTERM when it is stopped or the machine is.
    on_all "sudo systemd-run --unit=cocoedit --collect --uid=\$(id -u) --working-directory=\$HOME/cocoedit \
--property=KillMode=mixed --property=TimeoutStopSec=1200 --setenv=HOME=\$HOME \
--setenv=JAX_COMPILATION_CACHE_DIR=$SHARED/xla_cache --setenv=HF_HUB_CACHE=$SHARED/hub \
\$HOME/cocoedit/.venv/bin/python -m launch.train --distributed=on --config=configs/flux_kontext.py \
--run=$SHARED/runs/kontext $1 --config.data.path=$SHARED/data --config.judge.vlm.endpoints=$JUDGE \
--config.judge.vlm.key_file=$SHARED/judge_key --config.judge.vlm.cache_dir=$SHARED/judge_cache \
--config.mesh.layout=data_fsdp --config.mesh.fsdp=$CHIPS --config.rollout.batch_size=$per_step \
--config.train.micro_batch=$per_step --config.evaluation.batch_size=$per_step"
}

case ${1:-} in
create)
    gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" --accelerator-type="$TYPE" --version="$VERSION" \
        ${SPOT:+"$SPOT"}
    ;;
queue)
    names=(--node-id="$NAME")
    if [ "$SLICES" -gt 1 ]; then names=(--node-count="$SLICES" --node-prefix="$NAME"); fi
    gcloud compute tpus queued-resources create "$NAME" "${place[@]}" "${names[@]}" --accelerator-type="$TYPE" \
        --runtime-version="$VERSION" ${SPOT:+"$SPOT"}
    ;;
state) gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format="value(state.state)" ;;
install)
    # uv brings a Python of the version that is needed, whichever the image has.
    on_all "set -e; curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d \$HOME/cocoedit ] || git clone $REPOSITORY \$HOME/cocoedit
cd \$HOME/cocoedit && git pull --ff-only && \$HOME/.local/bin/uv venv --allow-existing --python 3.12
\$HOME/.local/bin/uv pip install -e '.[tpu]'
sudo apt-get install -q -y nfs-common && sudo mkdir -p $SHARED
mountpoint -q $SHARED || sudo mount -t nfs $NFS $SHARED"
    ;;
train) train "" ;;
resume) train --resume ;;
log) gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker=0 --command="journalctl -f -u cocoedit" ;;
stop) on_all "sudo systemctl stop --no-block cocoedit" ;;
delete)
    if gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" >/dev/null 2>&1; then
        gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet # with its slices
    else
        gcloud compute tpus tpu-vm delete "$NAME" "${place[@]}" --quiet
    fi
    ;;
*) sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
esac
