//! Free frames, as a binary buddy system: aligned blocks of 2^order frames, split and joined in pairs.
//!
//! A folio of several pages needs frames that lie side by side and are aligned to their number, so that its head is
//! found from any of its frames by masking. Frames given back one by one join into larger blocks by themselves, as soon
//! as both halves of a block are free.
//!
//! It needs no memory of its own: the list of free blocks of each order runs through the headers of the blocks' first
//! frames, by fields that mean something else while a frame is in use. Threads that follow a stale link of the look-up index
//! may come through here; they find no page and give up.

use super::folio::{FolioHeader, FolioOrder, FrameId, NONE};
use crate::primitives::Ordering;

/// The free frames of one shard. Changed by the shard alone.
#[derive(Debug)]
pub(crate) struct FreeFrames {
    frames: u32,
    /// By order: the first free block.
    first: [u32; FolioOrder::COUNT],
    /// By order: how many free blocks there are.
    blocks: [u32; FolioOrder::COUNT],
    free: u32,
}

impl FreeFrames {
    /// All frames of `headers` free.
    pub(crate) fn new(headers: &[FolioHeader]) -> Self {
        let frames = headers.len() as u32;
        let mut free =
            Self { frames, first: [NONE; FolioOrder::COUNT], blocks: [0; FolioOrder::COUNT], free: 0 };
        // From the end, since a list gives out first what came last.
        let mut end = frames;
        while end > 0 {
            let order = FolioOrder::fitting(u64::from(end), u64::from(end));
            end -= order.pages() as u32;
            free.link(headers, end, order);
            free.free += order.pages() as u32;
        }
        free
    }

    /// Frames that are free.
    pub(crate) fn count(&self) -> usize {
        self.free as usize
    }

    /// Blocks of `order` that could be given out now.
    pub(crate) fn blocks(&self, order: FolioOrder) -> usize {
        if order == FolioOrder(0) {
            return self.count();
        }
        let above = order.0 as usize..FolioOrder::COUNT;
        above.map(|at| (self.blocks[at] as usize) << (at - order.0 as usize)).sum()
    }

    /// Whether `blocks` blocks of `order` could be given out now.
    pub(crate) fn has(&self, order: FolioOrder, blocks: usize) -> bool {
        self.blocks(order) >= blocks
    }

    /// Whether `blocks` blocks of `order` could be given out so that `kept` of `large` are left. The smallest blocks go first,
    /// so fragments are free to take though fewer than `kept` are left.
    pub(crate) fn spares(
        &self,
        (order, blocks): (FolioOrder, usize),
        (large, kept): (FolioOrder, usize),
    ) -> bool {
        let whole = self.blocks(large);
        let broken = if order >= large {
            blocks << (order.0 - large.0)
        } else {
            let each = 1 << (large.0 - order.0);
            let fragments = self.blocks(order) - whole * each;
            blocks.saturating_sub(fragments).div_ceil(each)
        };
        broken == 0 || whole >= kept + broken
    }

    /// Takes a block of `order`, from the smallest free block that holds one.
    pub(crate) fn take(&mut self, headers: &[FolioHeader], order: FolioOrder) -> Option<FrameId> {
        let found = self.smallest(order)?;
        let block = self.first[found.0 as usize];
        self.carve(headers, (block, found), block, order);
        Some(FrameId(block))
    }

    /// Takes the block of `order` that begins at `frame`, if that is aligned to it and all of it is free, and no block of
    /// `large` is broken up for it of which only `kept` are left.
    pub(crate) fn take_at(
        &mut self,
        headers: &[FolioHeader],
        (frame, order): (u32, FolioOrder),
        (large, kept): (FolioOrder, usize),
    ) -> bool {
        // A frame in use, which is what mostly stands there, is known by its own header.
        let fits = frame.is_multiple_of(order.pages() as u32)
            && frame < self.frames
            && !headers[frame as usize].is_in_use();
        let mut around = (order.0..=FolioOrder::MAX.0)
            .map(|at| (frame & !((1 << at) - 1), FolioOrder(at)))
            .filter(|&(block, at)| headers[block as usize].is_free_block(at));
        let Some((block, whole)) = fits.then(|| around.next()).flatten() else { return false };
        if order < large && whole >= large && self.blocks(large) <= kept {
            return false;
        }
        self.carve(headers, (block, whole), frame, order);
        true
    }

    /// The first frame of a free block of at least `order`, as small a one as there is; none where only `spared` frames
    /// lie in blocks of that size.
    pub(crate) fn untouched(&self, order: FolioOrder, spared: u32) -> Option<u32> {
        let above = order.0 as usize..FolioOrder::COUNT;
        let left: u32 = above.map(|at| self.blocks[at] << at).sum();
        let found = self.smallest(order).filter(|_| left > spared)?;
        Some(self.first[found.0 as usize])
    }

    /// The smallest order of at least `order` of which a block is free.
    fn smallest(&self, order: FolioOrder) -> Option<FolioOrder> {
        (order.0..FolioOrder::COUNT as u8).map(FolioOrder).find(|at| self.first[at.0 as usize] != NONE)
    }

    /// Takes the frames from `frame` on, `order` of them, out of a free block that holds them; the rest stays free.
    fn carve(
        &mut self,
        headers: &[FolioHeader],
        (mut block, whole): (u32, FolioOrder),
        frame: u32,
        order: FolioOrder,
    ) {
        self.unlink(headers, block, whole);
        for at in (order.0..whole.0).rev() {
            let upper = block + (1 << at);
            let rest = if frame >= upper { std::mem::replace(&mut block, upper) } else { upper };
            self.link(headers, rest, FolioOrder(at));
        }
        self.free -= order.pages() as u32;
    }

    /// Gives a block back. Its frames are frozen and linked nowhere.
    pub(crate) fn give(&mut self, headers: &[FolioHeader], frame: FrameId, order: FolioOrder) {
        self.free += order.pages() as u32;
        let (mut frame, mut order) = (frame.0, order);
        while order < FolioOrder::MAX {
            let buddy = frame ^ order.pages() as u32;
            let joins =
                buddy + order.pages() as u32 <= self.frames && headers[buddy as usize].is_free_block(order);
            if !joins {
                break;
            }
            self.unlink(headers, buddy, order);
            frame = frame.min(buddy);
            order = FolioOrder(order.0 + 1);
        }
        self.link(headers, frame, order);
    }

    fn link(&mut self, headers: &[FolioHeader], frame: u32, order: FolioOrder) {
        let at = order.0 as usize;
        let next = std::mem::replace(&mut self.first[at], frame);
        let header = &headers[frame as usize];
        header.set_free_block(order);
        header.bucket_next.store(next, Ordering::Relaxed);
        header.tag_leaf.store(NONE, Ordering::Relaxed);
        if next != NONE {
            headers[next as usize].tag_leaf.store(frame, Ordering::Relaxed);
        }
        self.blocks[at] += 1;
    }

    fn unlink(&mut self, headers: &[FolioHeader], frame: u32, order: FolioOrder) {
        let header = &headers[frame as usize];
        let next = header.bucket_next.load(Ordering::Relaxed);
        let before = header.tag_leaf.load(Ordering::Relaxed);
        if before == NONE {
            self.first[order.0 as usize] = next;
        } else {
            headers[before as usize].bucket_next.store(next, Ordering::Relaxed);
        }
        if next != NONE {
            headers[next as usize].tag_leaf.store(before, Ordering::Relaxed);
        }
        header.tag_leaf.store(NONE, Ordering::Relaxed);
        header.clear_free_block();
        self.blocks[order.0 as usize] -= 1;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(frames: u32) -> Vec<FolioHeader> {
        (0..frames).map(|_| FolioHeader::new()).collect()
    }

    #[test]
    fn a_block_is_given_out_from_its_lowest_frame_on() {
        let headers = headers(128);
        let mut free = FreeFrames::new(&headers);
        for wanted in 0..128 {
            assert_eq!(free.take(&headers, FolioOrder(0)), Some(FrameId(wanted)));
        }
        assert_eq!(free.take(&headers, FolioOrder(0)), None);
    }

    #[test]
    fn fragments_can_be_had_while_the_last_large_blocks_are_kept() {
        let headers = headers(16);
        let mut free = FreeFrames::new(&headers);
        let (small, middle, large) = (FolioOrder(0), FolioOrder(1), FolioOrder(2));
        assert!(free.spares((small, 8), (large, 2)) && !free.spares((small, 9), (large, 2)));
        assert!(free.spares((middle, 4), (large, 2)) && !free.spares((middle, 5), (large, 2)));
        assert!(free.spares((FolioOrder(3), 1), (large, 2)) && !free.spares((FolioOrder(3), 2), (large, 2)));
        // Of two blocks every other frame.
        for _ in 0..8 {
            let _ = free.take(&headers, small);
        }
        (0..4).for_each(|at| free.give(&headers, FrameId(2 * at), small));
        assert!(free.spares((small, 4), (large, 2)) && !free.spares((small, 5), (large, 2)));
        assert!(!free.spares((middle, 1), (large, 2)) && free.spares((middle, 1), (large, 1)));
        assert!(free.spares((small, 4), (large, 3)), "fewer are left than that already");
    }

    proptest! {
        #[test]
        fn blocks_never_overlap_are_aligned_and_join_again(
            frames in 1u32..3000, steps in prop::collection::vec((0u8..10, any::<prop::sample::Index>(), 0u8..3), 1..300),
        ) {
            let headers = headers(frames);
            let mut free = FreeFrames::new(&headers);
            let mut taken: Vec<(u32, FolioOrder)> = Vec::new();
            let mut used = vec![false; frames as usize];
            let whole = (0..FolioOrder::COUNT as u8).map(|at| free.has(FolioOrder(at), 1)).collect::<Vec<_>>();
            for (order, which, take) in steps {
                let order = FolioOrder(order);
                if take > 0 {
                    let block = if take == 1 {
                        let possible = free.has(order, 1);
                        let block = free.take(&headers, order);
                        prop_assert_eq!(block.is_some(), possible);
                        block
                    } else {
                        let frame = which.index(frames as usize) as u32;
                        let end = u64::from(frame) + order.pages();
                        let possible = u64::from(frame) % order.pages() == 0
                            && end <= u64::from(frames)
                            && used[frame as usize..end as usize].iter().all(|&used| !used);
                        prop_assert_eq!(free.take_at(&headers, (frame, order), (FolioOrder(0), 0)), possible);
                        possible.then_some(FrameId(frame))
                    };
                    let Some(FrameId(frame)) = block else { continue };
                    prop_assert!(frame.is_multiple_of(order.pages() as u32));
                    for at in frame..frame + order.pages() as u32 {
                        prop_assert!(!std::mem::replace(&mut used[at as usize], true), "frame {} twice", at);
                    }
                    taken.push((frame, order));
                } else if !taken.is_empty() {
                    let (frame, order) = taken.swap_remove(which.index(taken.len()));
                    used[frame as usize..(frame + order.pages() as u32) as usize].fill(false);
                    free.give(&headers, FrameId(frame), order);
                }
                prop_assert_eq!(free.count(), used.iter().filter(|&&used| !used).count());
            }
            for (frame, order) in taken {
                // One by one, as after a split: they join again.
                for at in frame..frame + order.pages() as u32 {
                    free.give(&headers, FrameId(at), FolioOrder(0));
                }
            }
            let joined = (0..FolioOrder::COUNT as u8).map(|at| free.has(FolioOrder(at), 1)).collect::<Vec<_>>();
            prop_assert_eq!(joined, whole);
            prop_assert_eq!(free.count(), frames as usize);
        }
    }
}
