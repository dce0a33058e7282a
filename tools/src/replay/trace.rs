//! Block traces: CSV files with the columns `version,time,op,size,lbn`, read whole before anything is replayed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::replay::stamp::SECTOR_BYTES;

const COLUMNS: [&str; 5] = ["version", "time", "op", "size", "lbn"];
/// The only version there is.
const VERSION: u64 = 1;
/// Nothing that is a trace has longer lines.
const LINE_BYTES_MAX: u64 = 4096;
const SECTOR: u64 = SECTOR_BYTES as u64;
/// A request's number has 32 bits, and 0 stands for none.
const REQUESTS_MAX: usize = u32::MAX as usize - 1;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// SCSI READ(10), 28h.
    Read,
    /// SCSI WRITE(10), 2Ah.
    Write,
}

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) op: Op,
    /// First sector.
    pub(crate) sector: u64,
    /// Number of sectors, at least one.
    pub(crate) sectors: u64,
    /// Where the request stands in the file.
    pub(crate) line: u64,
}

impl Request {
    /// The bytes that the request covers.
    pub(crate) fn bytes(&self) -> Range<u64> {
        self.sector * SECTOR..(self.sector + self.sectors) * SECTOR
    }
}

/// A trace that was read without an error.
#[derive(Debug)]
pub(crate) struct Trace {
    path: PathBuf,
    pub(crate) requests: Vec<Request>,
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Trace`] for one without the columns or requests, [`Error::TraceLine`] for the
    /// first line that is broken.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::file("open the trace", path))?;
        Self::parse(path, file)
    }

    fn parse(path: &Path, file: impl Read) -> Result<Self, Error> {
        let columns = COLUMNS.join(",");
        let mut reader = BufReader::new(file);
        let mut text = Vec::new();
        let mut requests = Vec::new();
        for line in 1.. {
            text.clear();
            let broken = |reason| Error::TraceLine { path: path.to_owned(), line, reason };
            let mut bounded = reader.by_ref().take(LINE_BYTES_MAX);
            let read = bounded.read_until(b'\n', &mut text).map_err(Error::file("read", path))? as u64;
            if read == LINE_BYTES_MAX {
                return Err(broken(format!("longer than {LINE_BYTES_MAX} bytes; is this a trace?")));
            }
            let content = text.trim_ascii();
            match line {
                1 if content != columns.as_bytes() => {
                    return Err(broken(format!("a trace begins with the line {columns}")));
                }
                1 => {}
                _ if read == 0 => break,
                _ if content.is_empty() => {}
                _ if requests.len() == REQUESTS_MAX => {
                    return Err(broken(format!("a replay takes {REQUESTS_MAX} requests; split the trace")));
                }
                _ => requests.push(parse_request(content, line).map_err(broken)?),
            }
        }
        if requests.is_empty() {
            let reason = format!("the trace has no requests; give one with the columns {columns}");
            return Err(Error::Trace { path: path.to_owned(), reason });
        }
        Ok(Self { path: path.to_owned(), requests })
    }

    /// The end of the farthest request.
    pub(crate) fn end_bytes(&self) -> u64 {
        self.requests.iter().map(|request| request.bytes().end).max().unwrap_or(0)
    }

    /// Checks that every request lies within a device of `device_bytes` bytes.
    pub(crate) fn check_fits(&self, device_bytes: u64) -> Result<(), Error> {
        let is_outside = |request: &&Request| request.bytes().end > device_bytes;
        let Some(outside) = self.requests.iter().find(is_outside) else { return Ok(()) };
        let needed = self.end_bytes();
        Err(Error::TraceLine {
            path: self.path.clone(),
            line: outside.line,
            reason: format!(
                "the request ends at byte {}, past the device's {device_bytes} bytes; the whole trace needs a device of \
                 at least {needed} bytes, such as size={}GiB",
                outside.bytes().end,
                needed.div_ceil(1 << 30)
            ),
        })
    }
}

fn parse_request(text: &[u8], line: u64) -> Result<Request, String> {
    let fields: Vec<&[u8]> = text.split(|&byte| byte == b',').collect();
    if fields.len() != COLUMNS.len() {
        let (found, wanted) = (fields.len(), COLUMNS.len());
        return Err(format!("{found} columns where {wanted} are expected: {}", COLUMNS.join(",")));
    }
    let field = |column: usize| String::from_utf8_lossy(fields[column].trim_ascii()).into_owned();
    let number = |column: usize| {
        let text = field(column);
        text.parse::<u64>().map_err(|_| {
            format!("{} is `{text}`; a whole number of at most 64 bits is expected", COLUMNS[column])
        })
    };
    let version = number(0)?;
    if version != VERSION {
        return Err(format!("version is {version}; only version {VERSION} is known"));
    }
    number(1)?;
    let op = match field(2).to_ascii_lowercase().as_str() {
        "28" => Op::Read,
        "2a" => Op::Write,
        other => return Err(format!("op is `{other}`; 28 (read) or 2a (write) is expected")),
    };
    let (size, sector) = (number(3)?, number(4)?);
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(format!("size is {size}; a multiple of {SECTOR} bytes, at least {SECTOR}, is expected"));
    }
    let sectors = size / SECTOR;
    let end = sector.checked_add(sectors).and_then(|end| end.checked_mul(SECTOR));
    if end.is_none() {
        return Err(format!("lbn {sector} with size {size} ends beyond 64-bit byte addresses"));
    }
    Ok(Request { op, sector, sectors, line })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lines: &str) -> Result<Trace, Error> {
        Trace::parse(Path::new("t.csv"), format!("version,time,op,size,lbn\n{lines}").as_bytes())
    }

    #[test]
    fn requests_are_read_in_order() {
        let trace =
            parse("1,5633898,2a,6656,40409911\n1,5633899,28,512,0\r\n\r\n1,5633899,2A,512,1").unwrap();
        assert_eq!(
            trace.requests,
            [
                Request { op: Op::Write, sector: 40_409_911, sectors: 13, line: 2 },
                Request { op: Op::Read, sector: 0, sectors: 1, line: 3 },
                Request { op: Op::Write, sector: 1, sectors: 1, line: 5 },
            ]
        );
    }

    #[test]
    fn a_broken_line_is_named_with_what_is_wrong() {
        let cases = [
            ("1,2,28,512", "4 columns where 5"),
            ("1,2,28,512,0,9", "6 columns where 5"),
            ("x,2,28,512,0", "version is `x`"),
            ("2,2,28,512,0", "only version 1"),
            ("1,-2,28,512,0", "time is `-2`"),
            ("1,2,29,512,0", "op is `29`; 28 (read) or 2a (write)"),
            ("1,2,28,0,0", "size is 0; a multiple of 512"),
            ("1,2,28,1000,0", "size is 1000"),
            ("1,2,28,512,", "lbn is ``"),
            ("1,2,28,512,99999999999999999999", "at most 64 bits"),
            ("1,2,28,512,18446744073709551615", "beyond 64-bit"),
            ("1,2,28,512,\"0", "lbn is `\"0`"),
            ("1,2,28,512,\u{fffd}\u{0}", "lbn is"),
        ];
        for (line, words) in cases {
            let message = parse(&format!("1,2,28,512,0\n{line}\n1,2,28,512,0\n")).unwrap_err().to_string();
            assert!(message.contains("line 3: ") && message.contains(words), "{line}: {message}");
        }
    }

    #[test]
    fn a_file_without_the_header_or_requests_is_no_trace() {
        let message = Trace::parse(Path::new("t"), &b"1,2,28,512,0\n"[..]).unwrap_err().to_string();
        assert!(message.contains("line 1: a trace begins with"), "{message}");
        assert!(parse("").unwrap_err().to_string().contains("no requests"));
        assert!(Trace::parse(Path::new("t"), &b""[..]).is_err());
        let endless = Trace::parse(Path::new("t"), std::io::repeat(b'1')).unwrap_err().to_string();
        assert!(endless.contains("line 1: longer than 4096"), "{endless}");
    }

    #[test]
    fn a_device_that_is_too_small_is_told_the_size_needed() {
        let trace = parse("1,2,28,512,0\n1,2,2a,4096,16\n1,2,2a,512,100\n").unwrap();
        assert!(trace.check_fits(101 * 512).is_ok());
        let message = trace.check_fits(23 * 512).unwrap_err().to_string();
        assert!(message.contains("line 3: the request ends at byte 12288"), "{message}");
        assert!(message.contains("at least 51712 bytes"), "{message}");
    }
}
