//! The kernel's modules: which are there, and where those come from that aren't.

use super::Subject;
use super::finding::Finding;

const AREA: &str = "kernel modules";
/// What the driver needs, by the names of their files.
const NEEDED: [&str; 3] = ["vfio", "vfio_iommu_type1", "vfio-pci"];
/// The newer interface, which is used where it's there.
const NEWER: &str = "iommufd";

pub(super) fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let release = subject.text("proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = Kernel::of(subject, &release);
    let with_state = |wanted: State| {
        NEEDED.iter().copied().filter(|module| kernel.state(subject, module) == wanted).collect::<Vec<_>>()
    };
    let mut findings = Vec::new();
    let (present, loadable, missing) =
        (with_state(State::Present), with_state(State::Loadable), with_state(State::Missing));
    if !present.is_empty() {
        findings.push(Finding::fine(AREA, format!("{}: loaded, or part of the kernel", present.join(", "))));
    }
    if !loadable.is_empty() {
        findings.push(not_loaded(subject, &loadable, kernel.state(subject, NEWER)));
    }
    if !missing.is_empty() {
        findings.push(kernel.obtain(subject, &release, &missing.join(", ")));
    }
    let says = match kernel.state(subject, NEWER) {
        State::Present => "iommufd: loaded, or part of the kernel",
        State::Loadable => "iommufd: there; the driver does with and without it (modprobe iommufd)",
        State::Missing => "iommufd: not in this kernel; the driver does without",
    };
    findings.push(Finding::fine(AREA, says));
    findings
}

/// Modules that are there: the bind loads them, unless it has been without them.
fn not_loaded(subject: &Subject<'_>, modules: &[&str], newer: State) -> Finding {
    let names = modules.join(", ");
    let is_bound = subject.controllers.iter().any(|function| function.is_on_vfio() && !function.noiommu);
    if !is_bound || newer == State::Present {
        return Finding::fine(AREA, format!("{names}: there, and loaded by foliant bind"));
    }
    let finding =
        Finding::blocks(AREA, format!("{names}: there, but not loaded, and a controller is bound already"));
    modules.iter().fold(finding, |finding, module| finding.run(format!("modprobe {module}")))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Present,
    Loadable,
    Missing,
}

/// What the running kernel's directory of modules lists.
struct Kernel {
    /// `None` where the kernel has no such directory here.
    loadable: Option<String>,
    built_in: String,
}

impl Kernel {
    fn of(subject: &Subject<'_>, release: &str) -> Self {
        let file = |name: &str| {
            let directories = ["lib/modules", "usr/lib/modules"];
            directories.iter().find_map(|directory| subject.text(format!("{directory}/{release}/{name}")))
        };
        Self { loadable: file("modules.dep"), built_in: file("modules.builtin").unwrap_or_default() }
    }

    fn state(&self, subject: &Subject<'_>, module: &str) -> State {
        let lists = |list: &str| {
            let file = format!("/{module}.ko");
            list.lines().any(|line| line.split(':').next().unwrap_or_default().contains(&file))
        };
        let is_driver = subject.exists(format!("sys/bus/pci/drivers/{module}"));
        let is_loaded = subject.exists(format!("sys/module/{}", module.replace('-', "_")));
        if is_driver || is_loaded || lists(&self.built_in) {
            State::Present
        } else if self.loadable.as_deref().is_some_and(lists) {
            State::Loadable
        } else {
            State::Missing
        }
    }

    /// Where missing modules come from, by distribution.
    fn obtain(&self, subject: &Subject<'_>, release: &str, modules: &str) -> Finding {
        let Some(_) = &self.loadable else {
            return Finding::blocks(
                AREA,
                format!(
                    "{modules}: not here, and there is no /lib/modules/{release}; inside a container, run this on \
                     the host; else this kernel was made without modules: boot the distribution's, or one with \
                     CONFIG_VFIO_PCI, CONFIG_VFIO_IOMMU_TYPE1 and CONFIG_INTEL_IOMMU or CONFIG_AMD_IOMMU"
                ),
            );
        };
        let distribution = subject.text("etc/os-release").unwrap_or_default();
        let is = |name: &str| {
            let ids =
                distribution.lines().filter(|line| line.starts_with("ID=") || line.starts_with("ID_LIKE="));
            ids.flat_map(|line| line.split(['=', '"', ' '])).any(|word| word == name)
        };
        let finding = Finding::blocks(AREA, format!("{modules}: not in the kernel {release}"));
        if is("ubuntu") {
            finding.run(format!("apt install linux-modules-extra-{release}"))
        } else if is("debian") {
            finding.run("apt install linux-image-amd64").reboot()
        } else if is("fedora") || is("rhel") || is("centos") {
            finding.run(format!("dnf install kernel-modules-{release}"))
        } else {
            let says = format!("{}; boot one with CONFIG_VFIO_PCI and CONFIG_VFIO_IOMMU_TYPE1", finding.says);
            Finding { says, ..finding }
        }
    }
}
