//! The device that a command works on: from its URI, past the checks that protect other people's data, to an open
//! controller.

use std::fs::File;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use foliant::{CommandError, Mapping};
use foliant_nvme::{Controller, ControllerOptions, StatusCode, Transport};
use foliant_nvme_emulated::{Backing, EmulatedConfig, EmulatedController};
use foliant_nvme_pci::PciAddress;
use foliant_nvme_vfio::VfioUri;

use crate::error::Error;
use crate::image;

/// A device URI that can be understood.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    uri: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Emulated(EmulatedConfig),
    Drive(VfioUri),
}

/// Where the device's blocks live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Medium<'a> {
    /// Nowhere: what is written is not kept.
    Nothing,
    /// In memory that is new with each run.
    Memory,
    /// In this raw image file, namespaces one after another.
    Image(&'a Path),
    /// On a drive of its own.
    Drive,
}

/// A device that can be driven, again and again.
pub(crate) enum Device {
    Emulated(Arc<EmulatedController>),
    Drive(VfioUri),
}

impl Device {
    /// Takes the device over, until the transport is dropped.
    pub(crate) fn attach(&self) -> Result<Arc<dyn Transport>, Error> {
        match self {
            Self::Emulated(controller) => Ok(controller.attach()?),
            Self::Drive(uri) => Ok(foliant_nvme_vfio::VfioTransport::open(uri)?),
        }
    }

    /// The emulated controller, if it is one.
    pub(crate) fn emulated(&self) -> Option<&Arc<EmulatedController>> {
        match self {
            Self::Emulated(controller) => Some(controller),
            Self::Drive(_) => None,
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(uri: &str) -> Result<Self, String> {
        let scheme = uri.split_once(':').map_or("", |(scheme, _)| scheme);
        let kind = if VfioUri::SCHEMES.contains(&scheme) {
            Kind::Drive(uri.parse().map_err(|error: foliant_nvme_vfio::UriError| error.reason)?)
        } else {
            Kind::Emulated(EmulatedConfig::parse_uri(uri).map_err(|error| error.to_string())?)
        };
        Ok(Self { uri: uri.to_owned(), kind })
    }
}

impl Target {
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Where a drive is on PCI.
    pub(crate) fn pci_address(&self) -> Option<PciAddress> {
        match &self.kind {
            Kind::Emulated(_) => None,
            Kind::Drive(uri) => Some(uri.address),
        }
    }

    pub(crate) fn medium(&self) -> Medium<'_> {
        match &self.kind {
            Kind::Drive(_) => Medium::Drive,
            Kind::Emulated(config) => match &config.backing {
                Backing::Null => Medium::Nothing,
                Backing::Ram => Medium::Memory,
                Backing::File { path, .. } => Medium::Image(path),
            },
        }
    }

    /// Size of the first namespace in bytes, told without creating anything.
    pub(crate) fn namespace_bytes(&self) -> Result<u64, Error> {
        if let (Kind::Emulated(config), Medium::Image(path)) = (&self.kind, self.medium())
            && config.namespaces.first().is_none_or(|namespace| namespace.size_bytes.is_none())
            && path.exists()
        {
            return Ok(std::fs::metadata(path).map_err(Error::file("inspect", path))?.len());
        }
        match &self.kind {
            Kind::Emulated(config) => {
                let size = config.namespaces.first().and_then(|namespace| namespace.size_bytes);
                // Opening says what is missing.
                size.map_or_else(|| self.open().map(|_| 0), Ok)
            }
            Kind::Drive(_) => {
                let options = ControllerOptions {
                    io_queue_pairs: 1,
                    io_queue_entries: 2,
                    arena_bytes: 0,
                    ..ControllerOptions::default()
                };
                let controller = Controller::open(self.open()?.attach()?, &options)?;
                let first = controller.namespaces().first();
                let bytes = first.map_or(0, |first| first.blocks() * u64::from(first.block_bytes()));
                controller.shutdown()?;
                Ok(bytes)
            }
        }
    }

    /// Refuses an image that isn't there, for a `command` that shouldn't create one.
    pub(crate) fn require_existing(&self, command: &'static str) -> Result<(), Error> {
        match self.medium() {
            Medium::Image(path) if !path.exists() => {
                Err(Error::ImageMissing { path: path.to_owned(), command })
            }
            _ => Ok(()),
        }
    }

    /// Whether there is something to look at: an image file that isn't there would be created by a look.
    pub(crate) fn medium_exists(&self) -> bool {
        !matches!(self.medium(), Medium::Image(path) if !path.exists())
    }

    /// Whether the device is known to hold nothing but zeroes: it is new, or an image without data.
    pub(crate) fn is_blank(&self) -> Result<bool, Error> {
        Ok(self.medium() != Medium::Drive && self.first_data()?.is_none())
    }

    /// Where the first data lies in the image; `None` when the device is new, or holds zeroes only.
    fn first_data(&self) -> Result<Option<u64>, Error> {
        let Medium::Image(path) = self.medium() else { return Ok(None) };
        if !path.is_file() {
            // Missing, or something that opening refuses.
            return Ok(None);
        }
        let file = File::open(path).map_err(Error::file("open", path))?;
        image::first_data(&file).map_err(Error::file("look for data in", path))
    }

    /// Refuses an image that holds data, or a drive, for a `command` that would overwrite it.
    pub(crate) fn require_empty(&self, command: &'static str) -> Result<(), Error> {
        match (self.first_data()?, self.medium()) {
            (Some(offset), Medium::Image(path)) => {
                Err(Error::ForeignImage { path: path.to_owned(), offset, command })
            }
            (_, Medium::Drive) => Err(Error::ForeignDrive { uri: self.uri.clone(), command }),
            _ => Ok(()),
        }
    }

    /// The cause of an error on this device, with what helps. A `mapping` whose cache is full of pages that can't be
    /// written says only that; why they can't be written is told by a sync.
    pub(crate) fn diagnose(&self, error: Error, mapping: Option<&Mapping>) -> Error {
        let error = match (error, mapping) {
            (Error::Engine(full @ foliant::Error::CacheFull { .. }), Some(mapping)) => {
                mapping.sync().err().unwrap_or(full).into()
            }
            (error, _) => error,
        };
        let status = match &error {
            Error::Engine(foliant::Error::Device { source: CommandError::Status(status), .. })
            | Error::Command(CommandError::Status(status)) => *status,
            _ => return error,
        };
        match self.medium() {
            Medium::Image(path) if status.code() == StatusCode::CAPACITY_EXCEEDED => {
                Error::NoSpace { path: path.to_owned(), status }
            }
            _ => error,
        }
    }

    /// Opens the device, creating its image where the URI says how large. A drive is taken over by
    /// [`attach`](Device::attach) only.
    pub(crate) fn open(&self) -> Result<Device, Error> {
        Ok(match &self.kind {
            Kind::Emulated(config) => Device::Emulated(EmulatedController::new(config.clone())?),
            Kind::Drive(uri) => Device::Drive(*uri),
        })
    }
}
