//! From a device's URI to its transport. The one place of the engine that knows which transports there are.

use std::sync::Arc;

use foliant_nvme::Transport;
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};
use foliant_nvme_vfio::{VfioError, VfioUri};

use crate::error::{Error, Result};

/// What a device URI looks like.
const FORMS: &str = "vfio:0000:01:00.0, emu:PATH?size=SIZE, emu:ram?size=SIZE or emu:null?size=SIZE";

/// Opens the transport that a device URI names, for who wants to drive the controller without the engine.
///
/// # Errors
/// [`Error::Uri`] says what the URI or the device lacks, and what helps.
pub fn transport(uri: &str) -> Result<Arc<dyn Transport>> {
    let wrong = |reason: String| Error::Uri { uri: uri.to_owned(), reason };
    match uri.split_once(':') {
        Some(("emu", _)) => {
            let config = EmulatedConfig::parse_uri(uri).map_err(|error| wrong(error.to_string()))?;
            let controller = EmulatedController::new(config).map_err(|error| wrong(error.to_string()))?;
            controller.attach().map_err(|error| wrong(error.to_string()))
        }
        Some((scheme, _)) if VfioUri::SCHEMES.contains(&scheme) => {
            let transport = foliant_nvme_vfio::open(uri).map_err(|error| match error {
                VfioError::Uri(error) => wrong(error.reason),
                error => wrong(error.to_string()),
            })?;
            Ok(transport)
        }
        Some((scheme, _)) => Err(wrong(format!("the scheme {scheme:?} is not known; use {FORMS}"))),
        None => Err(wrong(format!("a device URI begins with its scheme: {FORMS}"))),
    }
}
