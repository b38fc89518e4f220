#!/usr/bin/env bash
# Start Ray on all nodes of a Slurm allocation, run a command as its driver, and end Ray when that ends.
# Usage, inside an allocation:  cluster/slurm.sh python -m neuronal_ray.prune --model .. --output ..
# The checkout, its .venv, models and outputs must be on storage that the nodes share.
set -euo pipefail

: "${SLURM_JOB_ID:?run this inside a Slurm allocation (sbatch or salloc)}"
if (($# == 0)); then
    echo "usage: $0 COMMAND [ARGUMENT..]" >&2
    exit 2
fi

# Ports and folders are this job's own: other jobs may run Ray on the same nodes.
base=$((20000 + (SLURM_JOB_ID % 240) * 50)) # below the range of ephemeral ports
sockets="/tmp/ray-${SLURM_JOB_ID}" # sockets need short paths
private="${NEURONAL_RAY_PRIVATE:-${SLURM_SUBMIT_DIR:-$PWD}}/.ray-${SLURM_JOB_ID}"

started=()
finish() {
    # srun ends its step on SIGTERM, and Slurm ends what the step started: this job's Ray and no other
    for step in "${started[@]}"; do kill "$step" 2>/dev/null || true; done
    wait || true
    rm -rf "$private"
    timeout 30 srun --nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 --overlap rm -rf "$sockets" || true
}
trap finish EXIT
trap 'exit 143' TERM INT

(umask 077 && mkdir -p "$private" && python3 -c 'import secrets; print(secrets.token_hex(32))' >"$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token" RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# `hostname --ip-address` would give the loopback address where /etc/hosts has the node's own name
head_ip=$(srun --nodes=1 --ntasks=1 --overlap --nodelist="${nodes[0]}" hostname --all-ip-addresses | awk '{print $1}')
head_ip="${NEURONAL_RAY_HEAD_IP:-$head_ip}" # for nodes with several networks
cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}"
gpus="${SLURM_GPUS_ON_NODE:-0}"
ports=(
    "--object-manager-port=$((base + 1))" "--node-manager-port=$((base + 2))"
    "--dashboard-agent-listen-port=$((base + 3))" "--dashboard-agent-grpc-port=$((base + 4))"
    "--runtime-env-agent-port=$((base + 5))" "--metrics-export-port=$((base + 6))"
    --min-worker-port=0 --max-worker-port=0 # any free ports: Ray's default range is the same for every Ray on a node
)

start() { # NODE, then arguments of `ray start`
    local node=$1
    shift
    # a step gets one core by default: Slurm no longer passes on the allocation's --cpus-per-task
    srun --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --overlap --nodelist="$node" \
        ray start --block --num-cpus="$cpus" --num-gpus="$gpus" "${ports[@]}" "$@" >"$private/ray-$node.log" 2>&1 &
    started+=("$!")
}

start "${nodes[0]}" --head --node-ip-address="$head_ip" --port="$base" --dashboard-host=127.0.0.1 \
    --dashboard-port="$((base + 7))" --ray-client-server-port="$((base + 8))" --temp-dir="$sockets"
for node in "${nodes[@]:1}"; do start "$node" --address="$head_ip:$base"; done

export RAY_ADDRESS="$head_ip:$base"
for attempt in $(seq 60); do
    alive=$(python3 -c 'import ray; ray.init(log_to_driver=False); print(sum(n["Alive"] for n in ray.nodes()))' \
        2>/dev/null || echo 0)
    if ((alive >= ${#nodes[@]})); then break; fi
    if ((attempt == 60)); then
        echo "$0: ${alive} of ${#nodes[@]} nodes joined; the last lines of their logs:" >&2
        tail -n 20 "$private"/ray-*.log >&2
        exit 1
    fi
    sleep 5
done
echo "$0: Ray runs on ${#nodes[@]} nodes, ${gpus} GPUs each" >&2

"$@" &
driver=$!
trap 'kill -TERM "$driver" 2>/dev/null; wait "$driver" || true; exit 143' TERM INT
wait "$driver"
