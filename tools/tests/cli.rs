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
        &["trace", "--help"],
        &["identify", "--help"],
        &["bench", "--help"],
        &["devices", "--help"],
        &["bind", "--help"],
        &["unbind", "--help"],
        &["doctor", "--help"],
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
fn a_mirror_is_made_equal_and_told_from_a_stale_one() {
    let scratch = Scratch::new();
    let data: Vec<u8> = (0..=250u8).cycle().take(1 << 20).collect();
    let image = scratch.image("data.img", 8 << 20, &[(0, &data), (5 << 20, &data)]);
    let (primary, mirror) =
        (scratch.uri("data.img", "lba=512"), scratch.uri("copy.img", "size=8MiB&lba=512"));
    assert_eq!(expect_json(&["mirror", "status", &primary])["labels"][0]["role"], Value::Null);

    let pair = ["mirror", "resync", &primary, "--mirror", &mirror];
    let len_bytes = (8 << 20) - (64 << 10);
    assert_eq!(expect_json(&pair)["bytes"], len_bytes);
    let bytes = |path: &Path| std::fs::read(path).unwrap()[..len_bytes].to_vec();
    assert!(bytes(&image) == bytes(&scratch.path("copy.img")), "both hold the same");
    let status = expect_json(&["mirror", "status", &primary, "--mirror", &mirror]);
    assert_eq!((&status["in_sync"], &status["labels"][1]["state"]), (&true.into(), &"clean".into()));
    assert_eq!(expect_json(&pair)["bytes"], 0, "nothing is left to copy");

    // Its mirror is used by itself: the pair isn't in sync any more, and says so.
    assert_eq!(expect_json(&["mirror", "accept", &mirror])["labels"][0]["state"], "alone");
    let output = foliant(&["mirror", "status", &primary, "--mirror", &mirror]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("opened alone"));
    expect_refusal(&pair, 1, &["opened alone", "copy it back"]);
}

#[test]
fn a_mirror_is_not_made_of_what_holds_other_data() {
    let scratch = Scratch::new();
    scratch.image("data.img", 8 << 20, &[(0, b"data")]);
    scratch.image("other.img", 8 << 20, &[(4 << 20, b"somebody's")]);
    let (primary, other) = (scratch.uri("data.img", "lba=512"), scratch.uri("other.img", "lba=512"));
    let missing = scratch.uri("missing.img", "lba=512");
    expect_refusal(&["mirror", "resync", &primary, "--mirror", &other], 1, &["other.img", "--overwrite"]);
    expect_refusal(&["mirror", "status", &missing], 1, &["missing.img", "doesn't exist"]);
    expect_refusal(&["mirror", "accept", &other], 1, &["no label"]);
    let small = scratch.uri("small.img", "size=4MiB&lba=512");
    expect_refusal(&["mirror", "resync", &primary, "--mirror", &small], 1, &["don't fit", "at most"]);
    expect_json(&["mirror", "resync", &primary, "--mirror", &other, "--overwrite"]);
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
fn a_demo_on_a_device_of_its_own_survives_the_kills_of_its_process() {
    let scratch = Scratch::new();
    for number in 0..20 {
        std::fs::write(scratch.path(&format!("file{number}")), vec![number; 3000 * usize::from(number)])
            .unwrap();
    }
    // The image lies elsewhere, or it would be taken in as well.
    let (directory, images) = (scratch.directory.path().display().to_string(), Scratch::new());
    let uri = images.uri("image", "size=256MiB");
    let demo = ["demo", &directory, "--device", &uri, "--cuts", "3", "--seed", "5", "--cache", "512KiB"];
    let report = expect_json(&demo);
    assert_eq!(report["verdict"], "passed");
    let kills = report["kills"].as_array().unwrap();
    assert_eq!(kills.len(), 3);
    assert!(kills.iter().all(|kill| kill["verdict"] == "passed" && kill["transactions"].as_u64() > Some(0)));
    assert!(report["verified"].as_u64() >= report["acknowledged"].as_u64());
    // What it has left there isn't overwritten unasked.
    expect_refusal(&demo, 1, &["holds data", "--overwrite"]);
    expect_refusal(
        &["demo", "--device", "emu:ram?size=1GiB"],
        1,
        &["emu:ram", "kills that process", "vfio:"],
    );
    expect_refusal(&["demo", "--overwrite"], 2, &["--device"]);
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

/// Where no host has a PCI function.
const NOWHERE: &str = "fffffffe:ff:1f.7";

#[test]
fn an_address_that_is_none_exits_with_2_and_shows_the_form() {
    for command in ["bind", "unbind"] {
        expect_refusal(&[command], 2, &["<BDF>"]);
        expect_refusal(&[command, "nvme0"], 2, &["`nvme0` is no PCI address", "0000:01:00.0"]);
        expect_refusal(&[command, "01:20.0"], 2, &["the device 20 is beyond 1f"]);
        expect_refusal(&[command, "01:00.8"], 2, &["the function 8 is beyond 7"]);
    }
    expect_refusal(&["doctor", "--device", "01:00"], 2, &["`01:00` is no PCI address"]);
    expect_refusal(&["doctor", "--cache", "12 bananas"], 2, &["12 bananas"]);
    expect_refusal(&["identify", "vfio:"], 2, &["no PCI address", "vfio:0000:01:00.0"]);
    expect_refusal(&["identify", "vfio:01:00.8"], 2, &["function 8 is beyond 7", "vfio:0000:01:00.0"]);
    expect_refusal(&["identify", "vfio:01:00.0?iommu=none"], 2, &["iommu", "group|iommufd"]);
    expect_refusal(&["bench", "vfio-noiommu:01:00.0?iommu=group"], 2, &["vfio-noiommu:0000:01:00.0"]);
    expect_refusal(&["bench", "vfio:/dev/nvme0n1"], 2, &["/dev/nvme0n1", "no PCI address"]);
}

#[test]
fn an_address_where_no_function_is_exits_with_1_and_changes_nothing() {
    let words = [NOWHERE, "no PCI function", "NVMe controller"];
    expect_refusal(&["bind", NOWHERE], 1, &words);
    expect_refusal(&["bind", NOWHERE, "--noiommu"], 1, &words);
    expect_refusal(&["unbind", NOWHERE], 1, &words);
    expect_refusal(&["doctor", "--device", NOWHERE], 1, &words);
    for scheme in ["vfio", "vfio-noiommu"] {
        let uri = format!("{scheme}:{NOWHERE}");
        expect_refusal(&["identify", &uri], 1, &words);
        expect_refusal(&["bench", &uri], 1, &words);
    }
    for interface in ["group", "iommufd"] {
        expect_refusal(&["identify", &format!("vfio:{NOWHERE}?iommu={interface}")], 1, &words);
    }
}

#[test]
fn devices_lists_what_there_is_on_any_machine() {
    let listing = expect_json(&["devices"]);
    for controller in listing["controllers"].as_array().expect("a list") {
        assert!(controller["address"].is_string() && controller["used_by"].is_array(), "{controller:#}");
    }
    assert_eq!(foliant(&["devices"]).status.code(), Some(0));
}

#[test]
fn the_doctors_exit_status_is_its_verdict_and_whatever_blocks_is_explained() {
    let output = foliant(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("standard output is one JSON object");
    let findings = report["findings"].as_array().expect("a list");
    let blocking = || findings.iter().filter(|finding| finding["severity"] == "blocks");
    let verdict = if blocking().count() == 0 { ("passed", 0) } else { ("failed", 1) };
    assert_eq!((report["verdict"].as_str(), output.status.code()), (Some(verdict.0), Some(verdict.1)));
    assert!(
        blocking().all(|finding| finding["says"].as_str().is_some_and(|says| says.len() > 20)),
        "{report:#}"
    );
    let areas: Vec<&str> = findings.iter().filter_map(|finding| finding["area"].as_str()).collect();
    for area in ["IOMMU", "kernel modules", "hugepages", "locked memory", "processors", "permissions"] {
        assert!(areas.contains(&area), "{area}: {report:#}");
    }
    let words = foliant(&["doctor"]);
    assert_eq!(words.status.code(), Some(verdict.1));
    assert!(text(&words.stdout).contains("foliant identify vfio"));
    expect_refusal(&["doctor", "--user", "nobody-has-this-name"], 1, &["nobody-has-this-name", "id -u"]);
}

/// What every report has to tell, escaped or not.
fn assert_tells(report: &str, words: &[&str]) {
    for word in words {
        assert!(report.contains(word), "the report should have {word:?}");
    }
    // Nothing is fetched from anywhere, and nothing runs.
    let elsewhere = report.replace("http://www.w3.org/2000/svg", "");
    for word in ["http:", "https:", "src=", "url(", "<script", "@import"] {
        assert!(!elsewhere.contains(word), "the report must not have {word:?}");
    }
}

const PLOTS: [&str; 5] = [
    "Throughput over time",
    "Latency over time",
    "Throughput over depth",
    "Latency over depth",
    "Spread of latencies",
];

#[test]
fn a_report_is_one_file_with_every_plot_the_machine_and_the_drive() {
    let scratch = Scratch::new();
    for (name, path) in [("raw.html", "--raw"), ("cached.html", "--cached")] {
        let file = scratch.path(name).display().to_string();
        let uri = "emu:ram?size=16MiB&queues=3";
        let found = expect_json(&["bench", uri, "--seconds", "1", path, "--mix", "60", "--report", &file]);
        let depths: Vec<_> = found["sweep"].as_array().unwrap().iter().map(|point| &point["depth"]).collect();
        assert_eq!(depths, [1, 2, 4, 8, 16, 32, 64, 128]);
        assert_eq!(found["report"], file);
        let report = std::fs::read_to_string(&file).unwrap();
        assert!(report.starts_with("<!DOCTYPE html>") && report.ends_with("</html>"), "{name}");
        assert_eq!(report.matches("<svg ").count(), PLOTS.len());
        assert_tells(&report, &PLOTS);
        assert_tells(&report, &["seconds", "operations a second", "latency of an access", "p99.9"]);
        assert_tells(&report, &["Foliant Emulated NVMe Controller", "emu:ram?size=16MiB&amp;queues=3"]);
        assert_tells(
            &report,
            &["processor", "cores", "NUMA", "kernel", "governor", "prefers-color-scheme:dark"],
        );
        assert_tells(&report, &["--mix 60", env!("CARGO_PKG_VERSION")]);
    }
    assert_eq!(
        std::fs::read_dir(scratch.directory.path()).unwrap().count(),
        2,
        "nothing else is left behind"
    );
}

#[test]
fn a_report_can_be_one_picture() {
    let scratch = Scratch::new();
    let file = scratch.path("picture.svg").display().to_string();
    let arguments = ["bench", "emu:null?size=1GiB", "--seconds", "1", "--report", &file];
    let output = foliant(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains(&format!("report: {file}")));
    let picture = std::fs::read_to_string(&file).unwrap();
    assert!(picture.starts_with("<svg ") && picture.trim_end().ends_with("</svg>"));
    assert_eq!(picture.matches("<svg").count(), 1);
    assert_tells(&picture, &PLOTS);
    assert_tells(&picture, &["processor", "Foliant Emulated NVMe Controller", "prefers-color-scheme:dark"]);
}

#[test]
fn whatever_a_device_is_called_is_text_in_its_report() {
    let scratch = Scratch::new();
    let device = scratch.uri("<i>&\"'.img", "size=16MiB");
    for file in ["page.html", "picture.svg"] {
        let file = scratch.path(file).display().to_string();
        expect_json(&["bench", &device, "--seconds", "1", "--report", &file]);
        let report = std::fs::read_to_string(&file).unwrap();
        assert!(!report.contains("<i>") && report.contains("&lt;i&gt;&amp;"), "{file}");
    }
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_anything_is_measured() {
    let scratch = Scratch::new();
    let bench = |file: &str| {
        let uri = scratch.uri("never.img", "size=1MiB");
        ["bench", &uri, "--seconds", "3600", "--report", file].map(str::to_owned)
    };
    let refuse = |file: &str, status, words: &[&str]| {
        let arguments = bench(file);
        expect_refusal(&arguments.each_ref().map(String::as_str), status, words);
    };
    refuse("report.pdf", 2, &["report.pdf", ".html or .svg"]);
    refuse(&scratch.path("nowhere/report.html").display().to_string(), 1, &["nowhere/report.html"]);
    std::fs::create_dir(scratch.path("taken.html")).unwrap();
    refuse(&scratch.path("taken.html").display().to_string(), 1, &["taken.html", "directory"]);
    assert!(!scratch.path("never.img").exists());
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let program = env!("CARGO_BIN_EXE_foliant");
    let script = format!("set -o pipefail; '{program}' identify 'emu:ram?size=1GiB' 2>&1 | head -n 1");
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert!(!text(&output.stdout).contains("panicked"));
    assert_eq!(output.status.code(), Some(0));
}

/// A run of `foliant trace` with a picture of its own; the result, and the picture.
#[track_caller]
fn expect_picture(scratch: &Scratch, arguments: &[&str]) -> (Value, String) {
    let file = scratch.path("picture.svg").display().to_string();
    let report = expect_json(&[&["trace"], arguments, &["--out", &file]].concat());
    assert_eq!(report["picture"]["path"], file);
    let picture = std::fs::read_to_string(&file).unwrap();
    assert!(picture.starts_with("<svg ") && picture.trim_end().ends_with("</svg>"));
    assert_eq!(
        (picture.matches("<svg").count(), report["picture"]["bytes"].as_u64()),
        (1, Some(picture.len() as u64))
    );
    assert!(!picture.contains("NaN"));
    (report, picture)
}

#[test]
fn a_trace_of_the_demonstration_is_a_picture_that_keeps_the_rules() {
    for shards in ["1", "2"] {
        let scratch = Scratch::new();
        let (report, picture) =
            expect_picture(&scratch, &["emu:ram?size=16MiB&write_latency_us=200", "--shards", shards]);
        assert_eq!(report["verdict"], "passed", "{report:#}");
        assert_eq!(
            (&report["events"]["dropped"], &report["shards"]),
            (&0.into(), &shards.parse::<u64>().unwrap().into())
        );
        assert_eq!(report["seen"], report["counted"], "events and counters agree");
        let checks = &report["checks"];
        assert_eq!((&checks["wb01"]["descents"], &checks["wb18"]["late"]), (&0.into(), &0.into()));
        assert_eq!(checks["wb18"]["batches"], checks["wb18"]["doorbells"]);
        let commands = report["seen"]["write_commands"].as_u64().unwrap();
        assert!(commands > 100 && checks["wb01"]["commands"] == commands, "{report:#}");
        assert!(checks["wb18"]["commands"].as_u64() > checks["wb18"]["doorbells"].as_u64(), "{report:#}");
        assert_tells(
            &picture,
            &["Writeback on emu:ram?size=16MiB&amp;write_latency_us=200", "PASSED", "doorbells of shard 0"],
        );
        assert_tells(
            &picture,
            &[
                "log: appended",
                "table: random",
                "index: small",
                "WB-01",
                "WB-18",
                "prefers-color-scheme:dark",
            ],
        );
        let drawn =
            ["back", "sync"].map(|class| picture.matches(&format!("<rect class=\"{class}\"")).count() as u64);
        assert_eq!(drawn[0] + drawn[1], commands + 2, "each command, and two in the legend");
        assert_eq!(picture.contains("belong to shard 1"), shards == "2");
    }
}

#[test]
fn a_trace_of_a_replay_draws_what_the_replay_writes() {
    let scratch = Scratch::new();
    let trace = scratch.trace(&overlapping_requests());
    let (report, picture) = expect_picture(&scratch, &["--replay", &trace, "--cache", "512KiB"]);
    assert_eq!(report["verdict"], "passed", "{report:#}");
    assert_eq!(report["device"], "emu:ram?size=1GiB&lba=512&read_latency_us=100&write_latency_us=100");
    assert_tells(&picture, &["replay of", "3,000 requests", "written by the replay"]);
    // A sequential reader, for whom the engine reads ahead, beside a writer.
    let sequential = scratch.path("sequential.csv").display().to_string();
    let lines = (0..400u64).map(|number| {
        let (read, write) = (number * 16, 40_000 + number * 5 % 97 * 8);
        format!("1,{number},28,8192,{read}\n1,{number},2a,4096,{write}\n")
    });
    let header = "version,time,op,size,lbn\n".to_owned();
    std::fs::write(&sequential, lines.fold(header, |trace, line| trace + &line)).unwrap();
    let (report, _) = expect_picture(&scratch, &["--replay", &sequential, "--cache", "1MiB"]);
    assert_eq!((&report["verdict"], &report["seen"]), (&"passed".into(), &report["counted"]), "{report:#}");

    let output =
        foliant(&["trace", "--replay", &trace, "--out", &scratch.path("text.svg").display().to_string()]);
    let stdout = text(&output.stdout);
    for words in ["WB-01", "WB-18", "one a batch", "PASSED: the run keeps both rules", "text.svg"] {
        assert!(stdout.contains(words), "{words}: {stdout}");
    }
}

#[test]
fn a_run_that_ends_with_an_error_is_drawn_all_the_same() {
    let scratch = Scratch::new();
    let (image, file) = (scratch.image("image", 16 << 20, &[]), scratch.path("picture.svg"));
    // Beyond the first 4 MiB the file can't be written: the limit of the process says so.
    let script =
        "trap '' XFSZ; ulimit -f 4096; exec \"$0\" trace \"emu:$1?engine=plain\" --out \"$2\" --json";
    let program = env!("CARGO_BIN_EXE_foliant");
    let output = Command::new("bash").args(["-c", script, program]).arg(&image).arg(&file).output().unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{stdout}{stderr}");
    assert!(stderr.contains("Capacity Exceeded"), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let failed = report["writes_failed"].as_u64().unwrap();
    assert!(report["verdict"] == "failed" && failed > 0, "{report:#}");
    assert_eq!(report["checks"]["verdict"], "passed", "the rules hold on a failing device as well");
    let picture = std::fs::read_to_string(&file).unwrap();
    assert_tells(&picture, &["the workload ended early", "Capacity Exceeded", ", failed; background pass"]);
}

#[test]
fn a_trace_that_cannot_be_made_is_refused_with_what_is_wrong_and_leaves_no_picture() {
    let scratch = Scratch::new();
    let file = scratch.path("picture.svg").display().to_string();
    let refuse = |arguments: &[&str], status, words: &[&str]| {
        expect_refusal(&[&["trace"], arguments].concat(), status, words);
        assert!(!scratch.path("picture.svg").exists());
    };
    refuse(&["--out", "picture.png"], 2, &["picture.png", "end the name in .svg"]);
    refuse(
        &["--out", &scratch.path("nowhere/a.svg").display().to_string()],
        1,
        &["cannot write the picture", "nowhere/a.svg"],
    );
    refuse(&["emu:ram", "--out", &file], 2, &["emu:ram", "add size="]);
    refuse(&["emu:ram?size=1MiB", "--out", &file], 1, &["1 MiB", "the demonstration needs 3 MiB"]);
    refuse(&["--cache", "4KiB", "--out", &file], 1, &["cache_bytes = 4096"]);
    refuse(&["--replay", "/no/trace.csv", "--out", &file], 1, &["/no/trace.csv"]);
    let reads = scratch.trace("1,0,28,4096,0\n1,0,28,4096,8\n");
    refuse(
        &["--replay", &reads, "--out", &file],
        1,
        &["nothing was written back", "choose a workload that writes"],
    );
    let writes = scratch.trace("1,0,2a,4096,999999\n");
    refuse(
        &["emu:ram?size=1MiB&lba=512", "--replay", &writes, "--out", &file],
        1,
        &["line 2", "past the device's"],
    );
    let image = scratch.image("theirs.img", 4 << 20, &[(70_000, b"somebody's data")]);
    let before = std::fs::read(&image).unwrap();
    let device = scratch.uri("theirs.img", "");
    refuse(&[&device, "--out", &file], 1, &["theirs.img", "byte 70000", "--overwrite"]);
    assert_eq!(std::fs::read(&image).unwrap(), before);
}

/// A bench that runs until it is killed, and shows itself.
struct Running {
    child: std::process::Child,
    runtime: TempDir,
}

impl Running {
    fn start(stats: &str) -> Self {
        let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
        let stats = stats.replace("RUNTIME", &runtime.path().display().to_string());
        let bench =
            ["bench", "emu:ram?size=64MiB", "--cached", "--cache", "8MiB", "--shards", "2", "--mix", "70"];
        let child = Command::new(env!("CARGO_BIN_EXE_foliant"))
            .args(bench)
            .args(["--seconds", "600", "--depth", "2", "--stats", &stats])
            .env("XDG_RUNTIME_DIR", runtime.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("the program starts");
        Self { child, runtime }
    }

    fn page(&self) -> String {
        self.runtime.path().join("page").display().to_string()
    }

    /// What `foliant top` prints of it, once there is something.
    fn top(&self, arguments: &[&str]) -> String {
        for _ in 0..60 {
            let output = Command::new(env!("CARGO_BIN_EXE_foliant"))
                .arg("top")
                .args(arguments)
                .env("XDG_RUNTIME_DIR", self.runtime.path())
                .output()
                .expect("the program starts");
            if output.status.success() {
                return text(&output.stdout);
            }
            std::thread::yield_now();
        }
        panic!("the bench never shows itself");
    }

    fn kill(&mut self) {
        self.child.kill().and_then(|()| self.child.wait()).expect("a child can be killed");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn top_shows_a_running_engine_and_what_it_did_last_when_it_was_killed() {
    let mut bench = Running::start("RUNTIME/page");
    let page = bench.page();
    let shown: Value = serde_json::from_str(&bench.top(&[&page, "--json"])).unwrap();
    let engine = &shown["engines"][0];
    assert_eq!(
        (engine["pid"].as_u64(), &engine["is_running"]),
        (Some(bench.child.id().into()), &Value::Bool(true))
    );
    assert_eq!(engine["shards"].as_array().map(Vec::len), Some(2), "{engine}");
    let total = &engine["total"];
    assert!(total["hits_per_second"].as_f64() > Some(0.0) && total["misses_per_second"].as_f64() > Some(0.0));
    assert!(total["read_wait"]["p99_us"].as_f64() > Some(0.0), "{total}");

    let table = bench.top(&[&page, "--once"]);
    assert!(table.contains("hits/s") && table.contains("emu:ram") && table.contains("open for"), "{table}");
    let metrics = bench.top(&[&page, "--prometheus"]);
    let up = metrics.lines().find(|line| line.starts_with("foliant_up{")).unwrap();
    assert!(up.ends_with(" 1") && up.contains(&format!("page=\"{page}\"")), "{up}");
    assert!(metrics.contains("foliant_read_wait_seconds_bucket{"));

    bench.kill();
    assert!(bench.top(&[&page, "--once"]).contains("has ended"));
    let metrics = bench.top(&[&page, "--prometheus"]);
    assert!(metrics.lines().any(|line| line.starts_with("foliant_up{") && line.ends_with(" 0")));
    // Whoever comes next takes the place over, and leaves it empty.
    let next = ["bench", "emu:ram?size=64MiB", "--cached", "--seconds", "1", "--stats", &page];
    assert_eq!(foliant(&next).status.code(), Some(0));
    expect_refusal(&["top", &page, "--once"], 1, &["cannot be opened"]);
}

#[test]
fn top_finds_running_engines_by_itself() {
    let bench = Running::start("auto");
    let pid = bench.child.id();
    let is_found = |shown: &str| {
        let shown: Value = serde_json::from_str(shown).unwrap();
        let engines = shown["engines"].as_array().unwrap();
        engines.iter().any(|engine| engine["pid"].as_u64() == Some(pid.into()))
    };
    // Others' engines may run beside it.
    assert!((0..60).any(|_| is_found(&bench.top(&["--json"]))));
}

#[test]
fn top_says_what_keeps_it_from_showing_anything() {
    let scratch = Scratch::new();
    let image = scratch.image("image", 1 << 20, &[(0, &[1; 512])]);
    expect_refusal(&["top", "/not/there"], 1, &["/not/there", "cannot be opened"]);
    expect_refusal(&["top", &image.display().to_string(), "--json"], 1, &["no stats page"]);
    let bench = Running::start("RUNTIME/page");
    bench.top(&[&bench.page(), "--prometheus"]);
    expect_refusal(&["top", &bench.page()], 1, &["no terminal", "--once"]);
    expect_refusal(&["top", "--interval", "0"], 2, &["between 0.1 and 60"]);
    let taken = ["bench", "emu:ram?size=64MiB", "--cached", "--stats", &bench.page()];
    expect_refusal(&taken, 1, &["belongs to a running engine", &bench.child.id().to_string()]);
    expect_refusal(&["bench", "emu:ram?size=64MiB", "--stats", "auto"], 1, &["add --cached"]);
}
