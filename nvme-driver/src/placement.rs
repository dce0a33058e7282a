//! On which NUMA nodes parts of a controller's memory lie.
//!
//! The kernel takes a page from the node of the thread that first touches it, which is the one that opens the controller
//! and has nothing to do with whoever uses the memory later. So the parts are told apart before anything is touched, by
//! `mbind` with `MPOL_PREFERRED`: a node that has no memory left doesn't keep the controller from opening.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Once;

/// A part of a controller's arena that should lie on one NUMA node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePart {
    /// Which bytes of the arena.
    pub bytes: Range<usize>,
    /// The node's number.
    pub node: u32,
}

/// Bits of a mask of nodes; the kernel has at most 1,024 (`MAX_NUMNODES`).
const NODES_MAX: usize = 1024;
/// `MPOL_PREFERRED` of `linux/mempolicy.h`.
const PREFERRED: libc::c_int = 1;

/// Makes the kernel take the parts' pages, of `page_bytes` bytes, from their nodes. Nothing in `memory` has been touched
/// yet. A page lies on the node of the part in which it begins. What can't be done costs a warning.
pub(crate) fn prefer(memory: NonNull<u8>, len_bytes: usize, page_bytes: usize, parts: &[NodePart]) {
    for part in parts {
        let pages = whole_pages(&part.bytes, len_bytes, page_bytes);
        if pages.is_empty() {
            continue;
        }
        if let Err(error) = bind(memory, &pages, part.node) {
            warn_of_policy(part.node, &error);
            return;
        }
    }
}

/// The pages that begin in `bytes`, up to the end of the memory.
fn whole_pages(bytes: &Range<usize>, len_bytes: usize, page_bytes: usize) -> Range<usize> {
    let up = |at: usize| at.checked_next_multiple_of(page_bytes).unwrap_or(usize::MAX);
    let end = up(bytes.end).min(len_bytes);
    up(bytes.start).min(end)..end
}

fn bind(memory: NonNull<u8>, pages: &Range<usize>, node: u32) -> std::io::Result<()> {
    const WORD_BITS: usize = libc::c_ulong::BITS as usize;
    let mut mask = [0 as libc::c_ulong; NODES_MAX / WORD_BITS];
    let Some(word) = mask.get_mut(node as usize / WORD_BITS) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    *word = 1 << (node as usize % WORD_BITS);
    let at = memory.as_ptr().addr() + pages.start;
    // SAFETY: the range lies within memory of this process that the caller has just mapped; the call changes no byte of
    // it, and reads the mask, which has the bits that it is told of (the kernel takes one less than `maxnode`).
    #[expect(unsafe_code, reason = "a call of the kernel for which there is no wrapper")]
    let answer = unsafe {
        libc::syscall(libc::SYS_mbind, at, pages.len(), PREFERRED, mask.as_ptr(), NODES_MAX + 1, 0)
    };
    if answer == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Says once a process that memory lies where the kernel likes.
fn warn_of_policy(node: u32, error: &std::io::Error) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::warn!(
            node,
            %error,
            "the DMA arena can't be placed by NUMA node: its pages lie where the kernel takes them from, and shards of other \
             nodes reach them more slowly"
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapMut;

    #[test]
    fn a_page_belongs_to_the_part_in_which_it_begins() {
        const PAGE: usize = 1 << 21;
        let parts = [0..3 << 20, 3 << 20..6 << 20, 6 << 20..9 << 20];
        let pages = parts.map(|part| whole_pages(&part, 10 << 20, PAGE));
        assert_eq!(pages, [0..4 << 20, 4 << 20..6 << 20, 6 << 20..10 << 20]);
        assert!(whole_pages(&(1..4096), PAGE, PAGE).is_empty() || PAGE == 4096);
        assert!(whole_pages(&(9 << 20..10 << 20), 8 << 20, PAGE).is_empty());
    }

    /// The policy of the mapping that begins at `address`, as the kernel has it.
    fn policy(address: usize) -> Option<String> {
        let maps = std::fs::read_to_string("/proc/self/numa_maps").ok()?;
        let line = maps.lines().find(|line| line.starts_with(&format!("{address:x} ")))?;
        Some(line.split(' ').nth(1)?.to_owned())
    }

    #[test]
    fn the_kernel_knows_the_node_of_each_part_where_it_knows_nodes_at_all() {
        let mut map = MmapMut::map_anon(4 << 20).unwrap();
        let base = NonNull::new(map.as_mut_ptr()).unwrap();
        let at = base.addr().get();
        let bound = bind(base, &(1 << 20..2 << 20), 0);
        match policy(at + (1 << 20)) {
            Some(policy) => {
                bound.unwrap();
                // A kernel that has one node says so in its own way.
                assert!(policy.starts_with("prefer"), "{policy}");
                prefer(base, 4 << 20, 4096, &[NodePart { bytes: 3 << 20..4 << 20, node: 0 }]);
                assert!(self::policy(at + (3 << 20)).unwrap().starts_with("prefer"));
            }
            // Without nodes, or where a sandbox forbids the call.
            None => drop(bound),
        }
        assert!(bind(base, &(0..4096), 5000).is_err(), "there is no such node");
        map[0] = 1;
    }
}
