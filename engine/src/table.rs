//! The table of open mappings: which slots are taken, which ranges are covered, how many handles there are.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cache::MAPPINGS_MAX;
use crate::cache::folio::FolioOrder;
use crate::cache::shape::MappingShape;
use crate::error::{Error, Result};
use crate::gate::MappingGates;
use crate::mirror::{MirrorOptions, StreamId};
use crate::shard::open::OpenMapping;

/// Bytes of a namespace that a mapping, or its mirror, occupies.
#[derive(Clone, Debug)]
pub(crate) struct Extent {
    /// The device that the namespace is of.
    pub on: StreamId,
    pub namespace: u32,
    pub bytes: Range<u64>,
}

impl Extent {
    fn overlaps(&self, other: &Self) -> bool {
        (self.on, self.namespace) == (other.on, other.namespace)
            && self.bytes.start < other.bytes.end
            && other.bytes.start < self.bytes.end
    }
}

impl OpenMapping {
    /// What it occupies: its range, of a mirrored one with the label, and its mirror's.
    fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let block = u64::from(self.shape.namespace.block_bytes());
        let start = self.shape.first_lba * block;
        let label = if self.mirror.is_some() { block } else { 0 };
        let bytes = start..start + self.shape.capacity_bytes + label;
        let own = Extent { on: StreamId::Primary, namespace: self.shape.namespace.id(), bytes };
        let mirror = self.mirror.as_ref().map(|mirror| {
            let block = u64::from(mirror.shape.namespace.block_bytes());
            let start = mirror.shape.first_lba * block;
            let bytes = start..start + mirror.shape.capacity_bytes + block;
            Extent { on: mirror.on, namespace: mirror.shape.namespace.id(), bytes }
        });
        std::iter::once(own).chain(mirror)
    }
}

/// One taken slot. It stays taken while a handle exists, also after the mapping was closed: a handle's keys
/// name the slot.
#[derive(Debug)]
struct Entry {
    open: Arc<OpenMapping>,
    handles: usize,
}

/// All open mappings of an engine.
#[derive(Debug)]
pub(crate) struct MappingTable {
    entries: Mutex<Vec<Option<Entry>>>,
    /// Set when the engine is closed: nothing opens any more.
    closed: AtomicBool,
}

impl MappingTable {
    pub(crate) fn new() -> Self {
        let entries = (0..MAPPINGS_MAX).map(|_| None).collect();
        Self { entries: Mutex::new(entries), closed: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Finds the mapping of exactly this range, or takes a slot for a new one; `make` builds it for its slot.
    /// `first_lba` and `capacity_bytes` have been checked against the namespace, `gates` against the engine.
    pub(crate) fn open(
        &self,
        namespace: u32,
        first_lba: u64,
        capacity_bytes: u64,
        (order, gates): (FolioOrder, &MappingGates),
        (mirror, extents): (Option<&MirrorOptions>, &[Extent]),
        make: impl FnOnce(u16) -> OpenMapping,
    ) -> Result<Arc<OpenMapping>> {
        let mut entries = self.lock();
        if self.closed.load(Ordering::SeqCst) {
            return Err(Error::Closed);
        }
        if let [own, mirror] = extents
            && own.overlaps(mirror)
        {
            return Err(Error::Mapping {
                reason: format!(
                    "its bytes {}..{} overlap those of its mirror, {}..{}, the labels included; choose another \
                     start_bytes for the mirror",
                    own.bytes.start, own.bytes.end, mirror.bytes.start, mirror.bytes.end
                ),
            });
        }
        for entry in entries.iter_mut().flatten() {
            let shape = &entry.open.shape;
            if entry.open.dropped.load(Ordering::SeqCst) {
                continue;
            }
            let here = (shape.namespace.id(), shape.first_lba, shape.capacity_bytes);
            if here == (namespace, first_lba, capacity_bytes) {
                if entry.open.end.is_closed() {
                    return Err(Error::Mapping { reason: "the same range is just being closed".to_owned() });
                }
                if shape.order != order {
                    let (is, wanted) = (4096u32 << shape.order.0, 4096u32 << order.0);
                    return Err(Error::Mapping {
                        reason: format!(
                            "it is open with page_bytes {is}, and {wanted} is asked for; ask for {is}, or close it first"
                        ),
                    });
                }
                gates.check_same(&entry.open.gates)?;
                if entry.open.mirror.as_ref().map(|mirror| &mirror.options) != mirror {
                    return Err(Error::Mapping {
                        reason: format!(
                            "the same range is open with mirror: {:?}; every handle of a mapping has the same mirror",
                            entry.open.mirror.as_ref().map(|mirror| &mirror.options)
                        ),
                    });
                }
                entry.handles += 1;
                return Ok(entry.open.clone());
            }
            for other in entry.open.extents() {
                if let Some(wanted) = extents.iter().find(|wanted| wanted.overlaps(&other)) {
                    let (wanted, other) = (&wanted.bytes, &other.bytes);
                    return Err(Error::Mapping {
                        reason: format!(
                            "bytes {}..{} overlap the open mapping of bytes {}..{}, or its mirror; open exactly that \
                             range for another handle, or close it first",
                            wanted.start, wanted.end, other.start, other.end
                        ),
                    });
                }
            }
        }
        let open_entries =
            entries.iter().flatten().filter(|entry| !entry.open.dropped.load(Ordering::SeqCst));
        gates.check_acyclic(open_entries.map(|entry| &entry.open.gates))?;
        let Some(slot) = entries.iter().position(Option::is_none) else {
            return Err(Error::Mapping {
                reason: format!("{MAPPINGS_MAX} mappings are open, which is the most; close one first"),
            });
        };
        let open = Arc::new(make(slot as u16));
        entries[slot] = Some(Entry { open: open.clone(), handles: 1 });
        Ok(open)
    }

    pub(crate) fn add_handle(&self, open: &Arc<OpenMapping>) {
        if let Some(entry) = &mut self.lock()[open.shape.slot as usize] {
            entry.handles += 1;
        }
    }

    pub(crate) fn drop_handle(&self, open: &Arc<OpenMapping>) {
        let slot = &mut self.lock()[open.shape.slot as usize];
        if let Some(entry) = slot {
            entry.handles -= 1;
            // A mapping without handles stays open and cached, unless it was closed.
            if entry.handles == 0 && open.dropped.load(Ordering::SeqCst) {
                *slot = None;
            }
        }
    }

    /// Mappings that are open.
    pub(crate) fn all(&self) -> Vec<Arc<OpenMapping>> {
        let entries = self.lock();
        let open = entries.iter().flatten().filter(|entry| !entry.open.end.is_closed());
        open.map(|entry| entry.open.clone()).collect()
    }

    /// The mirror's shape in a slot, open or closed.
    pub(crate) fn with_mirror_shape<T>(&self, slot: u16, read: impl FnOnce(&MappingShape) -> T) -> Option<T> {
        self.lock().get(slot as usize)?.as_ref()?.open.mirror.as_ref().map(|mirror| read(&mirror.shape))
    }

    /// The shape in a slot, open or closed.
    pub(crate) fn with_shape<T>(&self, slot: u16, read: impl FnOnce(&MappingShape) -> T) -> Option<T> {
        self.lock().get(slot as usize)?.as_ref().map(|entry| read(&entry.open.shape))
    }
}
