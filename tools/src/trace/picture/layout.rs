//! What lies where: places of panels and strips in pixels, and from times and pages to pixels.

use std::ops::Range;

use super::Scene;
use crate::trace::history::History;

/// A wide monitor's.
pub(super) const WIDTH: u32 = 1800;
/// Around everything.
pub(super) const MARGIN: u32 = 24;
pub(super) const LINE_HEIGHT: u32 = 22;
/// Left of a panel, for its axis.
pub(super) const LABELS_WIDTH: u32 = 84;
/// Below the last panel, for the times.
pub(super) const TIMES_HEIGHT: u32 = 48;
/// Right of a panel, for the lanes of shards.
const LANES_WIDTH: u32 = 16;
/// Above a panel, for its title.
const TITLE_HEIGHT: u32 = 34;
/// All panels together.
const PANELS_HEIGHT: u32 = 780;
const STRIP_HEIGHT: u32 = 84;
/// With more shards one strip shows the doorbells of all.
const STRIPS_MAX: u32 = 4;

/// The place of a panel or strip.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) x: (f64, f64),
    /// Top and bottom.
    pub(super) y: (f64, f64),
    /// What the vertical axis shows, from the bottom to the top.
    pub(super) values: Range<f64>,
    /// The lowest one, which has the times below it.
    pub(super) is_last: bool,
}

impl Place {
    /// The height of a value.
    pub(super) fn row(&self, value: f64) -> f64 {
        let part = (value - self.values.start) / (self.values.end - self.values.start);
        self.y.1 - part.clamp(0.0, 1.0) * (self.y.1 - self.y.0)
    }

    /// Top and bottom of pages.
    pub(super) fn rows(&self, pages: &Range<u64>) -> (f64, f64) {
        (self.row(pages.end as f64), self.row(pages.start as f64))
    }
}

#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) size: (u32, u32),
    pub(super) panels: Vec<Place>,
    pub(super) strips: Vec<Place>,
    /// The middle of the legend's line.
    pub(super) legend_y: u32,
    begin_ns: u64,
    pub(super) end_ns: u64,
}

impl Layout {
    pub(super) fn of(scene: &Scene<'_>) -> Self {
        let history = scene.history;
        // One line is kept for the remark that rectangles are merged.
        let lines = (scene.facts.len() + scene.verdicts.len() + 1) as u32;
        let legend_y = 54 + lines * LINE_HEIGHT + 10;
        let x = (f64::from(MARGIN + LABELS_WIDTH), f64::from(WIDTH - MARGIN - LANES_WIDTH));
        let mut top = legend_y + 18;
        let mut place = |height: u32, values: Range<f64>, is_last: bool| {
            let y = (f64::from(top + TITLE_HEIGHT), f64::from(top + TITLE_HEIGHT + height));
            top += TITLE_HEIGHT + height;
            Place { x, y, values, is_last }
        };
        let height = (PANELS_HEIGHT / scene.mappings.len().max(1) as u32).min(PANELS_HEIGHT * 2 / 3);
        let panels =
            scene.mappings.iter().map(|(mapping, _)| place(height, pages(scene, *mapping), false)).collect();
        let most = history.doorbells.iter().map(|bell| bell.commands).max().unwrap_or(1).max(4) as f64;
        let count = if history.shards > STRIPS_MAX { 1 } else { history.shards.max(1) };
        let strips =
            (1..=count).map(|number| place(STRIP_HEIGHT, 0.0..most * 1.05, number == count)).collect();
        let (begin_ns, end_ns) = times(scene, history);
        Self { size: (WIDTH, top + TIMES_HEIGHT + MARGIN), panels, strips, legend_y, begin_ns, end_ns }
    }

    /// The place of a time.
    pub(super) fn x(&self, at_ns: u64) -> f64 {
        let (left, right) = self.panels[0].x;
        let part = at_ns.saturating_sub(self.begin_ns) as f64 / (self.end_ns - self.begin_ns) as f64;
        left + part.min(1.0) * (right - left)
    }

    pub(super) fn duration_ms(&self) -> f64 {
        (self.end_ns - self.begin_ns) as f64 / 1e6
    }

    /// A time in words.
    pub(super) fn time(&self, at_ns: u64) -> String {
        format!("{:.3} ms", at_ns.saturating_sub(self.begin_ns) as f64 / 1e6)
    }
}

/// From the first to the last page that was written, and a little more.
fn pages(scene: &Scene<'_>, mapping: u16) -> Range<f64> {
    let written = scene.history.writes().filter(|command| command.mapping == mapping);
    let (mut first, mut end) = (u64::MAX, 0);
    for command in written {
        (first, end) = (first.min(command.pages.start), end.max(command.pages.end));
    }
    if first >= end {
        return 0.0..1.0;
    }
    let spare = (end - first) as f64 * 0.03 + 1.0;
    (first as f64 - spare).max(0.0)..end as f64 + spare
}

/// From the first to the last thing that is drawn.
fn times(scene: &Scene<'_>, history: &History) -> (u64, u64) {
    let dirty = scene.dirty.iter().map(|span| span.since_ns);
    let begins = history.passes.iter().map(|pass| pass.began_ns).chain(dirty);
    let issued = history.commands.iter().map(|command| command.issued_ns);
    let begin_ns = begins.chain(issued.clone()).min().unwrap_or(0);
    let ends = history.writes().filter_map(|command| command.end).map(|end| end.at_ns);
    let commits = history.commits.iter().map(|commit| commit.end.map_or(commit.began_ns, |end| end.at_ns));
    let doorbells = history.doorbells.iter().map(|doorbell| doorbell.at_ns);
    let end_ns = ends.chain(commits).chain(doorbells).chain(issued).max().unwrap_or(0);
    (begin_ns, (end_ns + (end_ns.saturating_sub(begin_ns)) / 100).max(begin_ns + 1))
}
