//! Sizes in bytes as people write and read them.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// A number of bytes. As JSON it's the plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub(crate) struct ByteSize(pub(crate) u64);

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    #[error(
        "`{0}` is no size; write whole bytes, or a number with KiB, MiB, GiB or TiB (powers of 1024), such as \
         4096, 64KiB or 256MiB"
    )]
    Unreadable(String),
    #[error("`{0}` exceeds {max} bytes; write a smaller size, such as 16TiB", max = u64::MAX)]
    TooLarge(String),
    #[error("`{0}` is nothing; write at least one byte, such as 4096, 64KiB or 256MiB")]
    Zero(String),
}

impl FromStr for ByteSize {
    type Err = SizeError;

    /// Reads digits and a unit: none or `B`, or one of K, M, G, T with an optional `B` or `iB`, all of them powers
    /// of 1024, in any case.
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let unreadable = || SizeError::Unreadable(text.to_owned());
        let too_large = || SizeError::TooLarge(text.to_owned());
        let trimmed = text.trim();
        let digits_end = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(digits_end);
        if digits.is_empty() {
            return Err(unreadable());
        }
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(unreadable()),
        };
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        match number.checked_mul(1 << shift).ok_or_else(too_large)? {
            0 => Err(SizeError::Zero(text.to_owned())),
            bytes => Ok(Self(bytes)),
        }
    }
}

impl fmt::Display for ByteSize {
    /// In the largest unit that leaves at least one: `512 B`, `4 KiB`, `1.5 MiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match units.into_iter().find(|(unit, _)| self.0 >= *unit) {
            None => write!(f, "{} B", self.0),
            Some((unit, name)) if self.0.is_multiple_of(unit) => write!(f, "{} {name}", self.0 / unit),
            Some((unit, name)) => write!(f, "{:.1} {name}", self.0 as f64 / unit as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_bytes_and_powers_of_1024() {
        let cases = [
            ("512", 512),
            ("512B", 512),
            ("4k", 4096),
            ("4KiB", 4096),
            ("4 KiB", 4096),
            ("256MiB", 256 << 20),
            ("3MB", 3 << 20),
            ("1g", 1 << 30),
            ("2TiB", 2 << 40),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_named_with_the_forms_accepted() {
        for text in ["", "MiB", "-1", "1.5GiB", "12 bananas", "1GiBs", "0x10"] {
            let message = text.parse::<ByteSize>().unwrap_err().to_string();
            assert!(message.contains(&format!("`{text}`")) && message.contains("256MiB"), "{message}");
        }
    }

    #[test]
    fn sizes_beyond_64_bits_and_none_at_all_are_refused() {
        assert!(matches!("20000000TiB".parse::<ByteSize>(), Err(SizeError::TooLarge(_))));
        assert!(matches!("99999999999999999999".parse::<ByteSize>(), Err(SizeError::TooLarge(_))));
        assert!(matches!("0MiB".parse::<ByteSize>(), Err(SizeError::Zero(_))));
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        let cases =
            [(0, "0 B"), (512, "512 B"), (4096, "4 KiB"), (1536 << 10, "1.5 MiB"), (40 << 30, "40 GiB")];
        for (bytes, text) in cases {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }
}
