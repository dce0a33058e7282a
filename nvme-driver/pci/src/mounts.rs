//! What is mounted and what is swapped to, from procfs.

use crate::error::PciError;
use crate::host::{Host, attribute};
use crate::node::DeviceNumber;

/// A line of `mountinfo` (proc(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// The device, or an anonymous number (major 0) where the file system has several devices or none.
    pub(crate) number: DeviceNumber,
    /// Where it's mounted.
    pub(crate) at: String,
    source: String,
}

impl Mount {
    /// What the mount names as its devices: bcachefs names several with colons between them.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &str> {
        self.source.split(':').filter(|source| source.starts_with("/dev/"))
    }
}

/// The lines of a `mountinfo` that can be understood.
pub(crate) fn parse(table: &str) -> impl Iterator<Item = Mount> {
    table.lines().filter_map(parse_line)
}

/// Reads `36 35 98:0 /root /at rw,noatime master:1 - ext3 /dev/source rw`: before the dash there may be any number of
/// optional fields.
fn parse_line(line: &str) -> Option<Mount> {
    let mut fields = line.split(' ');
    let number = DeviceNumber::parse(fields.nth(2)?)?;
    let at = unescape(fields.nth(1)?);
    let source = fields.skip_while(|field| *field != "-").nth(2).unwrap_or_default();
    Some(Mount { number, at, source: unescape(source) })
}

/// The paths of all swap areas.
pub(crate) fn swaps(host: &Host) -> Result<Vec<String>, PciError> {
    let table = attribute(&host.path("proc/swaps"))?.unwrap_or_default();
    let areas = table.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    Ok(areas.map(unescape).collect())
}

/// Undoes procfs's escapes: a backslash and three octal digits for what would break a line or a field.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match (byte, octal) {
            (b'\\', Some(digits)) => {
                let value = digits.iter().fold(0u32, |value, digit| value << 3 | u32::from(digit - b'0'));
                bytes.push(value as u8);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_past_any_number_of_optional_fields() {
        let table = "25 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n\
                     36 25 259:3 /sub /mnt/a rw master:1 propagate_from:2 unbindable - xfs /dev/x rw\n\
                     40 25 0:45 / /srv rw - btrfs /dev/sda:/dev/sdb rw\n\
                     41 25 0:22 / /proc rw - proc proc rw\n\
                     not a line at all\n";
        let mounts: Vec<Mount> = parse(table).collect();
        let at: Vec<(u32, u32, &str)> =
            mounts.iter().map(|mount| (mount.number.major, mount.number.minor, mount.at.as_str())).collect();
        assert_eq!(at, [(259, 2, "/"), (259, 3, "/mnt/a"), (0, 45, "/srv"), (0, 22, "/proc")]);
        assert_eq!(mounts[1].sources().collect::<Vec<_>>(), ["/dev/x"]);
        assert_eq!(mounts[2].sources().collect::<Vec<_>>(), ["/dev/sda", "/dev/sdb"]);
        assert_eq!(mounts[3].sources().count(), 0);
    }

    #[test]
    fn escapes_of_procfs_are_undone() {
        let cases = [
            ("/my\\040disk", "/my disk"),
            ("a\\134b", "a\\b"),
            ("\\303\\266", "ö"),
            ("a\\9", "a\\9"),
            ("\\", "\\"),
        ];
        for (text, plain) in cases {
            assert_eq!(unescape(text), plain);
        }
    }
}
