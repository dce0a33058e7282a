#!/usr/bin/env bash
# Everything that has to hold, in one command, on a fresh machine with a Rust toolchain: formatting, lints, documentation,
# tests, the model checks of the lock-free protocols, the guest lab, and the demo. What takes longer (an hour of the model, the
# planted mistakes) is in tools/nightly.sh.
#
#   tools/test.sh                all of it
#   tools/test.sh --mutants      and each planted mistake is noticed by its test; otherwise they only have to apply
#   tools/test.sh --no-guest     without the guest lab: no QEMU, so nothing of the VFIO path is tested
set -euo pipefail
cd "$(dirname "$0")/.."

mutants=no
guest=yes
for argument in "$@"; do
    case $argument in
        --mutants) mutants=yes ;;
        --no-guest) guest=no ;;
        *)
            echo "tools/test.sh: unknown argument '$argument'; there are --mutants and --no-guest" >&2
            exit 2
            ;;
    esac
done

step() {
    printf '\n== %s (%ss)\n' "$1" "$SECONDS"
}

# What is needed beyond the toolchain comes by the distribution's package manager.
need() {
    command -v "$1" >/dev/null 2>&1 && return
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing $2, which has $1"
        { apt-get install -qq -y --no-install-recommends "$2" || { apt-get update -qq && apt-get install -qq -y --no-install-recommends "$2"; }; } >/dev/null
    else
        echo "tools/test.sh needs the program '$1'; install the package '$2' and run it again" >&2
        exit 1
    fi
}

step "tools"
need cc gcc
need patch patch
need git git
for component in rustfmt clippy; do
    case $component in rustfmt) program=cargo-fmt ;; clippy) program=cargo-clippy ;; esac
    command -v $program >/dev/null 2>&1 || rustup component add $component
done

step "format"
cargo fmt --all --check

step "lints"
cargo clippy --locked --workspace --all-targets -- -D warnings

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet

if command -v cargo-deny >/dev/null 2>&1; then
    step "dependencies"
    cargo deny --offline check licenses bans sources
fi

step "tests"
cargo test --locked --workspace --exclude foliant-lab

step "model checks of the lock-free protocols"
RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom" \
    cargo test --locked --release -p foliant --no-default-features --lib loom_

step "planted mistakes"
if [ $mutants = yes ]; then
    tools/mutants.sh
else
    tools/mutants.sh --check
fi

if [ $guest = yes ]; then
    step "guest lab"
    cargo test --locked -p foliant-lab
fi

step "demo"
cargo run --locked --release --bin foliant -- demo

left_out=
[ $guest = yes ] || left_out="$left_out; the guest lab was left out"
printf '\nall passed in %ss%s\n' "$SECONDS" "$left_out"
