//! Scattered pages on their way to the shards and back: lists of pages in reply slots, a message a shard.
//!
//! Nothing is allocated: what is asked stands in the slots ([`PageList`](crate::page_list::PageList)), and a batch that
//! needs more of them than [`LISTS_AT_ONCE`] is carried on as answers come.

use std::task::{Context, Poll};
use std::time::Instant;

use super::Mapping;
use crate::error::{Error, Result};
use crate::pin::PagePin;
use crate::reply::{GRANTS_MAX, SlotId};
use crate::shard::link::ShardLink;
use crate::shard::readahead::{Posted, ReadaheadRequest};
use crate::shard::request::Request;
use crate::writeback::callback;

/// Lists of one batch that are filled or waited for at a time: their places live in the future.
const LISTS_AT_ONCE: usize = 32;
/// Pages of a list whose pages are copied, as long as what comes next isn't the last one's neighbour, which belongs into the same
/// command. Less than a list can hold: what a list brought is copied when it is answered, and what the last one brought
/// while nothing else is on its way.
const COPIED_PAGES: usize = 16;

/// How far a list is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Filling,
    Sent,
}

/// A list and the slot that holds it.
#[derive(Clone, Copy, Debug)]
struct List {
    shard: usize,
    slot: SlotId,
    progress: Progress,
}

/// Whether a page found a place in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Added {
    Yes,
    /// All lists are full, or no reply slot is free.
    NoRoom,
}

/// The lists of one batch. Dropping it gives up what isn't answered yet.
pub(super) struct Gather<'a> {
    mapping: &'a Mapping,
    lists: [Option<List>; LISTS_AT_ONCE],
    /// The list to which the last page went.
    recent: usize,
    /// Behind these no list has been begun yet.
    used: usize,
    /// Pages that one list holds: frames for as many can always be had at once.
    list_pages: usize,
    /// Pages that one list holds while they aren't neighbours.
    scattered_pages: usize,
}

impl<'a> Gather<'a> {
    pub(super) fn new(mapping: &'a Mapping) -> Self {
        let most = mapping.engine.request_pages_max >> mapping.open.shape.order.0;
        let list_pages = (most as usize).clamp(1, GRANTS_MAX);
        let lists = [None; LISTS_AT_ONCE];
        Self { mapping, lists, recent: 0, used: 0, list_pages, scattered_pages: GRANTS_MAX }
    }

    /// The lists of a batch of which each page is copied when it has come.
    pub(super) fn of_copies(mapping: &'a Mapping) -> Self {
        let mut gather = Self::new(mapping);
        gather.scattered_pages = COPIED_PAGES;
        gather
    }

    /// Whether nothing is asked or waited for.
    pub(super) fn is_empty(&self) -> bool {
        self.lists.iter().all(Option::is_none)
    }

    /// Adds a page, named by its first page of 4096 bytes.
    pub(super) fn add(&mut self, first: u64, tag: u32) -> Added {
        let mapping = self.mapping;
        let shard = mapping.open.shape.striping.shard_of(first);
        let replies = &mapping.engine.links[shard].replies;
        let block = mapping.open.shape.order.pages();
        let takes = |list: &List| {
            if list.shard != shard || list.progress != Progress::Filling {
                return false;
            }
            let pages = replies.list(list.slot);
            let most = if pages.is_followed_by(first, block) { GRANTS_MAX } else { self.scattered_pages };
            pages.len() < most.min(self.list_pages)
        };
        // Mostly the one that the page before went to.
        let recent = self.lists[self.recent].as_ref().is_some_and(takes).then_some(self.recent);
        let open = || self.lists[..self.used].iter().position(|list| list.as_ref().is_some_and(takes));
        if let Some((at, list)) = recent.or_else(open).and_then(|at| Some((at, self.lists[at]?))) {
            replies.list(list.slot).insert(first, tag);
            self.recent = at;
            return Added::Yes;
        }
        let Some(at) = self.lists.iter().position(Option::is_none) else { return Added::NoRoom };
        let Some(slot) = replies.acquire() else { return Added::NoRoom };
        replies.list(slot).insert(first, tag);
        self.lists[at] = Some(List { shard, slot, progress: Progress::Filling });
        self.recent = at;
        self.used = self.used.max(at + 1);
        Added::Yes
    }

    /// Sends what was added: to each shard one message.
    ///
    /// # Errors
    /// Those of a shard that takes no requests any more. What it was to be asked is given up.
    pub(super) fn send(&mut self) -> Result<()> {
        callback::check_outside()?;
        let mapping = self.mapping.open.shape.slot;
        let mut result = Ok(());
        while let Some((link, head)) = self.take_chain(Progress::Sent) {
            if let Err(error) = link.send(head, Request::Gather { mapping }) {
                self.free_chain(link, head);
                result = Err(error);
            }
        }
        result
    }

    /// Leaves what was added with the shards as hints: nobody waits for it. `marker` and `used_at_once` are
    /// [`ReadaheadRequest`]'s.
    pub(super) fn post(&mut self, marker: Option<u64>, used_at_once: u64) -> Posted {
        let mut posted = Posted::Yes;
        while let Some((link, head)) = self.take_chain(Progress::Sent) {
            let request = ReadaheadRequest {
                mapping: self.mapping.open.shape.slot,
                pages: 0..0,
                lists: Some(head),
                listed: 0,
                marker,
                used_at_once,
                turns: 0,
            };
            let refused = !link.replies.are_plenty() || link.readahead.post(request) == Posted::Refused;
            if refused {
                self.free_chain(link, head);
                posted = Posted::Refused;
            } else {
                link.wake();
            }
        }
        // They are the shards' now.
        self.lists = [None; LISTS_AT_ONCE];
        posted
    }

    /// Chains the lists of one shard that are being filled; returns the first of them.
    fn take_chain(&mut self, progress: Progress) -> Option<(&'a ShardLink, SlotId)> {
        let filling = |list: &&mut List| list.progress == Progress::Filling;
        let shard = self.lists.iter_mut().flatten().find(filling)?.shard;
        let link = &self.mapping.engine.links[shard];
        let mut head = None;
        // From the last to the first, so that they are served in the order in which they were filled.
        for list in self.lists.iter_mut().rev().flatten() {
            if list.shard == shard && list.progress == Progress::Filling {
                link.replies.list(list.slot).set_next(head.replace(list.slot));
                list.progress = progress;
            }
        }
        head.map(|head| (&**link, head))
    }

    /// Frees the slots of a message that wasn't taken.
    fn free_chain(&mut self, link: &ShardLink, head: SlotId) {
        let mut at = Some(head);
        while let Some(slot) = at {
            at = link.replies.list(slot).next();
            link.replies.abandon_unsent(slot);
            let mine = |list: &List| list.shard == link.shard && list.slot == slot;
            self.lists
                .iter_mut()
                .filter(|list| list.as_ref().is_some_and(mine))
                .for_each(|list| *list = None);
        }
    }

    /// Takes the answers that have come, and gives each page that they brought to `each`, with its tag and pinned; ready
    /// when there was one, or when nothing is waited for. A list that failed is skipped when the device failed it.
    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
        mut each: impl FnMut(u64, u32, PagePin<'a>),
    ) -> Poll<Result<()>> {
        let mapping = self.mapping;
        let (mut any, mut waiting) = (false, false);
        for place in &mut self.lists {
            let Some(List { shard, slot, progress: Progress::Sent }) = *place else { continue };
            let link = &mapping.engine.links[shard];
            if !link.replies.is_done(slot, context.waker()) {
                waiting = true;
                continue;
            }
            any = true;
            *place = None;
            let list = link.replies.list(slot);
            let pages = mapping.open.shape.order.pages();
            let answer = link.replies.read_done(slot, |grants| {
                for (position, frame, _) in grants.iter() {
                    let (page, tag) = (list.page(position), list.tag(position));
                    each(page, tag, mapping.granted_shared_pin(link, page, frame, pages));
                    mapping.read_once(page..page + pages);
                }
            });
            link.replies.release(slot);
            match answer {
                // Its pages are asked for once more by themselves, so that the error names the one that is bad.
                Ok(()) | Err(Error::Device { .. } | Error::TryAgain { .. }) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        if any || !waiting { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Waits a little for a reply slot of some shard, where there was none.
    pub(super) async fn wait_for_slot(&self, refused: &mut Option<Instant>) -> Result<()> {
        let link = &self.mapping.engine.links[0];
        let waited = refused.get_or_insert_with(Instant::now).elapsed();
        if waited > link.slot_wait {
            return Err(Error::TooManyRequests { requests_max: link.replies.count(), waited });
        }
        let mut yielded = false;
        std::future::poll_fn(|context| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            std::thread::yield_now();
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        Ok(())
    }
}

impl Drop for Gather<'_> {
    fn drop(&mut self) {
        for List { shard, slot, progress } in self.lists.iter().flatten() {
            let link = &self.mapping.engine.links[*shard];
            match progress {
                Progress::Filling => link.replies.abandon_unsent(*slot),
                Progress::Sent => link.abandon(*slot),
            }
        }
    }
}
