//! What to read before it is asked for: windows in front of sequential readers, for one handle of a mapping (WB-28).
//!
//! Pure: it sees the reads that missed and the marked pages that were met, and says which pages to bring in. It
//! counts in pages of the mapping, knows no cache and no device, and remembers nothing of reads that hit, which therefore cost nothing.
//!
//! ```text
//!                         │◄──── async_size ─────►│
//!     │◄─────────────── size ────────────────────►│
//!     ├───────────────────#───────────────────────┤
//!     ^ start             ^ the marker: who uses this page asks for the next window
//! ```
//!
//! # The curve
//!
//! * It **opens small**: a read that follows another, or begins at the mapping's first page, gets four times its size,
//!   twice for a middling one (`get_init_ra_size`). A read that stands alone gets its own pages and nothing else, in several
//!   windows if they are more than one holds.
//! * It **grows** with each window, fourfold while it is small, then twofold, up to the maximum (`get_next_ra_size`).
//!   From the second window on the marker is the window's first page (`async_size == size`): one whole
//!   window is on its way while the one before is used, so a reader at the device's pace never waits.
//! * It **collapses**: a page that is missing *within* a window was evicted unused, dropped for want of frames, or failed;
//!   the stream goes on from there with a small window. A jump elsewhere begins as a read that stands alone.
//!
//! A scan may go backwards, and in strides: the fourth of four reads of one size at equal distances, with gaps between them, opens
//! a window of the stretches that follow. (Three happen by chance: among random reads of a small file every few hundred
//! times.) Windows count pages, whatever lies between them ([`Course`]).
//!
//! # Why a state per handle, and several streams in it
//!
//! As in the kernel (`struct file_ra_state`), who reads is told apart by handle: clones are handles of their own, so
//! readers on different handles never disturb each other. One handle may also be used by several threads, or for
//! several scans at once (a merge), so each has [`STREAMS`] streams, told apart by where they go on. Reads that
//! stand alone take the place of other such reads first, so that look-ups don't end the scans between them.
//!
//! A state per mapping and shard would see the requests of all handles mixed, and would see no hits, where the markers
//! are met. Per shard it would also lose a scan at each stripe.
//!
//! Source: `page_cache_sync_ra`, `page_cache_async_ra` in Linux `mm/readahead.c`. Different from there: several streams
//! a handle; backward scans and strides; no guess from what happens to be cached before a lone read, which in a database's
//! warm cache is mostly chance.

use std::ops::Range;

use super::course::{Course, STRIDE_PAGES_MAX, Step, Stretches, Stride};
use super::stripe::{STRIPE_PAGES, Striping};

/// Scans of one handle that are told apart.
const STREAMS: usize = 4;
/// A stream that was in use this many decisions ago, or as many as two of its windows have pages, makes room for another only
/// when all are that young.
const PROTECTED_DECISIONS: u64 = 64;

/// Reads among which strides are found: a scan is seen though others read between its reads.
const LATELY: usize = 8;

/// What windows keep within, in pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The mapping's length.
    pub pages: u64,
    /// The largest window; 0 where readahead is off.
    pub size_max: u64,
}

/// Whether everything that was asked for has been looked at by the shard where a page is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// All of it: what is missing isn't on its way.
    Served,
    /// Not all: a fast reader has overtaken its request.
    Waiting,
}

/// Pages to bring in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// The pages; they may include those that the reader waits for.
    pub pages: Stretches,
    /// The page whose use asks for the next window; `None` where nothing follows.
    pub marker: Option<u64>,
    /// How many pages the reader reads at a time.
    pub read: u64,
}

/// A scan's last window, in positions along the scan.
#[derive(Clone, Copy, Debug)]
struct Scan {
    course: Course,
    start: u64,
    size: u64,
    /// What was read ahead from here on may not have been used yet: the window before `start`, too.
    unused: u64,
    /// Windows end here at the latest: where the only read that is known so far ends, or nowhere.
    until: u64,
    /// Pages that the reader reads at a time.
    read: u64,
}

impl Scan {
    fn new(course: Course, start: u64, size: u64) -> Self {
        Self { course, start, size, unused: start, until: u64::MAX, read: 1 }
    }

    /// The window after this one.
    fn next(self, start: u64, size: u64) -> Self {
        Self { start, size, unused: self.start, ..self }
    }

    fn end(&self) -> u64 {
        self.start + self.size
    }
}

/// What is known of a stream.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// A read of these pages that nothing has followed yet.
    Lone { first: u64, end: u64 },
    /// It is a scan.
    Sequential(Scan),
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    pattern: Pattern,
    /// The decision in which it was last in use.
    used: u64,
}

/// The streams of one handle.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    streams: [Option<Stream>; STREAMS],
    decisions: u64,
    /// The last reads that stood alone, first page and size, in a ring: strides are found among them.
    lately: [Option<(u64, u64)>; LATELY],
    lately_next: usize,
}

impl Streams {
    /// Pages from `page` on are missing, and a read of `count` pages from there waits for them. The window is the
    /// read's own pages where nothing speaks for a scan, or where they have been asked for already.
    pub(crate) fn on_miss(&mut self, page: u64, count: u64, asked: Asked, limits: Limits) -> Window {
        self.decisions += 1;
        let read = page..(page + count).min(limits.pages);
        // Where the read begins on the scan's way. A read of more than a window is taken from its front, whatever was before.
        let position = |course: Course| match course {
            Course::Backward | Course::Strided(_) if count > limits.size_max => None,
            course => course.position_of_read(&read, limits.pages),
        };
        // The scan that has come to the end of its window.
        let at_end = |scan: &Scan| position(scan.course) == Some(scan.end());
        if let Some((at, scan)) = self.find_scan(at_end) {
            let size = next_size(scan.size, limits.size_max).max(count.min(limits.size_max));
            let scan = Scan { until: u64::MAX, read: count, ..scan };
            return self.open(at, scan.next(scan.end(), size), size, limits);
        }
        let holed = |scan: &Scan| {
            position(scan.course).is_some_and(|position| (scan.unused..scan.end()).contains(&position))
        };
        if let Some((at, scan)) = self.find_scan(holed) {
            if asked == Asked::Served {
                return self.begin(at, scan.course, read, scan.until, limits);
            }
            // The reader is where the marker will be, or past it.
            if position(scan.course) == Some(scan.start)
                && scan.end() < scan.until.min(scan.course.end(limits.pages))
            {
                let size = next_size(scan.size, limits.size_max);
                return self.open(at, scan.next(scan.end(), size), size, limits);
            }
            let end = read.end.min(page + limits.size_max);
            return Window { pages: Stretches::one(page..end), marker: None, read: count };
        }
        if let Some(at) = self.find_lone(|lone| lone.end == read.start) {
            return self.begin(at, Course::Forward, read, u64::MAX, limits);
        }
        if page == 0 {
            // The beginning of a file is taken for a scan's.
            return self.begin(self.victim(), Course::Forward, read, u64::MAX, limits);
        }
        if count > limits.size_max {
            // A scan, but as far as is known one of this read only.
            let end = read.end;
            return self.begin(self.victim(), Course::Forward, read, end, limits);
        }
        if let Some(at) = self.find_lone(|lone| lone.start == read.end) {
            return self.begin(at, Course::Backward, read, u64::MAX, limits);
        }
        if let Some((at, stride)) = self.take_stride(&read) {
            return self.begin(at, Course::Strided(stride), read, u64::MAX, limits);
        }
        self.put(self.victim(), Pattern::Lone { first: read.start, end: read.end });
        Window { pages: Stretches::one(read), marker: None, read: count }
    }

    /// The first window of a scan, for a read of its first pages.
    fn begin(&mut self, at: usize, course: Course, read: Range<u64>, until: u64, limits: Limits) -> Window {
        let count = read.end - read.start;
        let size = initial_size(count, limits.size_max);
        let async_size = if size > count { size - count } else { size };
        let start =
            course.position_of_read(&read, limits.pages).expect("a scan begins with a read on its way");
        self.open(at, Scan { until, read: count, ..Scan::new(course, start, size) }, async_size, limits)
    }

    /// A marked page was met. `None` where the pages that follow are cached already, or don't exist.
    pub(crate) fn on_marker(
        &mut self,
        page: u64,
        limits: Limits,
        is_cached: impl Fn(u64) -> bool,
    ) -> Option<Window> {
        self.decisions += 1;
        let position = |scan: &Scan| scan.course.position(page, limits.pages);
        let mine =
            self.find_scan(|scan| position(scan).is_some_and(|at| (scan.unused..scan.end()).contains(&at)));
        let (at, scan) = match mine {
            // Of the window before: its successor has been asked for.
            Some((_, scan)) if position(&scan).is_some_and(|at| at < scan.start) => return None,
            Some(mine) => mine,
            // Another handle's reader came by here: this one follows it.
            None => (self.victim(), Scan::new(Course::Forward, page, 1)),
        };
        let course = scan.course;
        let to = scan.end().saturating_add(limits.size_max).min(course.end(limits.pages)).min(scan.until);
        let mut starts = (scan.end()..to).step_by(course.unit() as usize);
        let start = starts.find(|&at| !is_cached(course.page(at, limits.pages)))?;
        let last_size = if mine.is_some() { scan.size } else { start - page };
        let size = next_size(last_size, limits.size_max);
        Some(self.open(at, scan.next(start, size), size, limits))
    }

    fn find_scan(&self, wanted: impl Fn(&Scan) -> bool) -> Option<(usize, Scan)> {
        let scans =
            self.streams.iter().enumerate().filter_map(|(at, stream)| match stream.as_ref()?.pattern {
                Pattern::Sequential(scan) => Some((at, scan)),
                Pattern::Lone { .. } => None,
            });
        scans.into_iter().find(|(_, scan)| wanted(scan))
    }

    fn find_lone(&self, wanted: impl Fn(&Range<u64>) -> bool) -> Option<usize> {
        self.streams.iter().position(|stream| match stream {
            Some(Stream { pattern: Pattern::Lone { first, end }, .. }) => wanted(&(*first..*end)),
            _ => false,
        })
    }

    /// Whether a read is the fourth of four of one size at equal distances. If not, it is remembered.
    fn take_stride(&mut self, read: &Range<u64>) -> Option<(usize, Stride)> {
        let len = read.end - read.start;
        let lately =
            || self.lately.iter().flatten().filter(|&&(_, count)| count == len).map(|&(first, _)| first);
        let found = lately().find_map(|second| {
            let step = Step::between(second, read.start);
            let is_stride = step.pages() > len && step.pages() <= STRIDE_PAGES_MAX;
            let before = |page: u64| lately().find(|&first| Step::between(first, page) == step);
            (is_stride && before(second).and_then(before).is_some()).then_some((second, step))
        });
        self.lately[self.lately_next] = Some((read.start, len));
        self.lately_next = (self.lately_next + 1) % LATELY;
        let (second, step) = found?;
        let at = self.find_lone(|lone| lone.start == second).unwrap_or_else(|| self.victim());
        Some((at, Stride { origin: read.start, step, len }))
    }

    /// The place for a new stream.
    fn victim(&self) -> usize {
        let worth = |stream: &Option<Stream>| match stream {
            None => (0, 0),
            Some(Stream { pattern: Pattern::Sequential(scan), used })
                if scan.until == u64::MAX
                    && self.decisions - used < PROTECTED_DECISIONS.max(2 * scan.size) =>
            {
                (2, *used)
            }
            Some(stream) => (1, stream.used),
        };
        (0..STREAMS).min_by_key(|&at| worth(&self.streams[at])).unwrap_or(0)
    }

    fn put(&mut self, at: usize, pattern: Pattern) {
        self.streams[at] = Some(Stream { pattern, used: self.decisions });
    }

    /// Records a window of a scan, cut off where the scan ends.
    fn open(&mut self, at: usize, mut scan: Scan, async_size: u64, limits: Limits) -> Window {
        let (course, unit) = (scan.course, scan.course.unit());
        scan.size = (scan.size / unit * unit).max(unit);
        let marker = (scan.end() - async_size.min(scan.size)) / unit * unit;
        let last = course.end(limits.pages).min(scan.until);
        scan.size = scan.size.min(last - scan.start);
        self.put(at, Pattern::Sequential(scan));
        Window {
            pages: course.stretches(scan.start..scan.end(), limits.pages),
            read: scan.read,
            // The last one has no successor to ask for.
            marker: (scan.end() < last).then(|| course.page(marker, limits.pages)),
        }
    }
}

/// Divides pages of 4096 bytes into ranges that one shard holds and that have a stripe's length at most, in ascending
/// order.
pub(crate) fn split_by_shard(striping: Striping, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut rest = pages;
    std::iter::from_fn(move || {
        let start = rest.start;
        let end = rest.end.min(striping.run_end(start)).min(start.saturating_add(STRIPE_PAGES));
        rest.start = end;
        (start < end).then_some(start..end)
    })
}

/// The first window of a scan that reads `count` pages at a time (`get_init_ra_size`).
fn initial_size(count: u64, size_max: u64) -> u64 {
    let size = count.min(size_max).next_power_of_two();
    let size = if size <= size_max / 32 {
        size * 4
    } else if size <= size_max / 4 {
        size * 2
    } else {
        size_max
    };
    size.max(1)
}

/// The window after one of `size` pages (`get_next_ra_size`).
fn next_size(size: u64, size_max: u64) -> u64 {
    let size = if size < size_max / 16 { size * 4 } else { size * 2 };
    size.min(size_max).max(1)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const LIMITS: Limits = Limits { pages: 100_000, size_max: 128 };

    /// A handle and a cache that is never full: reads as a mapping does, and records the windows.
    struct Reader {
        streams: Streams,
        limits: Limits,
        cached: HashSet<u64>,
        markers: HashSet<u64>,
        windows: Vec<Window>,
    }

    fn shape(window: &Window) -> (Range<u64>, Option<u64>) {
        (window.pages.hull.clone(), window.marker)
    }

    impl Reader {
        fn new(limits: Limits) -> Self {
            Self {
                streams: Streams::default(),
                limits,
                cached: HashSet::new(),
                markers: HashSet::new(),
                windows: Vec::new(),
            }
        }

        /// Reads `count` pages; true when none of them had to be waited for.
        fn read(&mut self, page: u64, count: u64) -> bool {
            let waited = (page..page + count).filter(|&at| !self.read_part(at, page + count - at)).count();
            waited == 0
        }

        /// Comes to `page` in a read that goes on for `count` pages; true when it needn't be waited for.
        fn read_part(&mut self, page: u64, count: u64) -> bool {
            let is_cached = !self.cached.insert(page);
            let window = if !is_cached {
                Some(self.streams.on_miss(page, count, Asked::Served, self.limits))
            } else if self.markers.remove(&page) {
                let cached = &self.cached;
                self.streams.on_marker(page, self.limits, |page| cached.contains(&page))
            } else {
                None
            };
            if let Some(window) = window {
                self.cached.extend(window.pages.iter().flatten());
                // Where the reader is at the marker already it has met it.
                let marker = window.marker.filter(|&marker| marker != page);
                let next = window.marker.filter(|&marker| marker == page);
                self.markers.extend(marker);
                self.windows.push(window);
                if let Some(marker) = next {
                    let cached = &self.cached;
                    let next = self.streams.on_marker(marker, self.limits, |page| cached.contains(&page));
                    if let Some(next) = next {
                        self.cached.extend(next.pages.iter().flatten());
                        self.markers.extend(next.marker);
                        self.windows.push(next);
                    }
                }
            }
            is_cached
        }

        /// Reads page after page; returns those that had to be waited for.
        fn scan(&mut self, pages: impl Iterator<Item = u64>) -> Vec<u64> {
            pages.filter(|&page| !self.read(page, 1)).collect()
        }

        fn sizes(&self) -> Vec<u64> {
            self.windows.iter().map(|window| window.pages.iter().flatten().count() as u64).collect()
        }
    }

    #[test]
    fn a_sequential_reader_gets_windows_that_grow_to_the_maximum_and_waits_once() {
        let mut reader = Reader::new(LIMITS);
        assert_eq!(reader.scan(0..2000), [0]);
        assert_eq!(reader.sizes()[..7], [4, 16, 32, 64, 128, 128, 128]);
        assert!(reader.windows.windows(2).all(|pair| pair[0].pages.hull.end == pair[1].pages.hull.start));
    }

    #[test]
    fn a_scan_that_begins_amid_the_mapping_is_seen_at_its_second_read() {
        let mut reader = Reader::new(LIMITS);
        assert_eq!(reader.scan(5000..6000), [5000, 5001]);
        assert_eq!(reader.sizes()[..5], [1, 4, 16, 32, 64]);
    }

    #[test]
    fn a_backward_scan_mirrors_a_forward_one() {
        let mut reader = Reader::new(LIMITS);
        assert_eq!(reader.scan((3000..5000).rev()), [4999, 4998]);
        assert_eq!(reader.sizes()[..7], [1, 4, 16, 32, 64, 128, 128]);
        assert_eq!(shape(&reader.windows[1]), (4995..4999, Some(4997)));
    }

    #[test]
    fn random_reads_get_their_own_pages() {
        let mut reader = Reader::new(LIMITS);
        for i in 1..3000u64 {
            let page = i * 7919 % 50_000 * 2 + 1;
            reader.read(page, 1);
        }
        assert!(reader.sizes().iter().all(|&size| size == 1));
    }

    #[test]
    fn a_large_read_that_stands_alone_gets_its_own_pages_and_is_waited_for_once() {
        for count in [2, 31, 128, 129, 300, 1000] {
            let mut reader = Reader::new(LIMITS);
            // One by one, as a long copy comes to its pages.
            let waits = (0..count).filter(|&at| {
                let missed = !reader.cached.contains(&(5000 + at));
                reader.read_part(5000 + at, count - at);
                missed
            });
            assert_eq!(waits.count(), 1, "of {count}");
            assert_eq!(reader.cached, (5000..5000 + count).collect(), "of {count}");
            // Another one right behind it makes it a scan.
            reader.read(5000 + count, count);
            assert!(reader.cached.contains(&(5000 + 2 * count)), "of {count}");
        }
    }

    #[test]
    fn a_jump_begins_small_again() {
        let mut reader = Reader::new(LIMITS);
        reader.scan(0..1000);
        reader.windows.clear();
        reader.scan(50_000..50_100);
        assert_eq!(reader.sizes()[..4], [1, 4, 16, 32]);
    }

    #[test]
    fn a_hole_in_a_window_makes_it_small_again() {
        let mut reader = Reader::new(LIMITS);
        reader.scan(0..1000);
        assert_eq!(reader.sizes().last(), Some(&128));
        // What was read ahead is evicted before it is used.
        reader.cached.retain(|&page| page < 1010);
        reader.markers.clear();
        reader.windows.clear();
        reader.scan(1000..1100);
        assert_eq!(reader.sizes()[..3], [4, 16, 32], "{:?}", reader.windows);
        assert_eq!(reader.windows[0].pages.hull.start, 1010);
    }

    #[test]
    fn a_stream_that_outruns_its_window_goes_on_with_the_next_size() {
        let mut reader = Reader::new(LIMITS);
        reader.read(0, 1);
        reader.markers.clear();
        reader.scan(1..5);
        assert_eq!(shape(&reader.windows[1]), (4..20, Some(4)));
    }

    #[test]
    fn a_reader_that_overtakes_its_request_keeps_its_window() {
        let mut streams = Streams::default();
        let mut miss = |page| streams.on_miss(page, 1, Asked::Waiting, LIMITS);
        assert_eq!(shape(&miss(0)), (0..4, Some(1)));
        assert_eq!(shape(&miss(1)), (1..2, None));
        assert_eq!(shape(&miss(4)), (4..20, Some(4)), "as if it had met the marker");
        assert_eq!(shape(&miss(4)), (20..52, Some(20)));
        assert_eq!(shape(&miss(5)), (5..6, None));
        assert_eq!(streams.on_marker(4, LIMITS, |_| false), None, "the window behind it was asked for");
    }

    #[test]
    fn interleaved_scans_of_one_handle_are_told_apart_and_survive_look_ups_between_them() {
        let mut reader = Reader::new(LIMITS);
        let mut waits = 0;
        for step in 0..1000u64 {
            for scan in [20_000, 40_000, 60_000] {
                waits += u32::from(!reader.read(scan + step, 1));
            }
            reader.read(80_001 + step * 7919 % 9000 * 2, 1);
        }
        assert_eq!(waits, 6, "each at its first two reads");
    }

    #[test]
    fn scans_that_ended_make_room_for_others() {
        let mut reader = Reader::new(LIMITS);
        for scan in 1..20 {
            let begin = scan * 5000;
            assert_eq!(reader.scan(begin..begin + 300), [begin, begin + 1]);
        }
    }

    #[test]
    fn a_reader_follows_another_handles_markers() {
        let mut reader = Reader::new(LIMITS);
        reader.cached.extend(0..40);
        reader.markers.insert(30);
        assert_eq!(reader.scan(0..1000), [0; 0]);
        assert_eq!(reader.windows[0].pages.hull, 40..60, "twice what was left in front of it");
    }

    #[test]
    fn a_scan_in_strides_is_seen_at_its_fourth_read_and_gets_windows_that_grow_to_the_maximum() {
        for (len, step) in [(1, 2), (1, 7), (1, 1024), (3, 40), (4, 5), (16, 100)] {
            for down in [false, true] {
                let mut reader = Reader::new(Limits { pages: 1_000_000, ..LIMITS });
                let at = |i: u64| if down { 900_000 - i * step } else { 5_000 + i * step };
                let waited: Vec<u64> = (0..600).filter(|&i| !reader.read(at(i), len)).collect();
                assert_eq!(waited, [0, 1, 2, 3], "{len} of {step}");
                let sizes = reader.sizes();
                assert_eq!(sizes.iter().max(), Some(&(128 / len * len)), "{sizes:?}");
                assert!(sizes.windows(2).all(|pair| pair[0] <= pair[1]), "{sizes:?}");
                // Only what is read, and two windows ahead at most.
                let wanted = 600 * len;
                let read: u64 = reader.cached.len() as u64;
                assert!((wanted..=wanted + 256).contains(&read), "{read} pages for {wanted}");
                let on_the_way =
                    |page: &u64| (0..).map(at).take(1000).any(|first| (first..first + len).contains(page));
                assert!(reader.cached.iter().all(on_the_way));
            }
        }
    }

    #[test]
    fn a_scan_in_strides_that_leaves_its_way_gets_nothing_more_and_begins_small_again() {
        let mut reader = Reader::new(LIMITS);
        for i in 0..200 {
            reader.read(1000 + i * 9, 1);
        }
        reader.windows.clear();
        for i in 0..50 {
            reader.read(50_000 + i * 9, 1);
        }
        assert_eq!(reader.sizes()[..6], [1, 1, 1, 4, 16, 32]);
    }

    #[test]
    fn a_hole_in_a_window_of_strides_makes_it_small_again() {
        let mut reader = Reader::new(LIMITS);
        for i in 0..100 {
            reader.read(1000 + i * 9, 1);
        }
        assert_eq!(reader.sizes().last(), Some(&128));
        reader.cached.retain(|&page| page < 1000 + 101 * 9);
        reader.markers.clear();
        reader.windows.clear();
        for i in 100..140 {
            reader.read(1000 + i * 9, 1);
        }
        assert_eq!(reader.sizes()[..3], [4, 16, 32], "{:?}", reader.windows);
    }

    #[test]
    fn distances_that_are_not_equal_or_too_long_are_no_strides() {
        let growing = |i: u64| 5 + i;
        let too_long = |_| STRIDE_PAGES_MAX + 1;
        let steps: [&dyn Fn(u64) -> u64; 2] = [&growing, &too_long];
        for step in steps {
            let mut reader = Reader::new(LIMITS);
            let mut page = 3000;
            for i in 0..90 {
                reader.read(page, 1);
                page += step(i);
            }
            assert!(reader.sizes().iter().all(|&size| size == 1), "{:?}", reader.sizes());
        }
    }

    #[test]
    fn a_scan_in_strides_is_seen_between_look_ups() {
        let mut reader = Reader::new(LIMITS);
        let mut waits = 0;
        for i in 0..500u64 {
            waits += u32::from(!reader.read(1000 + i * 20, 1));
            reader.read(50_001 + i * 7919 % 9000 * 2, 1);
        }
        assert_eq!(waits, 4);
    }

    #[test]
    fn strides_end_with_the_mapping() {
        for pages in 100..200 {
            for down in [false, true] {
                let mut reader = Reader::new(Limits { pages, size_max: 32 });
                for i in 0..(pages - 3) / 7 {
                    reader.read(if down { pages - 4 - i * 7 } else { 3 + i * 7 }, 2);
                }
                for window in &reader.windows {
                    assert!(window.pages.hull.end <= pages, "{window:?} of {pages}");
                }
            }
        }
    }

    #[test]
    fn what_is_cached_already_is_not_asked_for() {
        let mut streams = Streams::default();
        let first = streams.on_miss(0, 1, Asked::Served, LIMITS);
        assert_eq!(streams.on_marker(first.marker.unwrap(), LIMITS, |_| true), None);
        let next = streams.on_marker(first.marker.unwrap(), LIMITS, |page| page < 50).unwrap();
        assert_eq!(next.pages.hull, 50..66);
    }

    #[test]
    fn the_last_window_ends_with_the_mapping_and_has_no_marker() {
        for pages in 1..300 {
            for backward in [false, true] {
                let mut reader = Reader::new(Limits { pages, size_max: 32 });
                for at in 0..pages {
                    reader.read(if backward { pages - 1 - at } else { at }, 1);
                }
                for window in &reader.windows {
                    let hull = &window.pages.hull;
                    assert!(hull.end <= pages && !hull.is_empty(), "{window:?} of {pages}");
                }
                assert!(reader.markers.is_empty() || pages < 3, "{:?} of {pages}", reader.markers);
            }
        }
    }

    #[test]
    fn first_windows_follow_the_size_of_the_read() {
        let sizes = |size_max: u64| [1, 2, 4, 8, 16, 32, 33, 100].map(|count| initial_size(count, size_max));
        assert_eq!(sizes(128), [4, 8, 16, 16, 32, 64, 128, 128]);
        assert_eq!(sizes(32), [4, 4, 8, 16, 32, 32, 32, 32]);
        assert_eq!(sizes(1), [1; 8]);
        assert_eq!(sizes(3), [3; 8]);
    }

    proptest! {
        #[test]
        fn a_window_never_exceeds_the_maximum_nor_the_mapping_and_holds_what_is_waited_for(
            pages in 1u64..2000,
            size_max in 1u64..200,
            reads in proptest::collection::vec((0u64..2000, 1u64..40, 0u64..2000, 0..3), 1..300),
        ) {
            let limits = Limits { pages, size_max };
            let mut streams = Streams::default();
            let mut at = 0;
            for (jump, count, cached_to, kind) in reads {
                // Mostly onwards, now and then a jump.
                at = if jump % 4 == 0 { jump % pages } else { (at + 1) % pages };
                let count = count.min(pages - at);
                let window = if kind == 0 {
                    streams.on_marker(at, limits, |page| page < cached_to)
                } else {
                    let asked = if kind == 1 { Asked::Served } else { Asked::Waiting };
                    let window = streams.on_miss(at, count, asked, limits);
                    prop_assert!(window.pages.iter().any(|pages| pages.contains(&at)) || asked == Asked::Waiting);
                    Some(window)
                };
                let Some(window) = window else { continue };
                let stretches: Vec<_> = window.pages.iter().collect();
                prop_assert!(!stretches.is_empty() && window.pages.hull.end <= pages);
                prop_assert!(stretches.iter().map(|range| range.end - range.start).sum::<u64>() <= size_max, "{:?}", window);
                prop_assert!(window.marker.is_none_or(|marker| stretches.iter().any(|range| range.contains(&marker))));
            }
        }

        #[test]
        fn any_four_interleaved_scans_reach_the_maximum_and_wait_twice_at_most(
            order in proptest::collection::vec(0usize..4, 800),
            backward in any::<[bool; 4]>(),
        ) {
            let mut reader = Reader::new(LIMITS);
            let mut at = [0u64; 4];
            let mut waits = [0; 4];
            for scan in order.into_iter().chain((0..2000).map(|i| i % 4)) {
                let begin = 10_000 + scan as u64 * 20_000;
                let page = if backward[scan] { begin - at[scan] } else { begin + at[scan] };
                waits[scan] += u32::from(!reader.read(page, 1));
                at[scan] += 1;
            }
            prop_assert_eq!(waits, [2; 4]);
            prop_assert_eq!(reader.sizes().iter().filter(|&&size| size == 128).count() >= 4, true);
        }

        #[test]
        fn each_part_lies_in_one_shard_and_together_they_are_the_range(
            shards in 1usize..5, mapping in 0u16..5, start in 0u64..4000, len in 0u64..4000,
        ) {
            let striping = Striping::new(shards, mapping);
            let mut at = start;
            for part in split_by_shard(striping, start..start + len) {
                prop_assert_eq!(part.start, at);
                prop_assert!(part.start < part.end && part.end - part.start <= STRIPE_PAGES);
                prop_assert!(part.clone().all(|page| striping.shard_of(page) == striping.shard_of(part.start)));
                at = part.end;
            }
            prop_assert_eq!(at, start + len);
        }
    }
}
