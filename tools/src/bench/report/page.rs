//! The report as a page: HTML with the drawings in it, and nothing to fetch from anywhere.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::Findings;
use super::figures::{self, Width};
use crate::error::Error;
use crate::latency::Summary;
use crate::plot::axis::{rate, time};
use crate::plot::colours::dark_rules;
use crate::plot::picture;
use crate::size::ByteSize;
use crate::table::count;

/// Sizes of drawings in pixels; the page scales them.
const HALF_SIZE: (u32, u32) = (680, 340);
const FULL_SIZE: (u32, u32) = (1376, 340);

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#2B3138;--faded:#5C6670;--ground:#F4F6F8;--panel:#FFFFFF;--line:#E1E5EA}
@media(prefers-color-scheme:dark){:root{--ink:#E3E7EC;--faded:#A3ADB8;--ground:#0E1115;--panel:#14181D;\
--line:#2E363F}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1440px;padding:24px;background:var(--ground);color:var(--ink);\
font:15px/1.5 system-ui,sans-serif}
h1{margin:0;font-size:24px}h2{margin:0 0 8px;font-size:16px}p.load{margin:4px 0 20px;color:var(--faded)}
section,figure{margin:0;padding:16px;background:var(--panel);border:1px solid var(--line);border-radius:8px}
figure svg{display:block;width:100%;height:auto}
.tiles,.plots,.facts{display:grid;gap:16px;margin-bottom:16px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.tiles b{display:block;font-size:22px;font-weight:600}.tiles span{color:var(--faded)}
.plots{grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr))}
.facts{grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}
table{width:100%;border-collapse:collapse}
th,td{padding:4px 12px 4px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;\
font-weight:400}
tr:last-child>*{border-bottom:0}tbody th{width:1%;color:var(--faded);white-space:nowrap}td{overflow-wrap:anywhere}
.sweep th,.sweep td{width:auto;text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal;\
white-space:nowrap}
.wide{overflow-x:auto;grid-column:1/-1}
";

/// The whole page.
pub(super) fn html(findings: &Findings<'_>) -> Result<String, Error> {
    let bench = findings.bench;
    let drawings = figures::all(findings)
        .iter()
        .map(|figure| {
            let size = if figure.width == Width::Half { HALF_SIZE } else { FULL_SIZE };
            let svg = picture(size, |area| figure.draw(findings, area))?;
            let labelled = format!("<svg role=\"img\" aria-label=\"{}\" ", figure.title);
            Ok((figure.width, PreEscaped(svg.replacen("<svg ", &labelled, 1))))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let dark = format!("@media(prefers-color-scheme:dark){{{}}}", dark_rules());
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width,initial-scale=1";
                title { "Foliant: " (findings.headline()) }
                style { (PreEscaped(STYLE)) (PreEscaped(dark)) }
            }
            body {
                h1 { (findings.headline()) }
                p.load { (bench.load()) }
                div.tiles { @for (name, value) in tiles(findings) { section { b { (value) } span { (name) } } } }
                div.plots { @for (width, drawing) in &drawings { figure.wide[*width == Width::Full] { (drawing) } } }
                div.facts {
                    @if !bench.sweep.is_empty() { (sweep(findings)) }
                    section { (facts("Machine", &findings.machine.facts())) }
                    section { (facts("Drive", &bench.drive.facts())) }
                    section.wide { (facts("Measurement", &findings.made)) }
                }
            }
        }
    };
    Ok(page.into_string())
}

/// The figures to look at first.
fn tiles(findings: &Findings<'_>) -> Vec<(&'static str, String)> {
    let bench = findings.bench;
    let Summary { p50_us, p99_us, p999_us, .. } = bench.latency;
    vec![
        ("operations a second", rate(bench.operations_per_second)),
        ("bandwidth", format!("{}/s", ByteSize(bench.bytes_per_second as u64))),
        ("median latency", time(p50_us)),
        ("99th percentile", time(p99_us)),
        ("99.9th percentile", time(p999_us)),
    ]
}

fn facts(title: &str, facts: &[(&'static str, String)]) -> Markup {
    html! {
        h2 { (title) }
        table { tbody { @for (name, value) in facts { tr { th scope="row" { (name) } td { (value) } } } } }
    }
}

fn sweep(findings: &Findings<'_>) -> Markup {
    let depth = if findings.bench.shards.is_some() { "threads" } else { "in flight" };
    let columns = [depth, "operations a second", "bandwidth", "mean", "p50", "p99", "p99.9", "max"];
    let times = |s: &Summary| [s.mean_us, s.p50_us, s.p99_us, s.p999_us, s.max_us].map(time);
    html! {
        section.wide {
            h2 { "Over depth" }
            table.sweep {
                thead { tr { @for column in columns { th scope="col" { (column) } } } }
                tbody {
                    @for point in &findings.bench.sweep {
                        tr {
                            th scope="row" { (point.depth) }
                            td { (count(point.operations_per_second as u64)) }
                            td { (ByteSize(point.bytes_per_second as u64)) "/s" }
                            @for time in times(&point.latency) { td { (time) } }
                        }
                    }
                }
            }
        }
    }
}
