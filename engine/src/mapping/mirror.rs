//! The mirror of a mapping, as its handles see it: opening and closing by labels, its state, resynchronisation.
//!
//! Who opens a mapping first reads the labels, one at a time ([`LabelTurn`](crate::mirror::LabelTurn)); a mapping without
//! a mirror looks for a label, too, so that half of a pair is never used alone without a trace.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use foliant_nvme::Namespace;

use super::{Mapping, MappingOptions};
use crate::cache::folio::FolioOrder;
use crate::cache::frames::PAGE_BYTES;
use crate::cache::shape::{MappingShape, Stability};
use crate::engine::{Engine, EngineInner, capacity_bytes};
use crate::error::{Error, Result};
use crate::mirror::label::{LABEL_BYTES, LabelState, MirrorLabel, MirrorRole};
use crate::mirror::{
    LabelPlace, MirrorCause, MirrorOptions, MirrorState, OpenMirror, PairNumbers, StreamId, TakenTurn,
    refuse, stale,
};
use crate::reply::block_on;
use crate::shard::open::OpenMapping;
use crate::shard::raw::LabelAction;
use crate::shard::request::Request;
use crate::table::Extent;
use crate::writeback::commit::Durability;

/// Times that a label's command is tried.
const LABEL_TRIES: u32 = 4;
/// The length of a mirrored mapping that takes the rest of its namespace is rounded down to this: the largest page.
const REST_ALIGN: u64 = 64 << 10;

/// Where a mapping's mirror will be, checked.
#[derive(Debug)]
pub(crate) struct MirrorPlan {
    namespace: Namespace,
    first_lba: u64,
    durability: Arc<Durability>,
    options: MirrorOptions,
    /// The device that its namespace is of.
    on: StreamId,
    write_zeroes: bool,
}

impl MirrorPlan {
    /// Checks where `options` wants the mirror of a mapping of `len_bytes` bytes.
    pub(crate) fn new(inner: &EngineInner, options: &MappingOptions, len_bytes: u64) -> Result<Option<Self>> {
        let Some(wanted) = &options.mirror else { return Ok(None) };
        let Some(side) = &inner.mirror else {
            return refuse(
                "the engine has no mirror device; open it with EngineOptions::mirror, or the mapping without a mirror",
            );
        };
        let Some(namespace) = side.namespaces.iter().find(|ns| ns.id() == wanted.namespace) else {
            let known: Vec<u32> = side.namespaces.iter().map(Namespace::id).collect();
            return refuse(format!(
                "there is no namespace {} on its device, which has {known:?}",
                wanted.namespace
            ));
        };
        let (block, capacity) = (u64::from(namespace.block_bytes()), capacity_bytes(namespace));
        if block > PAGE_BYTES as u64 {
            return refuse(format!(
                "namespace {} has blocks of {block} bytes; 512 to 4096 are supported",
                wanted.namespace
            ));
        }
        let start = wanted.start_bytes;
        if !start.is_multiple_of(block) || !len_bytes.is_multiple_of(block) {
            return refuse(format!(
                "its start {start} and the mapping's length {len_bytes} must be multiples of its {block}-byte block"
            ));
        }
        let end = start.checked_add(len_bytes).and_then(|end| end.checked_add(block));
        if end.is_none_or(|end| end > capacity) {
            return refuse(format!(
                "{len_bytes} bytes from {start} on and a block for the label don't fit into namespace {}, which has \
                 {capacity} bytes; choose another start_bytes, or a mapping of at most {} bytes",
                wanted.namespace,
                capacity.saturating_sub(start).saturating_sub(block)
            ));
        }
        let plan = Self {
            first_lba: start / block,
            durability: side.durability[&wanted.namespace].clone(),
            options: wanted.clone(),
            on: side.on,
            write_zeroes: side.write_zeroes,
            namespace: namespace.clone(),
        };
        let order = options.order().unwrap_or(FolioOrder(0));
        let needed =
            plan.shape(0, len_bytes, (order, options.stability), inner.links.len()).block_commands_max();
        let had = u32::from(side.queue_entries) / 2;
        if needed > had {
            return refuse(format!(
                "its device splits a page into {needed} commands, and half of its queue holds {had}; open the engine \
                 with more queue_entries"
            ));
        }
        Ok(Some(plan))
    }

    fn shape(
        &self,
        slot: u16,
        len_bytes: u64,
        order: (FolioOrder, Stability),
        shards: usize,
    ) -> MappingShape {
        MappingShape::new(slot, self.namespace.clone(), self.first_lba, len_bytes, order, shards)
    }

    /// The mirror of the mapping with this geometry on the primary.
    pub(crate) fn open(&self, primary: &MappingShape, shards: usize) -> OpenMirror {
        let shape =
            self.shape(primary.slot, primary.capacity_bytes, (primary.order, primary.stability), shards);
        OpenMirror::new(shape, self.durability.clone(), self.options.clone(), self.write_zeroes, self.on)
    }

    /// What the mirror occupies, its label included.
    pub(crate) fn extent(&self, len_bytes: u64) -> Extent {
        let block = u64::from(self.namespace.block_bytes());
        let start = self.first_lba * block;
        Extent { on: self.on, namespace: self.namespace.id(), bytes: start..start + len_bytes + block }
    }
}

/// The length of a mirrored mapping that takes the rest of a namespace: room for the label is left.
pub(crate) fn rest_of(capacity: u64, start: u64, block: u64) -> u64 {
    capacity.saturating_sub(start).saturating_sub(block) / REST_ALIGN * REST_ALIGN
}

impl EngineInner {
    /// Does something with a label, a few times if that fails in passing.
    async fn label(&self, place: &LabelPlace, action: LabelAction) -> Result<()> {
        let mut tries = 0;
        loop {
            let request = Request::Label { place: place.clone(), action: action.clone() };
            tries += 1;
            match self.links[0].request(request).await {
                Err(Error::Device { source, .. }) if source.is_retryable() && tries < LABEL_TRIES => {}
                result => return result.map(drop),
            }
        }
    }

    async fn read_label(&self, place: &LabelPlace) -> Result<Option<MirrorLabel>> {
        let label = Arc::new(Mutex::new(None));
        self.label(place, LabelAction::Read(label.clone())).await?;
        Ok(*label.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The places of a pair's labels.
fn places(open: &OpenMapping, mirror: &OpenMirror) -> (LabelPlace, LabelPlace) {
    (LabelPlace::of(StreamId::Primary, &open.shape), LabelPlace::of(StreamId::Mirror, &mirror.shape))
}

fn label_of(place: &LabelPlace, numbers: PairNumbers, state: LabelState) -> MirrorLabel {
    MirrorLabel {
        role: if place.stream == StreamId::Primary { MirrorRole::Primary } else { MirrorRole::Mirror },
        state,
        pair: numbers.pair,
        generation: numbers.generation,
        start_bytes: place.start_bytes,
        len_bytes: place.len_bytes,
    }
}

/// A number that no other pair has, as far as chance goes.
fn draw_pair() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish() | 1
}

impl Mapping {
    /// What is known of the mapping's mirror; `None` without one.
    #[must_use]
    pub fn mirror_state(&self) -> Option<MirrorState> {
        self.open.mirror.as_ref().map(OpenMirror::state)
    }

    /// Before the first use of an opened mapping: reads the labels and marks them as in use.
    pub(crate) async fn attach(&self) -> Result<()> {
        let turns = &self.open.labels;
        if turns.is_attached() {
            return Ok(());
        }
        let Some(mirror) = &self.open.mirror else {
            // Several at once do no harm: each finds the label, or what another has made of it.
            self.look_for_label().await?;
            turns.set_attached();
            return Ok(());
        };
        let _turn = self.take_turn().await?;
        if !turns.is_attached() {
            self.attach_pair(mirror).await?;
            turns.set_attached();
        }
        Ok(())
    }

    /// Nobody else opens, closes or resynchronises the mapping as long as this is held.
    pub(super) async fn take_turn(&self) -> Result<TakenTurn<'_>> {
        self.open.labels.take(self.engine.links[0].slot_wait).await
    }

    async fn attach_pair(&self, mirror: &OpenMirror) -> Result<()> {
        let (at_primary, at_mirror) = places(&self.open, mirror);
        let ours = |place: &LabelPlace, label: Option<MirrorLabel>| {
            label.filter(|label| label.is_of(place.start_bytes, place.len_bytes))
        };
        let here = ours(&at_primary, self.engine.read_label(&at_primary).await?);
        let primary = here.filter(|label| label.role == MirrorRole::Primary);
        let (theirs, found) = match self.engine.read_label(&at_mirror).await {
            Ok(label) => {
                let label = ours(&at_mirror, label);
                (label, MirrorLabel::judge(primary.as_ref(), label.as_ref()))
            }
            Err(error) => {
                tracing::warn!(%error, "the label of a mirror can't be read");
                (None, Err(MirrorCause::Lost(error.to_string().into())))
            }
        };
        if let Some(label) = here
            && label.is_stale_mirror(theirs.as_ref())
        {
            // The two are swapped: what is read would be old, and a resynchronisation would make everything old.
            return Err(stale(&label));
        }
        let mirror_was_alone = theirs.is_some_and(|label| {
            label.state == LabelState::Alone && primary.is_none_or(|primary| primary.pair == label.pair)
        });
        let numbers = match primary {
            Some(label) => {
                PairNumbers { pair: label.pair, generation: label.generation + 1, mirror_was_alone }
            }
            None => PairNumbers { pair: draw_pair(), generation: 1, mirror_was_alone },
        };
        // From here on, until both are closed cleanly, neither label says that the two are equal.
        let open = |place| LabelAction::Write(label_of(place, numbers, LabelState::Open));
        self.engine.label(&at_primary, open(&at_primary)).await?;
        let found = found.and_then(|()| match mirror.check_flushes() {
            Err(Error::MirrorDegraded { cause }) => Err(cause),
            _ => Ok(()),
        });
        let found = match found {
            Ok(()) => self.engine.label(&at_mirror, open(&at_mirror)).await.map_err(|error| {
                tracing::warn!(%error, "the label of a mirror can't be written");
                MirrorCause::Lost(error.to_string().into())
            }),
            Err(cause) => Err(cause),
        };
        if let Err(cause) = &found {
            tracing::warn!(
                mapping = self.open.shape.slot,
                %cause,
                "the mapping's mirror is opened degraded: it isn't written until it is resynchronised"
            );
        }
        mirror.set_numbers(numbers);
        mirror.attach(found);
        Ok(())
    }

    /// A mapping without a mirror: what if its range is half of a pair?
    async fn look_for_label(&self) -> Result<()> {
        let shape = &self.open.shape;
        let mut place = LabelPlace::of(StreamId::Primary, shape);
        let capacity = capacity_bytes(&shape.namespace);
        let block = u64::from(shape.namespace.block_bytes());
        let reaches_end = place.end_bytes() > capacity;
        if reaches_end {
            // Of a range up to the namespace's end the label would lie inside.
            place.len_bytes = rest_of(capacity, place.start_bytes, block);
        }
        if place.len_bytes == 0 || block < LABEL_BYTES as u64 {
            return Ok(());
        }
        let label = match self.engine.read_label(&place).await {
            Ok(label) => label.filter(|label| label.is_of(place.start_bytes, place.len_bytes)),
            Err(error) => {
                tracing::warn!(%error, "can't tell whether a mapping's range is half of a mirrored pair");
                None
            }
        };
        let Some(label) = label else { return Ok(()) };
        if reaches_end {
            return refuse(format!(
                "bytes {0}..{1} of the namespace are the {2} of a mirrored pair, whose label this mapping would \
                 overwrite; open it with len_bytes {3}, with its mirror or without",
                label.start_bytes,
                label.start_bytes + label.len_bytes,
                label.role,
                label.len_bytes
            ));
        }
        if label.role == MirrorRole::Mirror && label.state == LabelState::Open {
            return Err(stale(&label));
        }
        let generation = label.generation + u64::from(label.role == MirrorRole::Primary);
        let alone = MirrorLabel { state: LabelState::Alone, generation, ..label };
        self.engine.label(&place, LabelAction::Write(alone)).await
    }

    /// After the mapping was closed and nothing is written to it any more: marks both halves as equal, if they are.
    pub(crate) async fn detach(&self) {
        let Some(mirror) = &self.open.mirror else { return };
        let (at_primary, at_mirror) = places(&self.open, mirror);
        let clean = |place| LabelAction::Write(label_of(place, mirror.numbers(), LabelState::Clean));
        let is_in_sync = mirror.is_in_sync() && mirror.check_flushes().is_ok();
        let of_mirror = is_in_sync.then_some(&at_mirror);
        for place in of_mirror.into_iter().chain([&at_primary]) {
            // What was written is durable; a label that is missing costs a resynchronisation.
            if let Err(error) = self.engine.label(place, clean(place)).await {
                tracing::warn!(%error, "the label of a mirrored range can't be written: it has to be resynchronised");
            }
        }
    }

    /// Makes a degraded mirror equal to the primary again: everything is copied, while reads and writes go on. When it
    /// returns `Ok`, the mirror is in sync and all of it durable. [`mirror_state`](Self::mirror_state) tells how far it has
    /// come. A mirror that is in sync already costs nothing.
    ///
    /// # Errors
    /// [`Error::Mirror`] without a mirror, while a resynchronisation is under way, when the mirror's device was lost (then
    /// the engine has to be opened anew), or when the mirror was opened alone and may hold what the primary doesn't;
    /// [`Error::MirrorDegraded`] when the mirror fails meanwhile; [`Error::Device`] when the primary can't be read.
    pub fn resync_mirror(&self) -> Result<()> {
        block_on(self.resync_mirror_async())
    }

    /// As [`resync_mirror`](Self::resync_mirror), without blocking the thread. Dropped midway, the mirror is degraded as it
    /// was.
    ///
    /// # Errors
    /// As `resync_mirror`.
    pub async fn resync_mirror_async(&self) -> Result<()> {
        self.check_open()?;
        let Some(mirror) = &self.open.mirror else {
            return refuse("the mapping has none; open it with MappingOptions::mirror");
        };
        if mirror.is_resyncing() {
            return refuse("a resynchronisation is under way already");
        }
        let _turn = self.take_turn().await?;
        // Closed while it waited, the range may be somebody else's.
        self.check_open()?;
        mirror.durability.check()?;
        if mirror.numbers().mirror_was_alone {
            return refuse(
                "it was opened alone since it was last in sync, so it may hold what the primary doesn't, and \
                 resynchronising would overwrite that; copy it back first, or give it up by Engine::erase_mirror_label, \
                 and open the mapping again",
            );
        }
        if mirror.is_in_sync() {
            return Ok(());
        }
        // The label first, so that a mirror that is half copied is known as one.
        let (_, at_mirror) = places(&self.open, mirror);
        let label = label_of(&at_mirror, mirror.numbers(), LabelState::Open);
        self.engine.label(&at_mirror, LabelAction::Write(label)).await.map_err(|error| match error {
            Error::Device { source, operation, .. } => {
                Error::MirrorDegraded { cause: MirrorCause::Command { operation, source } }
            }
            Error::Closed => {
                Error::Mirror { reason: "its device was lost; close the engine and open it again".to_owned() }
            }
            error => error,
        })?;
        if !mirror.begin_resync() {
            return refuse("a resynchronisation is under way already");
        }
        let guard = GiveUp(mirror);
        let slot = self.open.shape.slot;
        let copied = self.ask_shards(|_| true, || Request::Resync { mapping: slot }).await;
        let committed = match copied {
            Ok(_) => self.commit_mirror().await,
            Err(error) => Err(error),
        };
        committed?;
        if mirror.end_resync() {
            std::mem::forget(guard);
            tracing::info!(mapping = slot, "a mirror is in sync again");
            return Ok(());
        }
        match mirror.state() {
            MirrorState::Degraded { cause, .. } => Err(Error::MirrorDegraded { cause }),
            _ => refuse("it was given up"),
        }
    }

    async fn commit_mirror(&self) -> Result<()> {
        self.commit_link().request(Request::CommitMirror(self.open.clone())).await.map(drop)
    }

    /// Flushes each device of the mapping that holds completed writes in a volatile cache, both at once. What fails on
    /// the mirror degrades that, and is no error; that the mirror couldn't be asked is one.
    pub(crate) async fn commit_streams(&self) -> Result<()> {
        let of_mirror = self.open.mirror.as_ref().is_some_and(OpenMirror::needs_commit);
        if !of_mirror {
            return if self.open.durability.is_settled() { Ok(()) } else { self.commit().await };
        }
        let mut mirror = pin!(self.commit_mirror());
        let mut primary =
            pin!(async { if self.open.durability.is_settled() { Ok(()) } else { self.commit().await } });
        let (mut of_mirror, mut of_primary) = (None, None);
        let (of_mirror, of_primary) = std::future::poll_fn(|context| {
            if of_mirror.is_none()
                && let Poll::Ready(result) = mirror.as_mut().poll(context)
            {
                of_mirror = Some(result);
            }
            if of_primary.is_none()
                && let Poll::Ready(result) = primary.as_mut().poll(context)
            {
                of_primary = Some(result);
            }
            if of_mirror.is_none() || of_primary.is_none() {
                return Poll::Pending;
            }
            Poll::Ready((of_mirror.take().unwrap_or(Ok(())), of_primary.take().unwrap_or(Ok(()))))
        })
        .await;
        match of_mirror {
            Err(Error::MirrorDegraded { cause }) => {
                self.lose_unflushed(cause);
                of_primary
            }
            result => of_primary.and(result),
        }
    }

    /// The mirror wasn't flushed. Its shards have degraded it, unless they have dropped the mapping already.
    fn lose_unflushed(&self, cause: MirrorCause) {
        if let Some(mirror) = &self.open.mirror
            && mirror.degrade(cause.clone(), 0)
        {
            let mapping = self.open.shape.slot;
            tracing::error!(mapping, %cause, "a mirror is degraded: it wasn't flushed before its mapping was closed");
        }
    }

    /// Before a mirrored mapping is closed: ends a resynchronisation that is under way, so that the close needn't wait for
    /// it.
    pub(crate) fn give_up_resync(&self) {
        if let Some(mirror) = &self.open.mirror
            && mirror.is_resyncing()
        {
            mirror.degrade(MirrorCause::ResyncGivenUp, 0);
        }
    }

    /// What a closing engine does with the mapping.
    pub(crate) async fn close_with_engine(&self) -> Result<()> {
        if self.open.mirror.is_some() { self.close_handle().await } else { self.sync_async().await }
    }

    /// A mapping that may not be opened after all: nobody gets another handle of it.
    pub(crate) fn refuse_open(&self) {
        self.open.end.close();
        self.open.dropped.store(true, Ordering::SeqCst);
    }
}

/// A resynchronisation that isn't brought to its end leaves the mirror degraded.
struct GiveUp<'a>(&'a OpenMirror);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        self.0.degrade(MirrorCause::ResyncGivenUp, 0);
    }
}

impl Engine {
    /// What the label behind a range says: `options` names namespace, start and length as for a mapping of the range, on
    /// the engine's own device. `None` where there is no label of that range.
    ///
    /// # Errors
    /// [`Error::Mapping`] when the range doesn't fit; [`Error::Device`] when the label can't be read.
    pub fn mirror_label(&self, options: &MappingOptions) -> Result<Option<MirrorLabel>> {
        block_on(self.mirror_label_async(options))
    }

    /// As [`mirror_label`](Self::mirror_label), without blocking the thread.
    ///
    /// # Errors
    /// As `mirror_label`.
    pub async fn mirror_label_async(&self, options: &MappingOptions) -> Result<Option<MirrorLabel>> {
        let place = self.label_place(options)?;
        let label = self.inner().read_label(&place).await?;
        Ok(label.filter(|label| label.is_of(place.start_bytes, place.len_bytes)))
    }

    /// Accepts what a mirror holds although its label doesn't say that it is in sync: for when its primary is lost. The
    /// range can be opened as a mapping afterwards. If the mirror was in sync when the machine stopped, it has everything
    /// that was synced; if it was cut off before, it has what was synced until then, and perhaps parts of later writes.
    ///
    /// # Errors
    /// As [`mirror_label`](Self::mirror_label); [`Error::Mirror`] where there is no label.
    pub fn accept_mirror(&self, options: &MappingOptions) -> Result<()> {
        block_on(self.accept_mirror_async(options))
    }

    /// As [`accept_mirror`](Self::accept_mirror), without blocking the thread.
    ///
    /// # Errors
    /// As `accept_mirror`.
    pub async fn accept_mirror_async(&self, options: &MappingOptions) -> Result<()> {
        let place = self.label_place(options)?;
        let Some(label) = self.mirror_label_async(options).await? else {
            return refuse(
                "the range has no label; name namespace, start_bytes and len_bytes of the mirrored range",
            );
        };
        let alone = MirrorLabel { state: LabelState::Alone, ..label };
        self.inner().label(&place, LabelAction::Write(alone)).await
    }

    /// Erases the label behind a range, so that it is half of no pair any more.
    ///
    /// # Errors
    /// As [`accept_mirror`](Self::accept_mirror).
    pub fn erase_mirror_label(&self, options: &MappingOptions) -> Result<()> {
        block_on(self.erase_mirror_label_async(options))
    }

    /// As [`erase_mirror_label`](Self::erase_mirror_label), without blocking the thread.
    ///
    /// # Errors
    /// As `erase_mirror_label`.
    pub async fn erase_mirror_label_async(&self, options: &MappingOptions) -> Result<()> {
        let place = self.label_place(options)?;
        if self.mirror_label_async(options).await?.is_none() {
            return refuse(
                "the range has no label; name namespace, start_bytes and len_bytes of the mirrored range",
            );
        }
        self.inner().label(&place, LabelAction::Erase).await
    }

    fn label_place(&self, options: &MappingOptions) -> Result<LabelPlace> {
        let wrong = |reason: String| Err(Error::Mapping { reason });
        let Some(namespace) = self.namespaces().iter().find(|ns| ns.id() == options.namespace) else {
            return wrong(format!("there is no namespace {}", options.namespace));
        };
        let (block, capacity) = (u64::from(namespace.block_bytes()), capacity_bytes(namespace));
        let start_bytes = options.start_bytes;
        let len_bytes = options.len_bytes.unwrap_or_else(|| rest_of(capacity, start_bytes, block));
        let place =
            LabelPlace { stream: StreamId::Primary, namespace: namespace.clone(), start_bytes, len_bytes };
        let fits = start_bytes.checked_add(len_bytes).is_some_and(|end| end < capacity);
        if !fits || !start_bytes.is_multiple_of(block) || !len_bytes.is_multiple_of(block) {
            return wrong(format!(
                "bytes {start_bytes}..{} and a label of {block} bytes don't lie on blocks within the {capacity} bytes of \
                 namespace {}",
                start_bytes.saturating_add(len_bytes),
                options.namespace
            ));
        }
        Ok(place)
    }
}
