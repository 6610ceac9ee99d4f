#!/usr/bin/env bash
# Measures everything on a quiet machine, piece by piece, writes benchmarks/results/report.html and the README's tables.
#   benchmarks/run_all.sh MACHINE [PIECE...]
# A piece writes benchmarks/results/MACHINE-PIECE.json; without a PIECE all are run, each in a process of its own: the
# others go on where one fails. The piece "quick", which is none of them, is all of --benchmark-quick in one process.
# BENCHMARK_OPTIONS go to pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

declare -A pieces=(
    [matching]="bench_matching.py bench_matching_cost.py bench_loss.py"
    [assignment]="bench_assignment.py"
    [auction]="bench_auction.py"
    [attention]="bench_attention.py -k inference"
    [attention-training]="bench_attention.py -k training"
    [transformer]="bench_transformer.py -k inference"
    [transformer-training]="bench_transformer.py -k training"
    [layers]="bench_add_layer_norm.py bench_feed_forward.py"
    [masks]="bench_masks.py"
    [scaling]="bench_scaling.py"
)
# Benchmarks that no piece above has are pieces by their own names.
for file in benchmarks/bench_*.py; do
    name=$(basename "$file")
    case " ${pieces[*]} " in
        *" $name "*) ;;
        *) piece=${name#bench_} && piece=${piece%.py} && pieces[${piece//_/-}]=$name ;;
    esac
done

all=("${!pieces[@]}")
pieces[quick]="--benchmark-quick"

machine=${1:?usage: benchmarks/run_all.sh MACHINE [PIECE...], the pieces being: ${!pieces[*]}}
shift
mapfile -t all < <(printf '%s\n' "${all[@]}" | sort)
failed=()
for piece in "${@:-${all[@]}}"; do
    : "${pieces[$piece]:?no such piece: $piece}"
    read -ra arguments <<<"${pieces[$piece]}"
    files=() options=()
    for argument in "${arguments[@]}"; do
        case $argument in
            *.py) files+=("benchmarks/$argument") ;;
            *) options+=("$argument") ;;
        esac
    done
    # shellcheck disable=SC2086  # several options
    python -m pytest "${files[@]:-benchmarks/}" "${options[@]}" --benchmark --benchmark-max-time=0.3 ${BENCHMARK_OPTIONS:-} \
        -q --no-header --benchmark-results "benchmarks/results/$machine-$piece.json" || failed+=("$piece")
done
python -m detr_fast bench-report --output benchmarks/results/report.html --readme README.md || failed+=("bench-report")
echo "$((SECONDS / 60)) minutes and $((SECONDS % 60)) seconds altogether"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
