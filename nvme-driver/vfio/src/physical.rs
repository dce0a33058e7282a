//! Physical addresses, for a device without an IOMMU.
//!
//! Such a device sees memory by its physical address. The arena must then be one physical stretch that never moves:
//! hugepages, one beside the other. What the kernel hands out needn't be in order, so the hugepages behind the arena are
//! looked up and, if they are neighbours in another order, refused with what helps.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;

use foliant_nvme_transport::{DmaMemory, Iova};

const PAGE_BYTES: u64 = 4096;

/// The physical address of `memory`, if all of it lies in hugepages and in one stretch.
pub(crate) fn extent(memory: DmaMemory) -> Result<Iova, String> {
    let (first, len) = (memory.base.as_ptr().expose_provenance() as u64, memory.len_bytes as u64);
    let smaps =
        File::open("/proc/self/smaps").map_err(|error| format!("cannot read /proc/self/smaps: {error}"))?;
    if !in_hugepages(BufReader::new(smaps), first, len) {
        return Err(format!(
            "without an IOMMU the arena of {len} bytes must lie in hugepages, whose physical address doesn't change; reserve \
             some on the kernel's command line: default_hugepagesz=1G hugepagesz=1G hugepages={}",
            len.div_ceil(1 << 30)
        ));
    }
    touch(memory);
    let pagemap = File::open("/proc/self/pagemap")
        .map_err(|error| format!("cannot read /proc/self/pagemap: {error}"))?;
    let frames = read_frames(&pagemap, first, len)
        .map_err(|error| format!("cannot read /proc/self/pagemap: {error}"))?;
    contiguous(&frames)
}

/// Whether the mappings of this process that cover `len` bytes at `first` consist of hugepages.
fn in_hugepages(smaps: impl BufRead, first: u64, len: u64) -> bool {
    let (mut within, mut covered) = (0, 0);
    for line in smaps.lines().map_while(Result::ok) {
        if let Some((start, end)) = range_of(&line) {
            within = end.min(first + len).saturating_sub(start.max(first));
        } else if let Some(kib) =
            line.strip_prefix("KernelPageSize:").and_then(|rest| rest.split_whitespace().next())
            && kib.parse::<u64>().is_ok_and(|kib| kib * 1024 > PAGE_BYTES)
        {
            covered += within;
        }
    }
    covered == len
}

/// The range in a line that opens a mapping of `/proc/self/smaps`.
fn range_of(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

/// Makes sure that every page is there.
fn touch(memory: DmaMemory) {
    for offset in (0..memory.len_bytes).step_by(PAGE_BYTES as usize) {
        // SAFETY: the caller of `map_dma` vouches for the memory, which nothing else uses yet; the byte is
        // written back as it was.
        #[expect(unsafe_code, reason = "faults the pages of memory that is about to be shared with a device")]
        unsafe {
            let byte = memory.base.as_ptr().add(offset);
            byte.write_volatile(byte.read_volatile());
        }
    }
}

/// The entries of `/proc/self/pagemap` for `len` bytes at `first`.
fn read_frames(pagemap: &File, first: u64, len: u64) -> std::io::Result<Vec<u64>> {
    let mut bytes = vec![0; (len / PAGE_BYTES * 8) as usize];
    pagemap.read_exact_at(&mut bytes, first / PAGE_BYTES * 8)?;
    Ok(bytes.chunks_exact(8).map(|entry| u64::from_ne_bytes(entry.try_into().unwrap_or_default())).collect())
}

/// The physical address of the first page, if each page follows the one before it
/// (`Documentation/admin-guide/mm/pagemap.rst`: bit 63 present, bits 0–54 the frame's number).
fn contiguous(entries: &[u64]) -> Result<Iova, String> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let first = entries.first().map_or(0, |entry| entry & FRAME);
    if first == 0 || entries.iter().any(|entry| entry & PRESENT == 0) {
        return Err(
            "the system doesn't tell physical addresses: that needs CAP_SYS_ADMIN, so run as root".to_owned()
        );
    }
    match entries.iter().zip(first..).position(|(entry, expected)| entry & FRAME != expected) {
        None => Ok(Iova(first * PAGE_BYTES)),
        Some(page) => Err(format!(
            "without an IOMMU the arena of {} bytes must be one physical stretch, but only its first {} bytes are; choose a \
             smaller cache, or boot with hugepages of 1 GiB: default_hugepagesz=1G hugepagesz=1G hugepages={}",
            entries.len() as u64 * PAGE_BYTES,
            page as u64 * PAGE_BYTES,
            (entries.len() as u64 * PAGE_BYTES).div_ceil(1 << 30)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "7f0000000000-7f0000400000 rw-p 00000000 00:0f 1 /anon_hugepage\n\
                         Size:               4096 kB\nKernelPageSize:     2048 kB\nMMUPageSize:        2048 kB\n\
                         7f0000400000-7f0000500000 rw-p 00000000 00:00 0\nSize:  1024 kB\nKernelPageSize:        4 kB\n";

    #[test]
    fn memory_that_is_not_wholly_in_hugepages_is_noticed() {
        assert!(in_hugepages(SMAPS.as_bytes(), 0x7f00_0000_0000, 0x40_0000));
        assert!(in_hugepages(SMAPS.as_bytes(), 0x7f00_0020_0000, 0x20_0000));
        assert!(!in_hugepages(SMAPS.as_bytes(), 0x7f00_0000_0000, 0x50_0000));
        assert!(!in_hugepages(SMAPS.as_bytes(), 0x7f00_0040_0000, 0x1000));
        assert!(!in_hugepages(SMAPS.as_bytes(), 0x7e00_0000_0000, 0x1000));
    }

    #[test]
    fn only_a_stretch_that_is_whole_and_present_has_an_address() {
        let present = |frame: u64| (1 << 63) | frame;
        assert_eq!(contiguous(&[present(0x100), present(0x101)]).unwrap(), Iova(0x10_0000));
        assert!(contiguous(&[present(0x101), present(0x100)]).unwrap_err().contains("first 4096 bytes"));
        assert!(contiguous(&[present(0x100), 0x101]).unwrap_err().contains("root"));
        assert!(contiguous(&[present(0), present(1)]).unwrap_err().contains("root"));
    }
}
