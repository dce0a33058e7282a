//! How words get onto the kernel's command line, by the boot loader that a host has.

use super::Subject;
use super::finding::Finding;

/// Adds the commands that put `words` onto the kernel's command line to a finding, and the reboot.
pub(super) fn with_words(subject: &Subject<'_>, finding: Finding, words: &str) -> Finding {
    let finding = match loader(subject) {
        Loader::Grubby => finding.run(format!("grubby --update-kernel=ALL --args=\"{words}\"")),
        Loader::Grub { make } => {
            // The file is a shell script, read after the distribution's own settings.
            let file = if subject.exists("etc/default/grub.d") {
                "/etc/default/grub.d/90-foliant.cfg"
            } else {
                "/etc/default/grub"
            };
            finding
                .run(format!("echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {words}\"' >> {file}"))
                .run(make)
        }
        Loader::KernelInstall => {
            finding.run(format!("sed -i 's/$/ {words}/' /etc/kernel/cmdline")).run("kernel-install add-all")
        }
        Loader::Unknown => Finding {
            says: format!(
                "{}; the boot loader isn't one that is known here: add {words} to its kernel command line",
                finding.says
            ),
            ..finding
        },
    };
    finding.reboot()
}

/// Adds the commands that take `word` from the kernel's command line to a finding, and the reboot.
pub(super) fn without_word(subject: &Subject<'_>, finding: Finding, word: &str) -> Finding {
    let finding = match loader(subject) {
        Loader::Grubby => finding.run(format!("grubby --update-kernel=ALL --remove-args=\"{word}\"")),
        Loader::Grub { make } => {
            finding.run(format!("sed -i 's/\\b{word}\\b//' /etc/default/grub")).run(make)
        }
        Loader::KernelInstall => finding
            .run(format!("sed -i 's/\\b{word}\\b//' /etc/kernel/cmdline"))
            .run("kernel-install add-all"),
        Loader::Unknown => Finding {
            says: format!("{}; take {word} from the kernel command line in the boot loader", finding.says),
            ..finding
        },
    };
    finding.reboot()
}

enum Loader {
    /// Fedora, RHEL, Amazon Linux.
    Grubby,
    /// Debian, Ubuntu, Arch, SUSE, with what writes its configuration.
    Grub {
        make: &'static str,
    },
    /// `systemd-boot`.
    KernelInstall,
    Unknown,
}

fn loader(subject: &Subject<'_>) -> Loader {
    let has_program = |name: &str| {
        ["usr/sbin", "sbin", "usr/bin"].iter().any(|directory| subject.exists(format!("{directory}/{name}")))
    };
    if has_program("grubby") {
        Loader::Grubby
    } else if subject.exists("etc/default/grub") && has_program("update-grub") {
        Loader::Grub { make: "update-grub" }
    } else if subject.exists("etc/default/grub") && has_program("grub2-mkconfig") {
        Loader::Grub { make: "grub2-mkconfig -o /boot/grub2/grub.cfg" }
    } else if subject.exists("etc/default/grub") {
        Loader::Grub { make: "grub-mkconfig -o /boot/grub/grub.cfg" }
    } else if subject.exists("etc/kernel/cmdline") {
        Loader::KernelInstall
    } else {
        Loader::Unknown
    }
}
