#!/usr/bin/env bash
# Shows that the tests can fail: applies each planted mistake of tests/mutants to a copy of the sources and runs the
# test that has to notice it. A patch that no longer applies or compiles, or that no test notices, is an error.
#
#   tools/mutants.sh            all of them
#   tools/mutants.sh --check    only whether all of them still apply, and whether each rule has one
#   tools/mutants.sh NAME ...   only these (names of patches, without .patch, or their beginnings: wb12)
#
# A patch of a rule is named wbNN-WHAT, and its test is one of that rule (wbNN_…), a protocol's model (loom_…), or the model
# of the whole contract, which names the rule that it finds broken. The table at the end says of each mistake, in the order of the rules, by which
# test it was noticed.
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD

# Rules of the contract that this engine keeps.
rules=$(grep '^| WB-' ARCHITECTURE.md | grep -v 'not there yet' | grep -o '^| WB-[0-9]*' | grep -o '[0-9]*')

if [ "${1:-}" = --check ]; then
    stale=0
    for patch in tests/mutants/*.patch; do
        patch --quiet -p1 --fuzz=0 --dry-run <"$patch" >/dev/null || { echo "FAILED  $patch: no longer applies"; stale=1; }
        rule=$(basename "$patch" | grep -o '^wb[0-9]*' || true)
        test=$(sed -n 's/^test: //p' "$patch")
        # What is beside the rules may have any test.
        case $test in
            ${rule:+"$rule"_}* | *_"$rule"_* | loom_* | model_*) ;;
            *) echo "FAILED  $patch: its test, $test, isn't of the rule that its name begins with"; stale=1 ;;
        esac
    done
    for rule in $rules; do
        compgen -G "tests/mutants/wb$rule-*.patch" >/dev/null || { echo "FAILED  WB-$rule has no planted mistake"; stale=1; }
    done
    [ $stale -eq 0 ] && echo "mutants: all apply, and every rule has one"
    exit $stale
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/foliant-mutants.XXXXXX")
patches=()
# What was built last has a mistake in it, and cargo goes by the times of sources: those that were changed count as newer.
leave() {
    rm -rf "$work"
    sed -n 's,^+++ b/,,p' "${patches[@]}" </dev/null | sort -u | (cd "$top" && xargs -r touch --no-create)
}
trap leave EXIT
for name in "${@:-}"; do
    found=("$top"/tests/mutants/"$name"*.patch)
    [ -f "tests/mutants/$name.patch" ] && found=("$top/tests/mutants/$name.patch")
    [ -f "${found[0]}" ] || { echo "no such mutant: $name" >&2; exit 2; }
    patches+=("${found[@]}")
done

# A copy of what git would commit, uncommitted changes included.
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - 2>/dev/null | tar -C "$work" -xf -
# Dependencies that were built for the tests are used again.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$top/target}
noticed=0
failed=0
table=()

report() { # what became of the mistake, and how
    printf '%-7s %s %s\n' "$1" "$name" "$2"
    local rule=${name%%-*}
    case $rule in wb[0-9]*) rule=WB-${rule#wb} ;; *) rule="beside" ;; esac
    table+=("$(printf '%-7s %-45s %-7s %s' "$rule" "${name#wb[0-9][0-9]-}" "$1" "$2")")
    if [ "$1" = noticed ]; then noticed=$((noticed + 1)); else failed=$((failed + 1)); fi
}

for patch in "${patches[@]}"; do
    name=$(basename "$patch" .patch)
    test=$(sed -n 's/^test: //p' "$patch")
    if ! (cd "$work" && patch --quiet -p1 --fuzz=0 --no-backup-if-mismatch --dry-run <"$patch" >/dev/null); then
        report FAILED "the patch no longer applies"
        continue
    fi
    (cd "$work" && patch --quiet -p1 --fuzz=0 --no-backup-if-mismatch <"$patch")
    log=$work/log
    # Only the target that has the test is built.
    file=$(cd "$work" && grep -rlE "fn $test" tests/tests engine/src --include='*.rs' | head -n 1 || true)
    # A file of its own, or a folder of several.
    target=${file#tests/tests/}
    target=${target%%/*}
    case $test:$file in
        *:) run=() ;;
        loom_*) run=(env RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$CARGO_TARGET_DIR/loom" cargo test --release -p foliant --no-default-features --lib) ;;
        *:tests/tests/*) run=(cargo test -p foliant-tests --test "${target%.rs}") ;;
        *) run=(cargo test -p foliant --lib) ;;
    esac
    if [ ${#run[@]} -eq 0 ]; then
        report FAILED "there is no test $test"
    elif ! (cd "$work" && "${run[@]}" --no-run >"$log" 2>&1); then
        report FAILED "does not compile"
        tail -n 20 "$log"
    elif (cd "$work" && timeout 300 "${run[@]}" --no-fail-fast "$test" >"$log" 2>&1); then
        report FAILED "$test did not notice"
    elif ! grep -q "^test .*$test" "$log"; then
        report FAILED "there is no test $test"
    else
        report noticed "by $test"
    fi
    (cd "$work" && patch --quiet -R -p1 --no-backup-if-mismatch <"$patch")
done
echo
printf '%-7s %-45s %-7s %s\n' rule "planted mistake" result "how"
printf '%s\n' "${table[@]}" | sort
echo "mutants: $noticed noticed, $failed failed"
[ "$failed" -eq 0 ]
