//! What names a device: `vfio:ADDRESS`, `vfio-noiommu:ADDRESS`.

use std::fmt;
use std::str::FromStr;

use foliant_nvme_pci::PciAddress;

/// By which of the kernel's interfaces the device is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interface {
    /// The device's own node with iommufd where the kernel has both and lets us open them, else the group.
    #[default]
    Automatic,
    /// The group's node and a type 1 container: every kernel since 3.6.
    Group,
    /// The device's own node (`/dev/vfio/devices/vfioN`) and `/dev/iommu`: since Linux 6.6.
    Iommufd,
    /// The group's node without an IOMMU: the device can reach all memory of the machine.
    NoIommu,
}

/// A device URI, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfioUri {
    /// The controller's PCI address.
    pub address: PciAddress,
    /// How to open it.
    pub interface: Interface,
}

/// Why a URI could not be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?}: {reason}")]
pub struct UriError {
    /// The URI as given.
    pub uri: String,
    /// What is wrong with it, and what is right.
    pub reason: String,
}

impl VfioUri {
    /// The schemes that this transport serves.
    pub const SCHEMES: [&str; 2] = ["vfio", "vfio-noiommu"];
}

impl FromStr for VfioUri {
    type Err = UriError;

    /// Parses `vfio:ADDRESS[?iommu=group|iommufd]` and `vfio-noiommu:ADDRESS`, where ADDRESS is
    /// `0000:01:00.0`, or `01:00.0` in domain 0.
    fn from_str(uri: &str) -> Result<Self, UriError> {
        let wrong = |reason: String| UriError { uri: uri.to_owned(), reason };
        let form =
            "use vfio:0000:01:00.0, vfio:0000:01:00.0?iommu=group|iommufd or vfio-noiommu:0000:01:00.0";
        let (scheme, rest) =
            uri.split_once(':').ok_or_else(|| wrong(format!("there is no scheme; {form}")))?;
        let (address, query) =
            rest.split_once('?').map_or((rest, None), |(address, query)| (address, Some(query)));
        let address = address.parse().map_err(|error| wrong(format!("{error}; {form}")))?;
        let interface = match (scheme, query) {
            ("vfio", None) => Interface::Automatic,
            ("vfio", Some("iommu=group")) => Interface::Group,
            ("vfio", Some("iommu=iommufd")) => Interface::Iommufd,
            ("vfio-noiommu", None) => Interface::NoIommu,
            ("vfio" | "vfio-noiommu", Some(query)) => {
                return Err(wrong(format!("the parameter {query:?} is not known; {form}")));
            }
            _ => return Err(wrong(format!("the scheme {scheme:?} is not known; {form}"))),
        };
        Ok(Self { address, interface })
    }
}

impl fmt::Display for VfioUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, query) = match self.interface {
            Interface::Automatic => ("vfio", ""),
            Interface::Group => ("vfio", "?iommu=group"),
            Interface::Iommufd => ("vfio", "?iommu=iommufd"),
            Interface::NoIommu => ("vfio-noiommu", ""),
        };
        write!(f, "{scheme}:{}{query}", self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_understood_and_printed_again() {
        let forms = [
            ("vfio:0000:01:00.0", Interface::Automatic),
            ("vfio:0000:01:00.0?iommu=group", Interface::Group),
            ("vfio:0000:01:00.0?iommu=iommufd", Interface::Iommufd),
            ("vfio-noiommu:0000:01:00.0", Interface::NoIommu),
        ];
        for (text, interface) in forms {
            let uri: VfioUri = text.parse().unwrap();
            assert_eq!(uri.interface, interface);
            assert_eq!(uri.to_string(), text);
        }
        assert_eq!("vfio:01:00.0".parse::<VfioUri>().unwrap().to_string(), "vfio:0000:01:00.0");
    }

    #[test]
    fn a_wrong_uri_is_told_with_the_right_form() {
        for text in [
            "vfio",
            "vfio:",
            "vfio:nvme0",
            "vfio:01:00.9",
            "vfio:01:00.0?iommu=off",
            "pci:01:00.0",
            "vfio-noiommu:01:00.0?iommu=group",
        ] {
            let error = text.parse::<VfioUri>().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("vfio:0000:01:00.0"), "{error}");
        }
    }
}
