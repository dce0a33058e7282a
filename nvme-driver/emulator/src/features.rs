//! Features that are plain values: checked, kept, returned (Base section 5.1.25).
//!
//! Number of Queues and Volatile Write Cache do something, and live where they do it; nothing is saved over resets.

use foliant_nvme_spec::StatusCode;
use foliant_nvme_spec::feature::FeatureId;

/// Values of the features that this controller keeps without acting on them.
#[derive(Debug)]
pub(crate) struct Features {
    values: [(FeatureId, u32); 8],
}

impl Default for Features {
    fn default() -> Self {
        Self {
            values: [
                (FeatureId::ARBITRATION, 0),
                (FeatureId::POWER_MANAGEMENT, 0),
                // The over-temperature threshold, in kelvins: WCTEMP.
                (FeatureId::TEMPERATURE_THRESHOLD, 343),
                (FeatureId::ERROR_RECOVERY, 0),
                (FeatureId::INTERRUPT_COALESCING, 0),
                (FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 0),
                (FeatureId::WRITE_ATOMICITY_NORMAL, 0),
                (FeatureId::ASYNCHRONOUS_EVENT_CONFIGURATION, 0),
            ],
        }
    }
}

impl Features {
    pub(crate) fn value(&self, id: FeatureId) -> Result<u32, StatusCode> {
        let found = self.values.iter().find(|(known, _)| *known == id);
        found.map(|(_, value)| *value).ok_or(StatusCode::INVALID_FIELD)
    }

    pub(crate) fn set(&mut self, id: FeatureId, value: u32) -> Result<(), StatusCode> {
        // There is one power state, number 0.
        if id == FeatureId::POWER_MANAGEMENT && value & 0x1F != 0 {
            return Err(StatusCode::INVALID_FIELD);
        }
        let found = self.values.iter_mut().find(|(known, _)| *known == id);
        let (_, slot) = found.ok_or(StatusCode::INVALID_FIELD)?;
        *slot = value;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_features_keep_their_value_and_unknown_ones_are_refused() {
        let mut features = Features::default();
        assert_eq!(features.set(FeatureId::ARBITRATION, 7), Ok(()));
        assert_eq!(features.value(FeatureId::ARBITRATION), Ok(7));
        assert_eq!(features.set(FeatureId(0xC0), 1), Err(StatusCode::INVALID_FIELD));
        assert_eq!(features.set(FeatureId::POWER_MANAGEMENT, 1), Err(StatusCode::INVALID_FIELD));
    }
}
