//! Who appends: how large the folios are that are made for writers.
//!
//! A writer who writes page after page of a mapping finds the next one missing each time. Where a page is made right behind
//! what was made before, the next folio is larger than what is asked for, and each time it was right, twice as large
//! again: 4 pages, 8, up to 512. The writer then fills its pages one by one without asking the shard
//! ([`Access::Overwrite`](crate::cache::folio::Access)), and a pass meets one folio instead of hundreds.
//!
//! Where it was wrong, some frames are kept for nothing until eviction comes by, or somebody wants the pages.

use crate::cache::MAPPINGS_MAX;
use crate::cache::folio::FolioOrder;
use crate::cache::shape::MappingShape;

/// Pages of the first folio that is larger than what was asked for.
const WINDOW_FIRST: u64 = 4;

/// What was made last in each mapping.
#[derive(Debug)]
pub(crate) struct Appends {
    of_mapping: Box<[Made]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Made {
    /// The shard-local page behind it. Local pages follow on each other also where the file's don't, at the end of a
    /// stripe.
    end: u64,
    /// Pages that the next folio may have.
    window: u64,
}

impl Appends {
    pub(crate) fn new() -> Self {
        Self { of_mapping: vec![Made::default(); MAPPINGS_MAX].into_boxed_slice() }
    }

    /// The order of the folio to be made at `page`, of which `asked` pages will be written now.
    pub(crate) fn order(&self, shape: &MappingShape, shard: usize, page: u64, asked: u64) -> FolioOrder {
        debug_assert_eq!(shape.striping.shard_of(page), shard);
        let made = self.of_mapping[shape.slot as usize];
        let wanted = if made.window > 0 && shape.striping.local(page) == made.end {
            made.window.max(asked)
        } else {
            asked
        };
        // A folio lies within the mapping, and within a stripe by its alignment.
        FolioOrder::fitting(page, wanted.min(shape.pages() - page))
    }

    /// A folio was made at `page`.
    pub(crate) fn installed(&mut self, shape: &MappingShape, page: u64, order: FolioOrder) {
        let made = &mut self.of_mapping[shape.slot as usize];
        let local = shape.striping.local(page);
        let follows = made.window > 0 && local == made.end;
        made.window = if follows { (made.window * 2).min(FolioOrder::MAX.pages()) } else { WINDOW_FIRST };
        made.end = local + order.pages();
    }
}
