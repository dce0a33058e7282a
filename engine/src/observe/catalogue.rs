//! What a shard publishes: the names, kinds and meanings of its metrics, in the order in which a record has them.
//!
//! The catalogue is text on the page itself, a line a metric, so that a reader of another version, or in another
//! language, finds every value by name, and nothing is said twice: a counter's help is its documentation.
//!
//! ```text
//! counter pages_read Pages brought in from the device.
//! gauge dirty_pages Pages dirty now.
//! histogram sync_ns From a call of sync to its return.
//! ```

use std::fmt;

use super::histogram;
use crate::stats::ShardCounters;

/// What kind of value a metric has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// It only grows, from the engine's opening on.
    Counter,
    /// It is what it is now.
    Gauge,
    /// A [`LatencyHistogram`](super::LatencyHistogram).
    Histogram,
}

impl MetricKind {
    const ALL: [Self; 3] = [Self::Counter, Self::Gauge, Self::Histogram];

    /// As a catalogue writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }

    /// Words of a record that a value of it takes.
    pub(crate) const fn words(self) -> usize {
        match self {
            Self::Counter | Self::Gauge => 1,
            Self::Histogram => histogram::WORDS,
        }
    }
}

/// A metric of a stats page.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metric {
    /// Lower-case words with underscores; one that ends in `_ns` is a time in nanoseconds.
    pub name: String,
    /// What its values are.
    pub kind: MetricKind,
    /// What it counts, in a sentence or two.
    pub help: String,
    /// Its first word in a record.
    pub(crate) at: usize,
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {} {}", self.kind.name(), self.name, self.help)
    }
}

/// What the threads of the application count for a shard.
const BY_CALLERS: [(&str, &str); 4] = [
    ("read_hits", "Page accesses for reading that found the page in the cache."),
    ("write_hits", "Page accesses for writing that found the page in the cache."),
    ("requests", "Requests that went to a shard: misses, waits, syncs."),
    ("readahead_pages_used", "Pages read ahead whose folios somebody has read since."),
];

/// What is so now.
const GAUGES: [(&str, &str); 13] = [
    ("failed", "1 when the shard has failed and answers with errors only."),
    ("frames", "Frames of the cache."),
    ("free_frames", "Frames that hold no page."),
    ("queue_depth", "Commands with the device."),
    ("requests_waiting", "Requests that the shard has taken and not answered."),
    ("dirty_pages", "Pages dirty now."),
    ("writeback_pages", "Pages under writeback now."),
    ("poisoned_pages", "Dirty pages whose last write failed for good."),
    ("gated_pages", "Dirty pages of mappings behind a write-ahead gate."),
    ("dirty_freerun_pages", "Up to so many pages dirty or under writeback no writer is slowed."),
    ("dirty_limit_pages", "So many pages may be dirty or under writeback; writers wait at that limit."),
    ("throttled_writers", "Writers that wait because too many pages are dirty."),
    ("throttle_bytes_per_second", "The rate to which writers are slowed now; 0 while nobody is slowed."),
];

/// How long things take.
const TIMES: [(&str, &str); 4] = [
    (
        "read_wait_ns",
        "From the shard's taking a request to read pages (a miss, or pages that others hold) to its answer.",
    ),
    ("write_command_ns", "A write command, from its submission to its completion."),
    ("flush_command_ns", "A flush command, from its submission to its completion."),
    ("sync_ns", "A sync as its caller sees it; told by the shard in which commits of its namespace meet."),
];

/// Counters that aren't counters: they fall as well.
const FALLING: [&str; 2] = ["write_bandwidth", "tag_nodes"];

/// All metrics of a shard.
pub(crate) fn catalogue() -> Vec<Metric> {
    let counted = BY_CALLERS.iter().chain(ShardCounters::DOCUMENTED);
    let counted = counted.map(|(name, help)| {
        (*name, if FALLING.contains(name) { MetricKind::Gauge } else { MetricKind::Counter }, *help)
    });
    let gauges = GAUGES.iter().map(|(name, help)| (*name, MetricKind::Gauge, *help));
    let times = TIMES.iter().map(|(name, help)| (*name, MetricKind::Histogram, *help));
    let mut at = 0;
    let placed = counted.chain(gauges).chain(times).map(|(name, kind, help)| {
        let metric = Metric { name: name.to_owned(), kind, help: plain(help), at };
        at += kind.words();
        metric
    });
    placed.collect()
}

/// Words of a record that metrics take.
pub(crate) fn words(metrics: &[Metric]) -> usize {
    metrics.last().map_or(0, |last| last.at + last.kind.words())
}

/// Documentation without its links and marks, in one line.
fn plain(documentation: &str) -> String {
    let mut text = String::with_capacity(documentation.len());
    let mut rest = documentation.trim();
    while let Some(at) = rest.find(['[', ']', '`']) {
        text.push_str(&rest[..at]);
        rest = &rest[at..];
        let target = rest.starts_with("](").then(|| rest.find(')')).flatten();
        rest = &rest[target.unwrap_or(0) + 1..];
    }
    text.push_str(rest);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The metrics that a catalogue's text names; what is wrong with it otherwise.
pub(crate) fn parse(text: &str) -> Result<Vec<Metric>, String> {
    let mut at = 0;
    let parse = |line: &str| {
        let mut parts = line.splitn(3, ' ');
        let (kind, name, help) = (parts.next()?, parts.next()?, parts.next().unwrap_or(""));
        let kind = MetricKind::ALL.into_iter().find(|known| known.name() == kind)?;
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let is_name = name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(is_word);
        let help = help.chars().filter(|c| !c.is_control()).collect();
        is_name.then(|| {
            let metric = Metric { name: name.to_owned(), kind, help, at };
            at += kind.words();
            metric
        })
    };
    let metrics: Option<Vec<_>> = text.lines().map(parse).collect();
    metrics.ok_or_else(|| "its catalogue has a line that is no metric".to_owned())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_catalogue_reads_back_as_it_was_written() {
        let metrics = catalogue();
        let text: String = metrics.iter().map(ToString::to_string).collect();
        assert_eq!(parse(&text).unwrap(), metrics);
    }

    #[test]
    fn names_are_unique_and_each_metric_says_what_it_is() {
        let metrics = catalogue();
        for (index, metric) in metrics.iter().enumerate() {
            assert!(metrics[..index].iter().all(|other| other.name != metric.name), "{}", metric.name);
            assert!(metric.help.ends_with('.') || metric.help.len() > 20, "{metric}");
            assert!(!metric.help.contains(['[', '`', '\n']), "{metric}");
        }
    }

    #[test]
    fn counters_that_fall_are_gauges() {
        let metrics = catalogue();
        for name in FALLING {
            let metric = metrics.iter().find(|metric| metric.name == name).expect(name);
            assert_eq!(metric.kind, MetricKind::Gauge);
        }
    }

    #[test]
    fn links_and_marks_of_documentation_are_left_out() {
        assert_eq!(
            plain(" See [`prefetch`](crate::Mapping::prefetch), [that],\n `twice`. "),
            "See prefetch, that, twice."
        );
        assert_eq!(plain("[open"), "open");
    }

    #[test]
    fn what_is_no_catalogue_is_refused() {
        for text in ["\n", "counter", "counter ", "meter a b", "counter A b", "counter a-b c"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
