#!/usr/bin/env bash
# What is too long for every change: the model for as long as it may take, the soak tests, the planted mistakes. Every part
# runs whatever became of the others; the figures come last.
#
#   tools/nightly.sh              an hour of the model
#   tools/nightly.sh MINUTES      another time of it
set -uo pipefail
cd "$(dirname "$0")/.."

minutes=${1:-60}
case $minutes in
    '' | *[!0-9]*)
        echo "tools/nightly.sh: '$minutes' is no number of minutes" >&2
        exit 2
        ;;
esac
logs=$(mktemp -d "${TMPDIR:-/tmp}/foliant-nightly.XXXXXX")
figures=$logs/figures
failed=0

# part NAME COMMAND...: runs it, keeps what it prints, and notes how it ended and how long it took.
part() {
    local name=$1 began=$SECONDS result=passed
    shift
    printf '\n== %s\n' "$name"
    if ! "$@" 2>&1 | tee "$logs/$name.log"; then
        result=FAILED
        failed=$((failed + 1))
    fi
    printf '%-10s %-7s %6ss   %s\n' "$name" "$result" "$((SECONDS - began))" "$logs/$name.log" >>"$figures"
}

# The model of the writeback contract, from a seed of this run's own; it prints its coverage.
part model env -u FOLIANT_SEED -u FOLIANT_RUNS FOLIANT_MINUTES="$minutes" \
    cargo test --locked -p foliant-tests --test model -- --nocapture
# Threads on one engine, from a seed that they print, and every test that is marked ignored because it takes long and named soak.
part threads env FOLIANT_SEED="$RANDOM" cargo test --locked --release -p foliant-tests --test threads -- --nocapture
# Pins, writes, discards, hints and resizes from eight threads at once, for ten minutes.
part pins env FOLIANT_SEED="$RANDOM" FOLIANT_SOAK_SECONDS=600 \
    cargo test --locked --release -p foliant-tests --test soak -- --nocapture
part soak cargo test --locked --release --workspace --exclude foliant-lab -- --ignored soak
part mutants tools/mutants.sh

printf '\n== figures\n'
cat "$figures"
grep -h '^[0-9]* runs; ' "$logs/model.log"
grep -h '^mutants: ' "$logs/mutants.log"
[ "$failed" -eq 0 ]
