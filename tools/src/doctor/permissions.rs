//! Whether the user may open VFIO's nodes.

use std::path::Path;

use foliant_nvme_pci::PciFunction;

use super::Subject;
use super::finding::Finding;

const AREA: &str = "permissions";
/// The node to which groups are joined; everybody may open it, by the kernel's choice.
const CONTAINER: &str = "dev/vfio/vfio";
/// The same for the newer interface; root's alone.
const IOMMUFD: &str = "dev/iommu";

pub(super) fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let user = &subject.account.name;
    if subject.account.is_root() {
        return vec![Finding::fine(AREA, format!("{user} may open all nodes"))];
    }
    let bound = || subject.controllers.iter().filter(|function| function.is_on_vfio());
    let mut findings: Vec<Finding> = bound().map(|function| device(subject, function)).collect();
    if bound().next().is_none() {
        let says =
            format!("the nodes appear with foliant bind ADDRESS --owner {user}, which gives them to {user}");
        findings.push(Finding::fine(AREA, says));
    }
    if subject.exists(CONTAINER) && !may_use(subject, &subject.host.path(CONTAINER)) {
        let says = format!("{user} may not open /{CONTAINER}, which everybody may by default");
        findings.push(Finding::blocks(AREA, says).run(format!("chmod 0666 /{CONTAINER}")));
    }
    findings
}

fn device(subject: &Subject<'_>, function: &PciFunction) -> Finding {
    let (user, address) = (&subject.account.name, function.address);
    if function.noiommu {
        let says = format!(
            "{address} has no IOMMU before it, so root alone (CAP_SYS_RAWIO) may open it, and not {user}: run the \
             database as root"
        );
        return Finding::blocks(AREA, says);
    }
    match (function.group_node().filter(|node| node.exists()), &function.vfio_cdev) {
        (Some(group), _) if may_use(subject, group) => {
            Finding::fine(AREA, format!("{user} may open {}", group.display()))
        }
        (Some(group), _) => Finding::blocks(AREA, format!("{user} may not open {}", group.display()))
            .run(format!("foliant bind {address} --owner {user}")),
        (None, Some(cdev)) => by_iommufd(subject, function, cdev),
        (None, None) => Finding::blocks(
            AREA,
            format!(
                "{address} is on vfio-pci, but has no node under /dev/vfio; is /dev a devtmpfs, and not a \
                 container's?"
            ),
        ),
    }
}

/// A kernel without group nodes.
fn by_iommufd(subject: &Subject<'_>, function: &PciFunction, cdev: &Path) -> Finding {
    let user = &subject.account.name;
    if !may_use(subject, cdev) {
        return Finding::blocks(AREA, format!("{user} may not open {}", cdev.display()))
            .run(format!("foliant bind {} --owner {user}", function.address));
    }
    if !may_use(subject, &subject.host.path(IOMMUFD)) {
        return Finding::blocks(
            AREA,
            format!("{user} may not open /{IOMMUFD}, by which this kernel does VFIO"),
        )
        .run(format!("setfacl -m u:{user}:rw /{IOMMUFD}"));
    }
    Finding::fine(AREA, format!("{user} may open {} and /{IOMMUFD}", cdev.display()))
}

/// Whether the user may open a node; one that isn't there may not be opened.
fn may_use(subject: &Subject<'_>, node: &Path) -> bool {
    subject.account.may_use(node).unwrap_or(false)
}
