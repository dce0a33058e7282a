//! Data that tells where it belongs: any two places, and any two writes of one place, hold different bytes.

/// `len_bytes` bytes that belong to `seed`.
pub(super) fn of(seed: u64, len_bytes: usize) -> Vec<u8> {
    let mut data = Vec::with_capacity(len_bytes.next_multiple_of(8));
    let mut state = seed;
    while data.len() < len_bytes {
        data.extend_from_slice(&next(&mut state).to_le_bytes());
    }
    data.truncate(len_bytes);
    data
}

/// SplitMix64: one step a word, and every seed starts a sequence of its own.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}
