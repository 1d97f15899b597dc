#!/usr/bin/env bash
# Two hosts on one Linux machine: two network namespaces joined by a veth pair, one rank of a ZeRO-3 run in each.
#
#     sudo benchmarks/two_hosts.sh [CONFIG]        CONFIG: zero3_cpu2 (default), zero2_cpu2 or ddp_cpu2
#
# First two ranks on one host make three updates and record their episodes; then one rank on each of two hosts makes
# three updates on the recording. The weights must be the same, byte for byte. Everything is removed afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
config=$(trl-steppo config "${1:-zero3_cpu2}")
work=$(mktemp -d)
hosts=(steppo-host0 steppo-host1)

clean_up() {
    for host in "${hosts[@]}"; do
        ip netns pids "$host" 2>/dev/null | xargs -r kill -9 || true
        ip netns del "$host" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap clean_up EXIT

for host in "${hosts[@]}"; do
    ip netns add "$host"
    ip -n "$host" link set lo up
done
ip link add veth0 netns "${hosts[0]}" type veth peer name veth1 netns "${hosts[1]}"
for number in 0 1; do
    ip -n "${hosts[$number]}" addr add "10.77.0.$((number + 1))/24" dev "veth$number"
    ip -n "${hosts[$number]}" link set "veth$number" up
done

export OMP_NUM_THREADS=1
export DS_ENV_FILE="$work/deepspeed_env" # the launcher writes its whole environment there, or else into the repository
run=(examples/hotpotqa_steppo.py --total_episodes 48 --per_device_train_batch_size 8 --num_mini_batches 1
     --critic_warmup_updates 0 --eval_strategy no --eval_on_start false --num_sample_generations 0 --disable_tqdm true
     --use_cpu true --bf16 false)

echo "two ranks on one host"
accelerate launch --config_file "$config" "${run[@]}" \
    --output_dir "$work/one" --dump_episodes_dir "$work/episodes" > "$work/one.log" 2>&1 || { tail -n 40 "$work/one.log"; exit 1; }

echo "one rank on each of two hosts"
pids=()
for number in 0 1; do
    ip netns exec "${hosts[$number]}" env GLOO_SOCKET_IFNAME="veth$number" \
        accelerate launch --config_file "$config" --num_machines 2 --machine_rank "$number" --num_processes 2 \
        --main_process_ip 10.77.0.1 --main_process_port 29555 "${run[@]}" \
        --output_dir "$work/two" --replay_episodes_dir "$work/episodes" > "$work/two$number.log" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    wait "$pid" || { tail -n 40 "$work"/two?.log; exit 1; }
done

for file in model.safetensors critic/model.safetensors; do
    cmp "$work/one/$file" "$work/two/$file"
    sha256sum "$work/two/$file" | sed "s|$work/||"
done
echo "the weights of both runs are the same"
