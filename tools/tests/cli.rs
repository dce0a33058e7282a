//! The built program, run as a user runs it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

fn foliant(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foliant"));
    command.args(arguments).env_remove("RUST_LOG").output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

/// Runs a command that must end with exit status `status` and say all `words` on standard error.
#[track_caller]
fn expect_refusal(arguments: &[&str], status: i32, words: &[&str]) {
    let output = foliant(arguments);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{arguments:?} should say {word:?}: {stderr}");
    }
}

/// Runs a command with `--json` that must pass; returns the object.
#[track_caller]
fn expect_json(arguments: &[&str]) -> Value {
    let output = foliant(&[arguments, &["--json"]].concat());
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stdout}{stderr}");
    serde_json::from_str(&stdout).expect("standard output is one JSON object")
}

/// A directory for images and traces, removed at the end.
struct Scratch {
    directory: TempDir,
}

impl Scratch {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn uri(&self, name: &str, parameters: &str) -> String {
        format!("emu:{}?{parameters}", self.path(name).display())
    }

    fn trace(&self, lines: &str) -> String {
        let path = self.path("trace.csv");
        std::fs::write(&path, format!("version,time,op,size,lbn\n{lines}")).unwrap();
        path.display().to_string()
    }

    fn image(&self, name: &str, len_bytes: u64, data: &[(u64, &[u8])]) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(len_bytes).unwrap();
        data.iter().for_each(|(offset, bytes)| file.write_all_at(bytes, *offset).unwrap());
        path
    }
}

/// A trace whose requests overlap, cross pages and 2 MiB, and come back after they were evicted.
fn overlapping_requests() -> String {
    let mut lines = String::new();
    for number in 0..3000u64 {
        let sector = number * 7919 % 16_000;
        let sectors = 1 + number % 60;
        let op = if number % 3 == 0 { "28" } else { "2a" };
        lines += &format!("1,{number},{op},{},{sector}\n", sectors * 512);
    }
    lines
}

#[test]
fn help_shows_examples_for_every_command() {
    for arguments in [
        &["--help"][..],
        &["demo", "--help"],
        &["replay", "--help"],
        &["identify", "--help"],
        &["bench", "--help"],
    ] {
        let output = foliant(arguments);
        let help = text(&output.stdout);
        assert_eq!(output.status.code(), Some(0));
        assert!(help.contains("Examples:\n  foliant "), "{help}");
    }
}

#[test]
fn a_command_line_that_cannot_be_understood_exits_with_2() {
    expect_refusal(&[], 2, &["Usage"]);
    expect_refusal(&["fly"], 2, &["fly"]);
    expect_refusal(&["identify", "nvme:ram"], 2, &["nvme:ram", "emu:ram"]);
    expect_refusal(&["identify", "emu:ram"], 2, &["add size="]);
    expect_refusal(&["identify", "emu:ram?size=1GiB&lab=512"], 2, &["lab", "known are size, lba"]);
    expect_refusal(
        &["identify", "emu:ram?size=1000&lba=512"],
        2,
        &["1000", "512-byte block", "nearest are 512 and 1024"],
    );
    expect_refusal(&["demo", "--cache", "12 bananas"], 2, &["12 bananas", "256MiB"]);
    expect_refusal(&["demo", "--threads", "0"], 2, &["0"]);
    expect_refusal(&["bench", "emu:null?size=1GiB", "--mix", "101"], 2, &["101"]);
}

#[test]
fn identify_tells_controller_and_namespaces() {
    let identified =
        expect_json(&["identify", "emu:ram?size=1GiB&lba=512&ns=2&mdts=128KiB&noiob=256&queues=3"]);
    assert_eq!(identified["transfer_bytes_max"], 128 << 10);
    assert_eq!(identified["queue_pairs"], 3);
    let namespace = &identified["namespaces"][1];
    assert_eq!((&namespace["id"], &namespace["block_bytes"]), (&2.into(), &512.into()));
    assert_eq!(
        (&namespace["size_bytes"], &namespace["optimal_boundary_blocks"]),
        (&(1 << 30).into(), &256.into())
    );
}

#[test]
fn a_missing_image_is_named_and_not_created_by_a_look() {
    let scratch = Scratch::new();
    let uri = scratch.uri("none.img", "size=1MiB");
    expect_refusal(&["identify", &uri], 1, &["none.img", "doesn't exist"]);
    assert!(!scratch.path("none.img").exists());
    expect_refusal(&["bench", &scratch.uri("none.img", "lba=512")], 1, &["none.img", "add size="]);
}

#[test]
fn an_image_of_another_size_or_with_half_a_block_is_refused_and_kept() {
    let scratch = Scratch::new();
    let small = scratch.image("small.img", 1 << 20, &[]);
    expect_refusal(&["identify", &scratch.uri("small.img", "size=2MiB")], 1, &["1048576", "2097152"]);
    scratch.image("odd.img", 1000, &[]);
    expect_refusal(&["identify", &scratch.uri("odd.img", "lba=512")], 1, &["1000 bytes", "512-byte blocks"]);
    expect_refusal(
        &["identify", &format!("emu:{}", Path::new("/dev/null").display())],
        1,
        &["no regular file"],
    );
    assert_eq!(std::fs::metadata(small).unwrap().len(), 1 << 20);
}

#[test]
fn a_cache_larger_than_memory_or_too_small_is_refused() {
    let scratch = Scratch::new();
    let trace = scratch.trace("1,0,2a,512,0\n");
    let replay =
        |cache| ["replay", &trace, "--device", "emu:ram?size=1MiB", "--cache", cache].map(str::to_owned);
    for (cache, words) in [("1000TiB", "bytes of memory"), ("4KiB", "at least")] {
        let arguments = replay(cache);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        expect_refusal(&arguments, 1, &["cache_bytes", words]);
    }
    expect_refusal(&["demo", "--cache", "1000TiB"], 1, &["cache_bytes", "bytes of memory"]);
}

#[test]
fn a_broken_trace_is_named_by_its_line_and_nothing_is_written() {
    let scratch = Scratch::new();
    let device = scratch.uri("new.img", "size=1MiB&lba=512");
    let cases = [
        ("1,0,2a,512,0\n1,0,2a,512\n", "line 3: 4 columns"),
        ("1,0,2a,512,0\n\n1,0,2b,512,0\n", "line 4: op is `2b`"),
        ("1,0,2a,100,0\n", "line 2: size is 100; a multiple of 512"),
        ("1,0,28,512,many\n", "line 2: lbn is `many`"),
        ("1,0,2a,512,0\n1,0,2a,512,4000\n", "line 3: the request ends at byte 2048512"),
    ];
    for (lines, words) in cases {
        let trace = scratch.trace(lines);
        expect_refusal(
            &["replay", &trace, "--device", &device, "--cache", "1MiB"],
            1,
            &["trace.csv, line", words],
        );
        assert!(!scratch.path("new.img").exists());
    }
    expect_refusal(&["replay", "/nowhere.csv", "--device", &device, "--cache", "1MiB"], 1, &["/nowhere.csv"]);
}

#[test]
fn a_replayed_trace_is_verified_on_files_and_in_memory() {
    let scratch = Scratch::new();
    let trace = scratch.trace(&overlapping_requests());
    let devices = [
        scratch.uri("512.img", "size=9MiB&lba=512"),
        scratch.uri("4096.img", "size=9MiB&lba=4096&engine=plain&mdts=8KiB"),
        "emu:ram?size=9MiB&lba=512&noiob=16".to_owned(),
    ];
    for device in devices {
        for shards in ["1", "2"] {
            let report = expect_json(&[
                "replay",
                &trace,
                "--device",
                &device,
                "--cache",
                "512KiB",
                "--shards",
                shards,
                "--verify",
                "--overwrite",
            ]);
            assert_eq!(report["verdict"], "passed", "{report:#}");
            let verification = &report["verification"];
            assert!(verification["sectors_written"].as_u64().unwrap() > 15_000, "{report:#}");
            assert_eq!(verification["sectors_written"], verification["sectors_verified_on_image"]);
            assert_eq!(report["requests"]["total"], 3000);
        }
    }
}

#[test]
fn an_image_that_holds_data_is_refused_and_untouched_without_overwrite() {
    let scratch = Scratch::new();
    let image = scratch.image("theirs.img", 1 << 20, &[(70_000, b"somebody's data")]);
    let before = std::fs::read(&image).unwrap();
    let (trace, device) = (scratch.trace("1,0,2a,4096,0\n"), scratch.uri("theirs.img", "lba=512"));
    let refusal = ["theirs.img", "byte 70000", "--overwrite"];
    expect_refusal(&["replay", &trace, "--device", &device, "--cache", "1MiB"], 1, &refusal);
    expect_refusal(&["bench", &device, "--mix", "50"], 1, &refusal);
    assert_eq!(std::fs::read(&image).unwrap(), before);

    let report =
        expect_json(&["replay", &trace, "--device", &device, "--cache", "1MiB", "--verify", "--overwrite"]);
    assert_eq!(report["verification"]["sectors_verified_on_image"], 8);
    let after = std::fs::read(&image).unwrap();
    assert_eq!(after[8192..], before[8192..]);
}

#[test]
fn an_image_of_zeroes_may_be_used_without_overwrite() {
    let scratch = Scratch::new();
    scratch.image("zeroes.img", 1 << 20, &[(0, &[0; 65536])]);
    let device = scratch.uri("zeroes.img", "lba=512");
    let trace = scratch.trace("1,0,2a,4096,3\n1,0,28,8192,0\n");
    let report = expect_json(&["replay", &trace, "--device", &device, "--cache", "1MiB", "--verify"]);
    assert_eq!(report["verification"]["sectors_verified_on_image"], 8);
}

#[test]
fn a_device_that_keeps_nothing_cannot_be_verified() {
    let scratch = Scratch::new();
    let trace = scratch.trace("1,0,2a,512,0\n");
    let arguments = ["replay", &trace, "--device", "emu:null?size=1MiB", "--cache", "1MiB", "--verify"];
    expect_refusal(&arguments, 1, &["keeps no data", "--verify"]);
}

#[test]
fn a_demo_over_a_few_files_survives_its_power_cuts() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("empty"), "").unwrap();
    std::fs::write(scratch.path("small"), "a few bytes").unwrap();
    std::fs::write(scratch.path("large"), vec![42; 100_000]).unwrap();
    let directory = scratch.directory.path().display().to_string();
    let report = expect_json(&["demo", &directory, "--cuts", "2", "--seed", "7", "--cache", "512KiB"]);
    assert_eq!(
        (&report["verdict"], &report["seed"], &report["files"]),
        (&"passed".into(), &7.into(), &3.into())
    );
    assert_eq!(report["cuts"].as_array().unwrap().len(), 2);
    assert_eq!(report["payload_bytes_copied"], 0);
    assert!(report["device"]["flushes"].as_u64().unwrap() > 0);
    let verified = report["final_check"]["transactions_verified"].as_u64().unwrap();
    let transactions = &report["transactions"];
    let there = |name: &str| transactions[name].as_u64().unwrap();
    assert_eq!(verified, there("acknowledged") + there("found_after_a_cut"));
}

#[test]
fn the_demo_names_its_seed_and_ends_with_a_verdict() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("file"), "content").unwrap();
    let path = scratch.path("file").display().to_string();
    let output = foliant(&["demo", &path, "--cuts", "1", "--seed", "11"]);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}");
    for words in ["seed 11", "cut 1: after", "PASSED: 1 power cut", "foliant demo --seed 11 --cuts 1"] {
        assert!(stdout.contains(words), "{words}: {stdout}");
    }
    expect_refusal(&["demo", "/nowhere/at/all"], 1, &["/nowhere/at/all"]);
    expect_refusal(&["demo", &scratch.path("none").display().to_string()], 1, &["none"]);
}

#[test]
fn a_bench_counts_what_it_did_by_both_paths() {
    let raw = ["bench", "emu:null?size=1GiB", "--seconds", "1", "--depth", "8", "--mix", "50"];
    let report = expect_json(&raw);
    let operations = report["operations"].as_u64().unwrap();
    assert!(operations > 0);
    assert_eq!(operations, report["reads"].as_u64().unwrap() + report["writes"].as_u64().unwrap());
    let cached =
        ["bench", "emu:ram?size=16MiB", "--seconds", "1", "--cached", "--cache", "4MiB", "--mix", "50"];
    let report = expect_json(&cached);
    assert_eq!(report["latency"]["count"], report["operations"]);
    assert!(report["cache"]["pages_evicted"].as_u64().unwrap() > 0);
}

#[test]
fn a_bench_that_cannot_be_done_names_value_and_limit() {
    let refusals: [(&[&str], &[&str]); 5] = [
        (&["--block", "1000"], &["--block", "1000 B", "4096 bytes"]),
        (&["--block", "64MiB", "--depth", "1"], &["--block", "16 MiB"]),
        (&["--block", "16MiB", "--depth", "2000"], &["--depth 2000", "31.2 GiB", "1 GiB"]),
        (&["--range", "2GiB"], &["--range", "2 GiB", "1 GiB"]),
        (&["--range", "2KiB"], &["--range", "4 KiB"]),
    ];
    for (options, words) in refusals {
        expect_refusal(&[&["bench", "emu:null?size=1GiB"], options].concat(), 1, words);
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let program = env!("CARGO_BIN_EXE_foliant");
    let script = format!("set -o pipefail; '{program}' identify 'emu:ram?size=1GiB' 2>&1 | head -n 1");
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert!(!text(&output.stdout).contains("panicked"));
    assert_eq!(output.status.code(), Some(0));
}
