//! The driver as the cases use it: a controller, its first namespace and a queue pair, one request at a time or many.

use std::sync::Arc;
use std::time::{Duration, Instant};

use foliant_nvme::{
    CommandError, Completion, Controller, ControllerOptions, DmaArena, DmaBuffer, DriverError, Fua, Io, Lba,
    Namespace, Payload, QueuePair, Rejected, Segment, Transport,
};

/// How long a command may take before a test gives up, on the slowest machine that emulates another.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// What a request carries: nothing, or parts of one buffer.
pub struct Load {
    buffer: Option<DmaBuffer>,
    /// Offset and length in the buffer, in bytes, in the order of transfer.
    parts: Vec<(usize, usize)>,
}

// SAFETY: the segments lie within the buffer, as `parts` checked, and the buffer is owned here until the completion
// hands it back.
#[expect(unsafe_code, reason = "a payload vouches for its memory")]
unsafe impl Payload for Load {
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let base = self.buffer.as_ref().map(DmaBuffer::iova);
        self.parts.iter().filter_map(move |&(offset, len)| {
            Some(Segment { iova: base?.offset(offset as u64), len_bytes: len as u32 })
        })
    }
}

impl Load {
    /// No data.
    #[must_use]
    pub const fn nothing() -> Self {
        Self { buffer: None, parts: Vec::new() }
    }

    /// A whole buffer that holds `data`.
    ///
    /// # Panics
    /// When the arena has no room for it.
    #[must_use]
    pub fn of(arena: &DmaArena, data: &[u8]) -> Self {
        let mut buffer = arena.allocate(data.len()).expect("the arena has room for a request");
        buffer.as_mut_slice().copy_from_slice(data);
        Self { parts: vec![(0, buffer.len_bytes())], buffer: Some(buffer) }
    }

    /// Parts of a buffer, each an offset and a length in bytes.
    ///
    /// # Panics
    /// When a part doesn't lie within the buffer.
    #[must_use]
    pub fn parts(buffer: DmaBuffer, parts: Vec<(usize, usize)>) -> Self {
        assert!(parts.iter().all(|&(offset, len)| offset + len <= buffer.len_bytes()), "{parts:?}");
        Self { buffer: Some(buffer), parts }
    }

    /// The whole buffer's bytes; none where there is no buffer.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], DmaBuffer::as_slice)
    }
}

/// The driver on a controller, with one queue pair.
pub struct Host {
    /// The controller.
    pub controller: Controller,
    /// Its first namespace, or another that a test has put here.
    pub namespace: Namespace,
    /// A queue pair.
    pub queue: QueuePair<Load>,
}

impl Host {
    /// Opens the controller and creates a queue pair.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When the controller has no namespace.
    pub fn open(transport: Arc<dyn Transport>, options: &ControllerOptions) -> Result<Self, DriverError> {
        let controller = Controller::open(transport, options)?;
        let namespace = controller.namespaces().first().expect("there is a namespace").clone();
        let queue = controller.queue_pair()?;
        Ok(Self { controller, namespace, queue })
    }

    /// Size of a block in bytes.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.namespace.block_bytes() as usize
    }

    /// Takes a request of the host's namespace.
    ///
    /// # Errors
    /// The driver's refusal, with the payload.
    pub fn submit(&mut self, io: Io, load: Load) -> Result<(), Rejected<Load>> {
        self.queue.submit(&self.namespace, io, load)
    }

    /// Rings, and waits for the next request that ends.
    ///
    /// # Panics
    /// When none does within a minute, or the queue fails.
    pub fn await_next(&mut self) -> Completion<Load> {
        next_of(&mut self.queue)
    }

    /// Carries out one request.
    ///
    /// # Errors
    /// The device's answer.
    ///
    /// # Panics
    /// When the driver refuses the request.
    pub fn run(&mut self, io: Io, load: Load) -> Result<Load, CommandError> {
        self.submit(io, load).expect("the driver takes the request");
        let completion = self.await_next();
        completion.result.map(|()| completion.payload)
    }

    /// Writes whole blocks, in as many requests as the queue pair's length asks for.
    ///
    /// # Panics
    /// When that fails.
    pub fn write(&mut self, lba: u64, data: &[u8], fua: Fua) {
        let (block, piece_blocks) = (self.block_bytes(), self.piece_blocks());
        for (lba, piece) in (lba..).step_by(piece_blocks).zip(data.chunks(piece_blocks * block)) {
            let blocks = (piece.len() / block) as u32;
            let load = Load::of(self.controller.arena(), piece);
            self.run(Io::Write { lba: Lba(lba), blocks, fua }, load)
                .unwrap_or_else(|error| panic!("the write of {blocks} blocks from {lba} failed: {error}"));
        }
    }

    /// Reads whole blocks, into memory that held something else, in as many requests as the queue pair's length asks
    /// for.
    ///
    /// # Panics
    /// When that fails.
    pub fn read(&mut self, lba: u64, blocks: u32) -> Vec<u8> {
        let mut data = vec![0xEE; blocks as usize * self.block_bytes()];
        let (block, piece_blocks) = (self.block_bytes(), self.piece_blocks());
        for (lba, piece) in (lba..).step_by(piece_blocks).zip(data.chunks_mut(piece_blocks * block)) {
            let blocks = (piece.len() / block) as u32;
            let load = Load::of(self.controller.arena(), piece);
            let load = self
                .run(Io::Read { lba: Lba(lba), blocks }, load)
                .unwrap_or_else(|error| panic!("the read of {blocks} blocks from {lba} failed: {error}"));
            piece.copy_from_slice(load.bytes());
        }
        data
    }

    /// Blocks of a request that surely has slots enough. Of `k` units it becomes at most `2 k + 1` commands: one a
    /// unit, and one more for each boundary that it crosses.
    fn piece_blocks(&self) -> usize {
        let max = self.namespace.max_transfer_bytes() / self.namespace.block_bytes();
        let unit = self.namespace.optimal_boundary_blocks().map_or(max, |boundary| boundary.min(max));
        let slots = self.queue.free_commands() + self.queue.in_flight();
        (slots.saturating_sub(1) / 2 * unit).max(1) as usize
    }

    /// Sends a Flush and waits for it.
    ///
    /// # Panics
    /// When it fails.
    pub fn flush(&mut self) {
        self.run(Io::Flush, Load::nothing()).map(drop).expect("the flush succeeds");
    }

    /// Lets go of the queue pair and shuts the controller down in order.
    ///
    /// # Panics
    /// When the controller doesn't.
    pub fn shut_down(self) {
        drop(self.queue);
        self.controller.shutdown().expect("the controller shuts down");
    }
}

/// Rings a queue pair, and waits for the next of its requests that ends.
///
/// # Panics
/// When none does within a minute, or the queue fails.
pub(super) fn next_of<P: Payload>(queue: &mut QueuePair<P>) -> Completion<P> {
    queue.ring();
    let start = Instant::now();
    loop {
        for _ in 0..1000 {
            queue.pump();
            let mut ended = None;
            queue.poll(1, |completion| ended = Some(completion)).expect("the queue is well");
            if let Some(completion) = ended {
                return completion;
            }
        }
        queue.check().expect("the controller is well");
        let in_flight = queue.in_flight();
        assert!(start.elapsed() < LIMIT, "no completion in {LIMIT:?}, with {in_flight} commands in flight");
    }
}
