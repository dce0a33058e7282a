//! Raw image files, read with plain file calls and nothing of the engine.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Bytes read at once.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;
/// Ranges of data are widened to multiples of this, so that no page is part data, part hole.
const PAGE_BYTES: u64 = 4096;

/// The ranges of `file` below `len_bytes` that may hold something else than zeroes, ascending, in whole pages. A file
/// system that knows no holes gives one range.
pub(crate) fn data_ranges(file: &File, len_bytes: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while at < len_bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(std::iter::once(0..len_bytes).collect()),
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?;
        let start = (start / PAGE_BYTES * PAGE_BYTES).min(len_bytes);
        let end = end.next_multiple_of(PAGE_BYTES).min(len_bytes);
        match ranges.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ => ranges.push(start..end),
        }
        at = end.max(at + 1);
    }
    ranges.retain(|range| !range.is_empty());
    Ok(ranges)
}

/// Where the first byte lies that isn't zero.
pub(crate) fn first_data(file: &File) -> io::Result<Option<u64>> {
    let len_bytes = file.metadata()?.len();
    let mut chunk = vec![0; CHUNK_BYTES];
    for range in data_ranges(file, len_bytes)? {
        let mut at = range.start;
        while at < range.end {
            let chunk = &mut chunk[..CHUNK_BYTES.min((range.end - at) as usize)];
            file.read_exact_at(chunk, at)?;
            if let Some(position) = chunk.iter().position(|&byte| byte != 0) {
                return Ok(Some(at + position as u64));
            }
            at += chunk.len() as u64;
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(writes: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        for (offset, bytes) in writes {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    #[test]
    fn a_sparse_file_without_data_holds_none() {
        assert_eq!(first_data(&sparse(&[])).unwrap(), None);
    }

    #[test]
    fn zeroes_that_take_space_are_no_data() {
        assert_eq!(first_data(&sparse(&[(1 << 20, &[0; 8192])])).unwrap(), None);
    }

    #[test]
    fn the_first_byte_that_is_not_zero_is_found() {
        let file = sparse(&[(1 << 20, &[0; 8192]), ((3 << 20) + 17, b"data"), (9 << 20, b"more")]);
        assert_eq!(first_data(&file).unwrap(), Some((3 << 20) + 17));
    }

    #[test]
    fn every_byte_written_lies_in_a_range_of_data() {
        let offsets = [0, 5000, 1 << 20, (16 << 20) - 1];
        let file = sparse(&offsets.map(|offset| (offset, &b"x"[..])));
        let ranges = data_ranges(&file, 16 << 20).unwrap();
        assert!(offsets.iter().all(|offset| ranges.iter().any(|range| range.contains(offset))), "{ranges:?}");
        assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
    }
}
