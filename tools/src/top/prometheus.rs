//! The metrics of stats pages in Prometheus's text exposition format, version 0.0.4.
//!
//! Names, kinds and helps are the page's own (its catalogue): a counter `pages_read` becomes `foliant_pages_read_total`,
//! times become seconds, and histograms keep a bucket a power of two. Each sample carries the device, the page's path,
//! which tells engines apart, and the shard.

use std::fmt::Write;
use std::path::Path;

use foliant::{EngineState, Metric, MetricKind, ShardRecord, StatsSnapshot};

/// A page and where it is.
type Named<'a> = (&'a Path, &'a StatsSnapshot);

/// Everything that the pages show.
pub(super) fn text<'a>(pages: impl Iterator<Item = Named<'a>>) -> String {
    let pages: Vec<Named<'_>> = pages.collect();
    let mut text = String::new();
    head(&mut text, "foliant_up", "gauge", "1 while the engine's process has its stats page open.");
    for (path, page) in &pages {
        let up = u8::from(page.state == EngineState::Running);
        let (labels, program) = (labels(path, page), escaped(&page.program));
        let _ = writeln!(text, "foliant_up{{{labels},program=\"{program}\",pid=\"{}\"}} {up}", page.pid);
    }
    head(&mut text, "foliant_opened_timestamp_seconds", "gauge", "When the engine was opened.");
    for (path, page) in &pages {
        let seconds = page.opened_unix_ns as f64 / 1e9;
        let _ = writeln!(text, "foliant_opened_timestamp_seconds{{{}}} {seconds:.3}", labels(path, page));
    }
    // Pages of several versions may lack some of each other's metrics.
    let mut metrics: Vec<&Metric> = Vec::new();
    for metric in pages.iter().flat_map(|(_, page)| &page.metrics) {
        if metrics.iter().all(|known| known.name != metric.name) {
            metrics.push(metric);
        }
    }
    for metric in metrics {
        write_metric(&mut text, metric, &pages);
    }
    text
}

fn write_metric(text: &mut String, metric: &Metric, pages: &[Named<'_>]) {
    let (base, is_time) = match metric.name.strip_suffix("_ns") {
        Some(base) => (format!("foliant_{base}_seconds"), true),
        None => (format!("foliant_{}", metric.name), false),
    };
    let name = if metric.kind == MetricKind::Counter { format!("{base}_total") } else { base };
    head(text, &name, metric.kind.name(), &metric.help);
    for (path, page) in pages {
        for (shard, record) in page.shards.iter().enumerate() {
            let Some(record) = record else { continue };
            let labels = format!("{},shard=\"{shard}\"", labels(path, page));
            match metric.kind {
                MetricKind::Histogram => write_histogram(text, (&name, &labels), page, record, metric),
                MetricKind::Counter | MetricKind::Gauge => {
                    let Some(value) = page.value(record, &metric.name) else { continue };
                    let _ = match is_time {
                        true => writeln!(text, "{name}{{{labels}}} {}", value as f64 / 1e9),
                        false => writeln!(text, "{name}{{{labels}}} {value}"),
                    };
                }
            }
        }
    }
}

fn write_histogram(
    text: &mut String,
    (name, labels): (&str, &str),
    page: &StatsSnapshot,
    record: &ShardRecord,
    metric: &Metric,
) {
    let Some(times) = page.histogram(record, &metric.name) else { return };
    for (ns, below) in times.below_powers() {
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{}\"}} {below}", ns as f64 / 1e9);
    }
    let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {}", times.count());
    let _ = writeln!(text, "{name}_sum{{{labels}}} {}", times.sum_ns() as f64 / 1e9);
    let _ = writeln!(text, "{name}_count{{{labels}}} {}", times.count());
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let help = help.replace('\\', "\\\\").replace('\n', "\\n");
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn labels(path: &Path, page: &StatsSnapshot) -> String {
    format!("device=\"{}\",page=\"{}\"", escaped(&page.device), escaped(&path.display().to_string()))
}

/// A label's value, as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use foliant::{Engine, EngineOptions, MappingOptions, ShardThreads, StatsPage, StatsReader};

    /// What an engine shows that has read a page and synced.
    fn snapshot() -> StatsSnapshot {
        let place = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = place.path().join("page");
        let options = EngineOptions {
            shards: 2,
            cache_bytes: 4 << 20,
            threads: ShardThreads::Manual,
            stats_page: StatsPage::At(path.clone()),
            ..Default::default()
        };
        let engine = Engine::open("emu:ram?size=16MiB", &options).unwrap();
        let mut shards = engine.take_shards();
        let mut now_ns = 0;
        let mut future = std::pin::pin!(async {
            let mapping = engine.mapping_async(&MappingOptions::default()).await.unwrap();
            mapping.write_at_async(0, &[1; 100_000]).await.unwrap();
            mapping.sync_async().await.unwrap();
        });
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        while future.as_mut().poll(&mut context).is_pending() {
            now_ns += 1000;
            for shard in &mut shards {
                shard.poll(now_ns);
            }
        }
        for shard in &mut shards {
            shard.poll(now_ns + 2_000_000_000);
        }
        StatsReader::open(&path).unwrap().read().unwrap()
    }

    #[test]
    fn every_line_is_a_comment_or_a_sample_and_no_sample_comes_twice() {
        let (first, second) = (snapshot(), snapshot());
        let pages = [(Path::new("/a \"quoted\" path"), &first), (Path::new("/b"), &second)];
        let text = text(pages.into_iter());
        let mut seen = std::collections::HashSet::new();
        let mut last_head = "";
        for line in text.lines() {
            if let Some(head) = line.strip_prefix("# ") {
                let mut words = head.splitn(3, ' ');
                assert!(matches!(words.next(), Some("HELP" | "TYPE")), "{line}");
                last_head = words.next().unwrap();
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(series.starts_with(last_head), "{line} under {last_head}");
            assert!(series.ends_with('}') && seen.insert(series), "{line}");
        }
        assert!(text.contains("# TYPE foliant_pages_written_total counter"));
        assert!(text.contains(r#"page="/a \"quoted\" path",shard="1""#));
        assert!(text.contains("foliant_slept_seconds_total{"));
        assert!(text.contains("# TYPE foliant_sync_seconds histogram"));
    }

    #[test]
    fn buckets_of_a_histogram_never_fall_and_end_with_its_count() {
        let snapshot = snapshot();
        let text = text(std::iter::once((Path::new("/p"), &snapshot)));
        let of = |what: &str| {
            let lines = text.lines().filter(|line| line.contains("shard=\"1\""));
            let values = lines.filter(|line| line.starts_with(&format!("foliant_sync_seconds_{what}{{")));
            values.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect::<Vec<f64>>()
        };
        let buckets = of("bucket");
        assert!(buckets.is_sorted() && buckets.len() > 20);
        assert_eq!((*buckets.last().unwrap(), of("count")[0]), (1.0, 1.0));
    }
}
