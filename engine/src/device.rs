//! From a device's URI to its transport. The one place of the engine that knows which transports there are.

use std::sync::Arc;

use foliant_nvme::Transport;
use foliant_nvme_emulated::{EmulatedConfig, EmulatedController};

use crate::error::{Error, Result};

/// Opens the transport that `uri` names.
pub(crate) fn transport(uri: &str) -> Result<Arc<dyn Transport>> {
    let wrong = |reason: String| Error::Uri { uri: uri.to_owned(), reason };
    match uri.split_once(':') {
        Some(("emu", _)) => {
            let config = EmulatedConfig::parse_uri(uri).map_err(|error| wrong(error.to_string()))?;
            let controller = EmulatedController::new(config).map_err(|error| wrong(error.to_string()))?;
            controller.attach().map_err(|error| wrong(error.to_string()))
        }
        Some((scheme, _)) => Err(wrong(format!(
            "the scheme {scheme:?} is not known; use emu:PATH?size=SIZE, emu:ram?size=SIZE or emu:null?size=SIZE"
        ))),
        None => Err(wrong(
            "a device URI begins with its scheme: emu:PATH?size=SIZE, emu:ram?size=SIZE or emu:null?size=SIZE".into(),
        )),
    }
}
