#!/usr/bin/env bash
# Shows that the tests can fail: applies each planted mistake of tests/mutants to a copy of the sources and runs the
# test that has to notice it. A patch that no longer applies or compiles, or that no test notices, is an error.
#
#   tools/mutants.sh            all of them
#   tools/mutants.sh --check    only whether all of them still apply
#   tools/mutants.sh NAME ...   only these (names of patches, without .patch)
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
work=$(mktemp -d "${TMPDIR:-/tmp}/foliant-mutants.XXXXXX")
trap 'rm -rf "$work"' EXIT

if [ "${1:-}" = --check ]; then
    stale=0
    for patch in tests/mutants/*.patch; do
        patch --quiet -p1 --fuzz=0 --dry-run <"$patch" >/dev/null || { echo "FAILED  $patch: no longer applies"; stale=1; }
    done
    [ $stale -eq 0 ] && echo "mutants: all apply"
    exit $stale
fi
if [ $# -gt 0 ]; then
    patches=("${@/%/.patch}")
    patches=("${patches[@]/#/tests/mutants/}")
else
    patches=(tests/mutants/*.patch)
fi

# A copy of what git would commit, uncommitted changes included.
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - 2>/dev/null | tar -C "$work" -xf -
# Dependencies that were built for the tests are used again.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$top/target}
noticed=0
failed=0
for patch in "${patches[@]}"; do
    name=$(basename "$patch" .patch)
    [ -f "$patch" ] || { echo "no such mutant: $patch" >&2; exit 2; }
    test=$(sed -n 's/^test: //p' "$patch")
    if ! (cd "$work" && patch --quiet -p1 --fuzz=0 --no-backup-if-mismatch --dry-run <"$top/$patch" >/dev/null); then
        echo "FAILED  $name: the patch no longer applies"
        failed=$((failed + 1))
        continue
    fi
    (cd "$work" && patch --quiet -p1 --fuzz=0 --no-backup-if-mismatch <"$top/$patch")
    log=$work/log
    case $test in
        loom_*) run=(env RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$CARGO_TARGET_DIR/loom" cargo test --release -p foliant --no-default-features --lib) ;;
        *) run=(cargo test -p foliant -p foliant-tests) ;;
    esac
    if ! (cd "$work" && "${run[@]}" --no-run >"$log" 2>&1); then
        echo "FAILED  $name: does not compile"
        tail -n 20 "$log"
        failed=$((failed + 1))
    elif (cd "$work" && timeout 300 "${run[@]}" --no-fail-fast "$test" >"$log" 2>&1); then
        echo "FAILED  $name: $test did not notice"
        failed=$((failed + 1))
    elif ! grep -q "^test .*$test.* FAILED\|^test .*$test" "$log"; then
        echo "FAILED  $name: there is no test $test"
        failed=$((failed + 1))
    else
        echo "noticed $name by $test"
        noticed=$((noticed + 1))
    fi
    (cd "$work" && patch --quiet -R -p1 --no-backup-if-mismatch <"$top/$patch")
done
echo "mutants: $noticed noticed, $failed failed"
[ "$failed" -eq 0 ]
