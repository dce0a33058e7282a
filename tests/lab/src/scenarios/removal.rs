//! Devices that leave while they are used, behind a root port of their own.

use std::time::Duration;

use serde_json::{Value, json};

use crate::drive::{Drive, Layer};
use crate::guest::Attendant;
use crate::machine::{Machine, NvmeController};
use crate::scenario::{Boot, Claim};

pub(super) fn boots() -> Vec<Boot> {
    let claim = |name, proves, job| {
        let place =
            json!({"address": "0000:01:00.0", "port": "0000:00:05.0", "other": "0000:00:04.0", "seed": 3});
        Claim::new(name, proves, job, place)
    };
    let unplugged = claim(
        "an_unplug_is_announced_and_the_device_goes_when_the_engine_is_closed",
        "The system asks for the device in the middle of a sync: the sync ends well, the engine is told, closing it \
         lets the device go, and QEMU says that it is gone. Another device goes on.",
        "unplug",
    );
    let dead = claim(
        "a_dead_device_fails_what_is_in_flight_and_the_process_lives",
        "The bridge above the device is switched off in mid-write: all that waits ends with an error in bounded time, \
         the engine closes, and an engine on another device goes on.",
        "die",
    );
    vec![
        Boot { attend: unplug, ..boot("unplug").claim(unplugged) },
        boot("dead-device").claim(dead.check(|evidence| {
            let words: String = evidence.fact("words");
            assert!(!words.is_empty());
        })),
    ]
}

/// The device that leaves is slow, so that there is always something in flight.
fn boot(name: &'static str) -> Boot {
    let machine = Machine::new()
        .drive(Drive::new("stays", 32))
        .drive(Drive::new("leaves", 32).layer(Layer::IopsLimit(30)))
        .root_port("slot-5", "05.0")
        .nvme(NvmeController::new("LAB0", "04.0").namespace(1, "stays", 4096))
        .nvme(NvmeController::new("LAB1", "00.0").behind("slot-5").namespace(1, "leaves", 4096));
    Boot::new(name, machine.without_kernel_driver()).bind(&["0000:00:04.0", "0000:01:00.0"])
}

fn unplug(attendant: &mut Attendant<'_>, what: &str, _: &Value) -> Result<Value, String> {
    let words = |error: crate::LabError| error.to_string();
    match what {
        "unplug" => attendant.monitor.execute("device_del", json!({"id": "LAB1"})).map_err(words),
        "unplugged" => attendant
            .monitor
            .wait_for("DEVICE_DELETED", Duration::from_secs(60), |data| data["device"] == "LAB1")
            .map_err(words),
        other => Err(format!("nobody knows how to do {other:?}")),
    }
}
