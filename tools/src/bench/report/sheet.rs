//! The report as one picture: the plots two abreast, and above them what they are about.

use super::Findings;
use super::figures::{self, Width};
use crate::error::Error;
use crate::plot::axis::{rate, time};
use crate::plot::colours::{FADED, GROUND, INK, dark_rules};
use crate::plot::{Area, picture, shortened, text, with_style};
use crate::size::ByteSize;

const WIDTH: u32 = 1360;
const FIGURE_HEIGHT: u32 = 350;
/// Around everything.
const MARGIN: u32 = 20;
const HALF_WIDTH: u32 = (WIDTH - 2 * MARGIN) / 2;
/// Headline, load and figures.
const HEAD_HEIGHT: u32 = 122;
const LINE_HEIGHT: u32 = 21;
/// Where the values of the facts begin, in pixels from their names.
const VALUE_INDENT: i32 = 210;

/// The whole picture.
pub(super) fn svg(findings: &Findings<'_>) -> Result<String, Error> {
    let plots = figures::all(findings);
    let columns = [findings.bench.drive.facts(), findings.machine.facts()];
    let lines = columns.iter().map(Vec::len).max().unwrap_or(0) + findings.made.len();
    let head_height = HEAD_HEIGHT + lines as u32 * LINE_HEIGHT;
    let rows =
        plots.iter().map(|plot| if plot.width == Width::Half { 1 } else { 2 }).sum::<u32>().div_ceil(2);
    let height = head_height + rows * FIGURE_HEIGHT + MARGIN;
    let svg = picture((WIDTH, height), |area| {
        let failed = |reason: String| Error::Plot { title: "the picture", reason };
        area.fill(&GROUND).map_err(|error| failed(error.to_string()))?;
        head(findings, area, &columns)?;
        let mut place = 0;
        for figure in &plots {
            let places = if figure.width == Width::Half { 1 } else { 2 };
            let (row, column) = (place / 2, place % 2);
            let corner = ((MARGIN + column * HALF_WIDTH) as i32, (head_height + row * FIGURE_HEIGHT) as i32);
            figure.draw(findings, &area.clone().shrink(corner, (places * HALF_WIDTH, FIGURE_HEIGHT)))?;
            place += places;
        }
        Ok(())
    })?;
    Ok(with_style(&svg, &format!("@media(prefers-color-scheme:dark){{{}}}", dark_rules())))
}

fn head(
    findings: &Findings<'_>,
    area: &Area<'_>,
    columns: &[Vec<(&'static str, String)>; 2],
) -> Result<(), Error> {
    let bench = findings.bench;
    let write = |words: &str, size, colour, at| {
        let drawn = area.draw_text(words, &text(size, colour), at);
        drawn.map_err(|error| Error::Plot { title: "the head", reason: error.to_string() })
    };
    let left = MARGIN as i32 + 8;
    write(&findings.headline(), 24, INK, (left, 20))?;
    write(&bench.load(), 14, FADED, (left, 54))?;
    let latency = &bench.latency;
    let figures = format!(
        "{} operations a second, {}/s; latency {} median, {} p99, {} p99.9",
        rate(bench.operations_per_second),
        ByteSize(bench.bytes_per_second as u64),
        time(latency.p50_us),
        time(latency.p99_us),
        time(latency.p999_us),
    );
    write(&figures, 16, INK, (left, 80))?;
    let write_facts = |facts: &[(&'static str, String)], (x, mut y): (i32, i32), chars_max| {
        for (name, value) in facts {
            write(name, 13, FADED, (x, y))?;
            write(&shortened(value, chars_max), 13, INK, (x + VALUE_INDENT, y))?;
            y += LINE_HEIGHT as i32;
        }
        Ok::<i32, Error>(y)
    };
    let mut below = 0;
    for (column, facts) in (0..).zip(columns) {
        let x = left + column * HALF_WIDTH as i32;
        below = below.max(write_facts(facts, (x, 112), 66)?);
    }
    write_facts(&findings.made, (left, below), 165)?;
    Ok(())
}
