//! The device that a command works on: from its URI, past the checks that protect other people's data, to an open
//! controller.

use std::fs::File;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use foliant::{CommandError, Mapping};
use foliant_nvme::StatusCode;
use foliant_nvme_emulated::{Backing, ConfigError, EmulatedConfig, EmulatedController};

use crate::error::Error;
use crate::image;

/// A device URI that can be understood.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    uri: String,
    config: EmulatedConfig,
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
}

impl FromStr for Target {
    type Err = ConfigError;

    fn from_str(uri: &str) -> Result<Self, ConfigError> {
        Ok(Self { uri: uri.to_owned(), config: EmulatedConfig::parse_uri(uri)? })
    }
}

impl Target {
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    pub(crate) fn medium(&self) -> Medium<'_> {
        match &self.config.backing {
            Backing::Null => Medium::Nothing,
            Backing::Ram => Medium::Memory,
            Backing::File { path, .. } => Medium::Image(path),
        }
    }

    /// Size of the first namespace in bytes, told without opening or creating anything.
    pub(crate) fn namespace_bytes(&self) -> Result<u64, Error> {
        let size = self.config.namespaces.first().and_then(|namespace| namespace.size_bytes);
        match (size, self.medium()) {
            (Some(size_bytes), _) => Ok(size_bytes),
            (None, Medium::Image(path)) if path.exists() => {
                Ok(std::fs::metadata(path).map_err(Error::file("inspect", path))?.len())
            }
            // Opening says what is missing.
            _ => self.open().map(|_| 0),
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

    /// Where the first data lies in the image; `None` when the device is new, or holds zeroes only.
    pub(crate) fn first_data(&self) -> Result<Option<u64>, Error> {
        let Medium::Image(path) = self.medium() else { return Ok(None) };
        if !path.is_file() {
            // Missing, or something that opening refuses.
            return Ok(None);
        }
        let file = File::open(path).map_err(Error::file("open", path))?;
        image::first_data(&file).map_err(Error::file("look for data in", path))
    }

    /// Refuses an image that holds data, for a `command` that would overwrite it.
    pub(crate) fn require_empty(&self, command: &'static str) -> Result<(), Error> {
        match (self.first_data()?, self.medium()) {
            (Some(offset), Medium::Image(path)) => {
                Err(Error::ForeignImage { path: path.to_owned(), offset, command })
            }
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

    /// Opens the device, creating its image where the URI says how large.
    pub(crate) fn open(&self) -> Result<Arc<EmulatedController>, Error> {
        Ok(EmulatedController::new(self.config.clone())?)
    }
}
