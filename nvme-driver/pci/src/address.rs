//! Where a function sits on the PCI buses of a host.

use std::fmt;
use std::str::FromStr;

/// Devices on a bus (PCI Local Bus Specification 3.0, section 6.1): a number of five bits.
const DEVICE_MAX: u8 = 0x1f;
/// Functions of a device: a number of three bits.
const FUNCTION_MAX: u8 = 7;

/// The address of a PCI function, as `lspci -D` and sysfs write it: `0000:01:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// The PCI domain (segment). More than 16 bits wide behind bridges such as Intel's VMD.
    pub domain: u32,
    /// The bus in the domain.
    pub bus: u8,
    /// The device on the bus, at most 1fh.
    pub device: u8,
    /// The function of the device, at most 7.
    pub function: u8,
}

/// A text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no PCI address: {reason}; write DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal, such as 0000:01:00.0 or \
     01:00.0, as `foliant devices` shows it"
)]
pub struct AddressError {
    text: String,
    reason: String,
}

impl FromStr for PciAddress {
    type Err = AddressError;

    /// Reads `0000:01:00.0`, or `01:00.0` in domain 0, in hexadecimal.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        parse(text).map_err(|reason| AddressError { text: text.to_owned(), reason })
    }
}

fn parse(text: &str) -> Result<PciAddress, String> {
    let (place, function) = text.rsplit_once('.').ok_or("there is no dot before a function")?;
    let parts: Vec<&str> = place.split(':').collect();
    let (domain, bus, device) = match parts[..] {
        [domain, bus, device] => (domain, bus, device),
        [bus, device] => ("0", bus, device),
        _ => return Err(format!("{} colons where one or two belong", parts.len() - 1)),
    };
    let byte = |what, digits, digits_max, max: u8| {
        let number = number(what, digits, digits_max, u32::from(max))?;
        Ok::<u8, String>(u8::try_from(number).unwrap_or(max))
    };
    Ok(PciAddress {
        domain: number("domain", domain, 8, u32::MAX)?,
        bus: byte("bus", bus, 2, u8::MAX)?,
        device: byte("device", device, 2, DEVICE_MAX)?,
        function: byte("function", function, 1, FUNCTION_MAX)?,
    })
}

fn number(what: &str, digits: &str, digits_max: usize, max: u32) -> Result<u32, String> {
    // `from_str_radix` would take a sign as well.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(format!("the {what} `{digits}` is no hexadecimal number"));
    }
    if digits.len() > digits_max {
        return Err(format!("the {what} `{digits}` has more than {digits_max} digits"));
    }
    let value = u32::from_str_radix(digits, 16).map_err(|error| error.to_string())?;
    if value > max {
        return Err(format!("the {what} {value:x} is beyond {max:x}"));
    }
    Ok(value)
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_a_domain() {
        let cases = [
            ("0000:01:00.0", (0, 1, 0, 0)),
            ("01:00.0", (0, 1, 0, 0)),
            ("ff:1f.7", (0, 0xff, 0x1f, 7)),
            ("10000:E1:00.0", (0x10000, 0xe1, 0, 0)),
            ("0:4:3.1", (0, 4, 3, 1)),
        ];
        for (text, (domain, bus, device, function)) in cases {
            assert_eq!(text.parse(), Ok(PciAddress { domain, bus, device, function }), "{text}");
        }
    }

    #[test]
    fn addresses_are_shown_as_sysfs_names_them() {
        for text in ["0000:01:00.0", "10000:e1:1f.7", "ffffffff:00:0a.3"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_named_with_the_reason_and_the_form() {
        let cases = [
            ("", "no dot"),
            ("nvme0", "no dot"),
            ("01:00", "no dot"),
            ("00.0", "0 colons"),
            ("1:2:3:4.5", "3 colons"),
            ("0000:01:20.0", "device 20 is beyond 1f"),
            ("0000:01:00.8", "function 8 is beyond 7"),
            ("0000:01:00.", "function `` is no"),
            ("0000:01:00.00", "more than 1 digits"),
            ("0000:100:00.0", "bus `100` has more than 2"),
            ("0000:+1:00.0", "bus `+1`"),
            ("0000:0g:00.0", "bus `0g`"),
            ("123456789:00:00.0", "more than 8"),
            (" 01:00.0", "bus ` 01`"),
        ];
        for (text, words) in cases {
            let message = text.parse::<PciAddress>().unwrap_err().to_string();
            assert!(message.contains(words) && message.contains("0000:01:00.0"), "{text}: {message}");
        }
    }

    #[test]
    fn addresses_are_ordered_as_they_are_read() {
        let mut texts = ["10000:00:00.0", "0000:02:00.0", "0000:01:1f.0", "0000:01:02.7", "0000:01:02.0"];
        texts.sort_by_key(|text| text.parse::<PciAddress>().unwrap());
        assert_eq!(texts, ["0000:01:02.0", "0000:01:02.7", "0000:01:1f.0", "0000:02:00.0", "10000:00:00.0"]);
    }
}
