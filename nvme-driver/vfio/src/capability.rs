//! The capability chains that follow some of the kernel's answers: small records, each with the offset of the next.
//!
//! The kernel is trusted to tell the truth, but offsets are checked all the same, and a chain that leads back on
//! itself ends.

use std::ops::RangeInclusive;

use vfio_bindings::bindings::vfio;

use crate::uapi::Area;

/// An answer of the kernel with its capabilities.
pub(crate) struct Capabilities<'a> {
    answer: &'a [u8],
    first: u32,
}

impl<'a> Capabilities<'a> {
    /// The chain that begins at `first` within `answer`; 0 means that there is none.
    pub(crate) fn new(answer: &'a [u8], first: u32) -> Self {
        Self { answer, first }
    }

    /// The areas of a region that may be mapped; `None` when the kernel doesn't list any.
    pub(crate) fn sparse_areas(&self) -> Option<Vec<Area>> {
        // vfio_region_info_cap_sparse_mmap: header, nr_areas, reserved, then { offset, size } each.
        let body = self.find(vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP)?;
        let pairs = pairs(body, u32_at(body, 0)?, 8).into_iter();
        let areas = pairs.map(|(offset, len_bytes)| Area { offset, len_bytes });
        Some(areas.filter(|area| area.len_bytes > 0).collect())
    }

    /// The device addresses that the IOMMU accepts; `None` when the kernel doesn't list them.
    pub(crate) fn iova_ranges(&self) -> Option<Vec<RangeInclusive<u64>>> {
        // vfio_iommu_type1_info_cap_iova_range: header, nr_iovas, reserved, then { start, end } each.
        let body = self.find(vfio::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)?;
        Some(pairs(body, u32_at(body, 0)?, 8).into_iter().map(|(start, end)| start..=end).collect())
    }

    /// How many mappings may still be made; `None` when the kernel doesn't say.
    pub(crate) fn mappings_left(&self) -> Option<u32> {
        u32_at(self.find(vfio::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)?, 0)
    }

    /// What follows the header of the capability `id`.
    fn find(&self, id: u32) -> Option<&'a [u8]> {
        const HEADER_BYTES: usize = size_of::<vfio::vfio_info_cap_header>();
        let mut at = self.first as usize;
        // Each record takes a header's room at least.
        for _ in 0..self.answer.len() / HEADER_BYTES {
            if at == 0 {
                return None;
            }
            let record = self.answer.get(at..)?;
            let body = record.get(HEADER_BYTES..)?;
            if u32::from(u16::from_ne_bytes([record[0], record[1]])) == id {
                return Some(body);
            }
            at = u32_at(record, 4)? as usize;
        }
        None
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Up to `count` pairs of 64-bit numbers from `at` on, as many as there are.
fn pairs(bytes: &[u8], count: u32, at: usize) -> Vec<(u64, u64)> {
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default();
    let list = bytes.get(at..).unwrap_or_default();
    list.chunks_exact(16).take(count as usize).map(|pair| (word(&pair[..8]), word(&pair[8..]))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer of 32 bytes with records behind it.
    fn answer(records: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0xAA; 32];
        for (index, (id, body)) in records.iter().enumerate() {
            let end = bytes.len() + 8 + body.len();
            let next = if index + 1 == records.len() { 0 } else { end as u32 };
            bytes.extend(id.to_ne_bytes());
            bytes.extend(1u16.to_ne_bytes());
            bytes.extend(next.to_ne_bytes());
            bytes.extend(body);
        }
        bytes
    }

    fn list(pairs: &[(u64, u64)]) -> Vec<u8> {
        let mut body = (pairs.len() as u32).to_ne_bytes().to_vec();
        body.extend([0; 4]);
        body.extend(pairs.iter().flat_map(|&(a, b)| [a.to_ne_bytes(), b.to_ne_bytes()].concat()));
        body
    }

    #[test]
    fn each_capability_is_found_wherever_it_stands() {
        let bytes = answer(&[
            (7, vec![1, 2, 3, 4]),
            (1, list(&[(0, 0x1000), (0x3000, 0x1000), (0x9000, 0)])),
            (3, 42u32.to_ne_bytes().to_vec()),
        ]);
        let capabilities = Capabilities::new(&bytes, 32);
        assert_eq!(
            capabilities.sparse_areas(),
            Some(
                [(0, 0x1000), (0x3000, 0x1000)]
                    .map(|(offset, len_bytes)| Area { offset, len_bytes })
                    .to_vec()
            )
        );
        assert_eq!(capabilities.iova_ranges().unwrap()[0], 0..=0x1000);
        assert_eq!(capabilities.mappings_left(), Some(42));
        assert_eq!(Capabilities::new(&bytes, 0).sparse_areas(), None);
    }

    #[test]
    fn a_chain_that_is_cut_or_goes_in_circles_ends() {
        let whole = answer(&[(9, vec![0; 4]), (1, list(&[(0, 4096), (8192, 4096)]))]);
        for len in 0..whole.len() {
            let areas = Capabilities::new(&whole[..len], 32).sparse_areas();
            assert!(areas.is_none_or(|areas| areas.len() < 2), "cut at {len}");
        }
        let mut circle = answer(&[(9, vec![0; 4])]);
        circle[36..40].copy_from_slice(&32u32.to_ne_bytes());
        assert_eq!(Capabilities::new(&circle, 32).mappings_left(), None);
        assert_eq!(Capabilities::new(&circle, u32::MAX).mappings_left(), None);
    }
}
