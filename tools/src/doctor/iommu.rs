//! Whether an IOMMU stands between devices and memory, and what switches it on.

use super::boot::{with_words, without_word};
use super::finding::Finding;
use super::{Subject, address_word};

const AREA: &str = "IOMMU";
/// Words of the kernel's command line that switch the IOMMU off.
const OFF_WORDS: [&str; 3] = ["iommu=off", "intel_iommu=off", "amd_iommu=off"];

pub(super) fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let groups = subject.names("sys/kernel/iommu_groups");
    let is_real = |group: &&String| {
        let name = subject.text(format!("sys/kernel/iommu_groups/{group}/name"));
        name.as_deref() != Some("vfio-noiommu")
    };
    match groups.iter().filter(is_real).count() {
        0 if subject.uses_noiommu() => vec![Finding::slows(
            AREA,
            "there is none: a controller is on vfio-pci all the same, and can write anywhere in this machine's \
             memory",
        )],
        0 => vec![missing(subject), noiommu(subject)],
        count => {
            let units = subject.names("sys/class/iommu");
            let units = if units.is_empty() { "an IOMMU".to_owned() } else { units.join(", ") };
            let mut findings =
                vec![Finding::fine(AREA, format!("{units} keeps devices apart in {count} groups"))];
            findings.extend(interrupts(subject));
            findings
        }
    }
}

/// Why there are no groups, and what makes some.
fn missing(subject: &Subject<'_>) -> Finding {
    let command_line = subject.text("proc/cmdline").unwrap_or_default();
    if let Some(word) = command_line.split_whitespace().find(|word| OFF_WORDS.contains(word)) {
        let finding = Finding::blocks(AREA, format!("it's switched off: the kernel was booted with {word}"));
        return without_word(subject, finding, word);
    }
    let cpu = subject.text("proc/cpuinfo").unwrap_or_default();
    let table = |name: &str| subject.exists(format!("sys/firmware/acpi/tables/{name}"));
    let (is_intel, is_amd) = (cpu.contains("GenuineIntel"), cpu.contains("AuthenticAMD"));
    let was_asked_for = command_line.split_whitespace().any(|word| word == "intel_iommu=on");
    if was_asked_for && (table("DMAR") || !is_virtual(&cpu)) {
        return Finding::blocks(
            AREA,
            "the kernel was booted with intel_iommu=on and uses none; its log says why: firmware with VT-d \
             switched off, or a kernel without CONFIG_INTEL_IOMMU",
        )
        .run("dmesg | grep -i -e DMAR -e IOMMU");
    }
    if table("DMAR") {
        let finding = Finding::blocks(AREA, "the firmware offers one (VT-d), but the kernel doesn't use it");
        return with_words(subject, finding, "intel_iommu=on iommu=pt");
    }
    if table("IVRS") {
        return Finding::blocks(
            AREA,
            "the firmware offers one (AMD-Vi), but the kernel doesn't use it; its log says why, most often a kernel \
             without CONFIG_AMD_IOMMU",
        )
        .run("dmesg | grep -i -e AMD-Vi -e IOMMU");
    }
    if is_virtual(&cpu) {
        return Finding::blocks(
            AREA,
            "this is a virtual machine, and it was given none: take a bare-metal instance, or a machine type with a \
             virtual IOMMU (QEMU: -machine q35,kernel-irqchip=split -device \
             intel-iommu,intremap=on,caching-mode=on, and intel_iommu=on on the guest's kernel command line)",
        );
    }
    if is_intel || is_amd {
        let name = if is_intel { "VT-d" } else { "IOMMU or AMD-Vi (SVM alone isn't it)" };
        let finding = Finding::blocks(
            AREA,
            format!(
                "the firmware offers none: switch on {name} in its setup, under processor, chipset or security"
            ),
        );
        let finding = finding.run("systemctl reboot --firmware-setup");
        return if is_intel { with_words(subject, finding, "intel_iommu=on iommu=pt") } else { finding };
    }
    Finding::blocks(
        AREA,
        "the kernel uses none: no groups in /sys/kernel/iommu_groups; the firmware or the kernel lacks it",
    )
    .run("dmesg | grep -i iommu")
}

/// The way out where there can't be one.
fn noiommu(subject: &Subject<'_>) -> Finding {
    let release = subject.text("proc/sys/kernel/osrelease").unwrap_or_default();
    let config = subject.text(format!("boot/config-{release}"));
    let has_switch = subject.exists("sys/module/vfio/parameters/enable_unsafe_noiommu_mode");
    let says = match config {
        Some(config) if !has_switch && !config.contains("CONFIG_VFIO_NOIOMMU=y") => {
            return Finding::fine(
                AREA,
                "doing without one isn't possible either: no CONFIG_VFIO_NOIOMMU in this kernel",
            );
        }
        _ => {
            "where there can be none, and a bug may cost all of this machine's memory: doing without is possible \
             if the kernel has CONFIG_VFIO_NOIOMMU, as root, on hugepages"
        }
    };
    Finding::fine(AREA, says).run(format!("foliant bind {} --noiommu", address_word(subject)))
}

fn is_virtual(cpu: &str) -> bool {
    cpu.lines()
        .any(|line| line.starts_with("flags") && line.split_whitespace().any(|flag| flag == "hypervisor"))
}

/// The kernel gives no device away while a device could send any interrupt to any processor.
fn interrupts(subject: &Subject<'_>) -> Option<Finding> {
    let cpu = subject.text("proc/cpuinfo")?;
    let interrupts = subject.text("proc/interrupts")?;
    let is_x86 = cpu.contains("GenuineIntel") || cpu.contains("AuthenticAMD");
    let allows_unsafe =
        subject.text("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts").as_deref()
            == Some("Y");
    if !is_x86 || interrupts.contains(" IR-") {
        return None;
    }
    if allows_unsafe {
        return Some(Finding::slows(
            AREA,
            "interrupts aren't remapped, and vfio was told to go on (allow_unsafe_interrupts): a device can send any \
             interrupt to any processor",
        ));
    }
    Some(
        Finding::blocks(
            AREA,
            "interrupts aren't remapped, so the kernel gives no device away: switch interrupt remapping (x2APIC) \
             on in the firmware's setup, or, where all who use this machine are trusted:",
        )
        .run("echo options vfio_iommu_type1 allow_unsafe_interrupts=1 > /etc/modprobe.d/foliant.conf")
        .run("modprobe -r vfio_iommu_type1; modprobe vfio_iommu_type1"),
    )
}
