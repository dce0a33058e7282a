//! The picture of a run: page index over time, a panel a mapping, colour by state; below, a strip of doorbells a shard.
//!
//! ```text
//! headline, facts, what the checks found, legend
//! ┌ mapping ─────────────┐
//! │ page        ▄▀       │  a command from submission to completion, coloured by state; faint before it: its pages
//! │           ▄▀   │▄▀   │  dirty; around its pass: a box, and a line in the order of the pass's commands (WB-01)
//! │         ▄▀   ▄▀│     │  vertical band: a flush
//! ├ doorbells, shard 0 ──┤
//! │      ▐ ▐ ▌  ▐   ▌    │  a bar a doorbell, as high as the commands that it told the device of (WB-18)
//! └─────── time ─────────┘
//! ```
//!
//! `marks` writes what is in the panels, `layout` says what lies where.

mod layout;
mod marks;

use plotters::prelude::*;

use self::layout::{Layout, Place};
use self::marks::{Class, Mark, Marks, thinned};
use super::dirty::DirtySpan;
use super::happening::{Mode, Op};
use super::history::{Command, Commit, History, Pass};
use crate::error::Error;
use crate::plot::axis::{Axis, rate};
use crate::plot::colours::{AXIS, FADED, GRID, GROUND, INK, P50, P99, P999, RATE, dark_rules, hex};
use crate::plot::{Area, FONT, Failure, picture, shortened, text, with_style};
use crate::table::count;
use crate::verdict::Verdict;

/// Rectangles with figures to hover over that a picture has at most; more are merged with their neighbours.
pub(crate) const RECTANGLES_MAX: usize = 20_000;
/// Rectangles of dirty pages, which are shorter in the file. Of more, only some are drawn: merged ones would show more
/// dirty than there was.
const DIRTY_MAX: usize = 20_000;
/// Colours of shards, taken in turn.
const SHARD_COLOURS: [RGBColor; 4] = [P50, RATE, P999, P99];
/// Stripes of pages that are coloured by shard; with more of them a panel shows none.
const LANES_MAX: usize = 200;
/// Pages that a lane of one shard has.
const LANE_PAGES: u64 = 512;

/// What is to be drawn.
#[derive(Debug)]
pub(crate) struct Scene<'a> {
    pub(crate) history: &'a History,
    pub(crate) dirty: &'a [DirtySpan],
    /// The mappings to show, with what is done in each.
    pub(crate) mappings: Vec<(u16, String)>,
    pub(crate) headline: String,
    pub(crate) facts: Vec<String>,
    pub(crate) verdicts: Vec<(Verdict, String)>,
}

/// A picture, and what was left out of it.
#[derive(Debug)]
pub(crate) struct Drawn {
    pub(crate) svg: String,
    pub(crate) rectangles: usize,
    /// Rectangles before neighbours were merged.
    pub(crate) rectangles_of: usize,
}

/// Draws the scene.
pub(crate) fn draw(scene: &Scene<'_>) -> Result<Drawn, Error> {
    let layout = Layout::of(scene);
    let mut all = Vec::new();
    for (panel, (mapping, _)) in layout.panels.iter().zip(&scene.mappings) {
        all.extend(commands(scene.history, *mapping, &layout, panel));
    }
    let rectangles_of = all.len();
    let commands = thinned(all, RECTANGLES_MAX);
    let rectangles = commands.len();
    let mut left_out = Vec::new();
    if rectangles < rectangles_of {
        let (rectangles, of) = (count(rectangles as u64), count(rectangles_of as u64));
        left_out
            .push(format!("the {of} commands are drawn as {rectangles} rectangles: neighbours are merged"));
    }
    if dirty_step(scene) > 1 {
        left_out.push(format!("of {} dirty pages one is drawn", dirty_step(scene)));
    }
    let left_out = (!left_out.is_empty()).then(|| left_out.join("; "));
    let svg = picture(layout.size, |area| {
        frame(scene, &layout, left_out.as_deref(), area)
            .map_err(|error| Error::Plot { title: "the trace", reason: error.to_string() })
    })?;
    let mut marks = Marks::default();
    background(scene, &layout, &mut marks);
    commands.iter().for_each(|mark| marks.rectangle(mark, 1.6));
    orders(scene, &layout, &mut marks);
    doorbells(scene.history, &layout, &mut marks);
    let svg = svg.trim_end().trim_end_matches("</svg>").to_owned() + &marks.svg + "</svg>\n";
    let dark = format!("@media(prefers-color-scheme:dark){{{}}}", dark_rules());
    let svg = with_style(&svg, &format!("{dark}{}", marks::rules()));
    Ok(Drawn { svg, rectangles, rectangles_of })
}

/// Everything that stands still: texts, axes, grids, the legend.
fn frame(scene: &Scene<'_>, layout: &Layout, left_out: Option<&str>, area: &Area<'_>) -> Result<(), Failure> {
    area.fill(&GROUND)?;
    head(scene, layout, left_out, area)?;
    for (panel, (_, name)) in layout.panels.iter().zip(&scene.mappings) {
        titled(area, panel, name)?;
        axes(area, layout, panel, "page", page)?;
    }
    for (shard, strip) in layout.strips.iter().enumerate() {
        let of = if layout.strips.len() == scene.history.shards as usize {
            format!("doorbells of shard {shard}")
        } else {
            "doorbells of all shards".to_owned()
        };
        titled(
            area,
            strip,
            &format!("{of}: a bar each, as high as the commands that it told the device of"),
        )?;
        axes(area, layout, strip, "commands", rate)?;
    }
    Ok(())
}

fn head(scene: &Scene<'_>, layout: &Layout, left_out: Option<&str>, area: &Area<'_>) -> Result<(), Failure> {
    let left = layout::MARGIN as i32;
    area.draw_text(&shortened(&scene.headline, 130), &text(24, INK), (left, 18))?;
    let mut y = 54;
    let facts = scene.facts.iter().map(String::as_str).chain(left_out);
    for fact in facts {
        area.draw_text(&shortened(fact, 250), &text(14, FADED), (left, y))?;
        y += layout::LINE_HEIGHT as i32;
    }
    for (verdict, words) in &scene.verdicts {
        let colour = if *verdict == Verdict::Passed { P50 } else { P999 };
        let bold = (FONT, 14).into_font().style(FontStyle::Bold).color(&colour);
        area.draw_text(&verdict.to_string(), &bold, (left, y))?;
        area.draw_text(&shortened(words, 230), &text(14, INK), (left + 70, y))?;
        y += layout::LINE_HEIGHT as i32;
    }
    legend_texts(layout, area)
}

/// Legend entries: class, words, and how far right each begins.
const LEGEND: [(Class, &str, f64); 9] = [
    (Class::Dirty, "dirty", 0.0),
    (Class::Background, "written in the background", 90.0),
    (Class::Integrity, "written for a sync", 312.0),
    (Class::Failed, "failed", 482.0),
    (Class::Pass, "pass", 580.0),
    (Class::Order, "order of its commands", 668.0),
    (Class::Flush, "flush", 868.0),
    (Class::Doorbell, "doorbell for writes", 954.0),
    (Class::OtherDoorbell, "for reads or flushes alone", 1112.0),
];

fn legend_texts(layout: &Layout, area: &Area<'_>) -> Result<(), Failure> {
    for (_, words, x) in LEGEND {
        let at = (layout::MARGIN as i32 + x as i32 + 28, layout.legend_y as i32 - 6);
        area.draw_text(words, &text(13, INK), at)?;
    }
    Ok(())
}

fn legend_marks(layout: &Layout, marks: &mut Marks) {
    for (class, words, x) in LEGEND {
        let (x, y) = (f64::from(layout::MARGIN) + x, f64::from(layout.legend_y));
        match class {
            Class::Order => marks.line(class, [(x, y + 6.0), (x + 22.0, y - 5.0)].into_iter()),
            _ => {
                let is_bell = matches!(class, Class::Doorbell | Class::OtherDoorbell);
                let (left, right) = if is_bell { (x + 18.0, x + 20.0) } else { (x, x + 22.0) };
                let title = words.to_owned();
                marks.rectangle(&Mark { class, x: (left, right), y: (y - 5.0, y + 6.0), title }, 1.0);
            }
        }
    }
}

fn titled(area: &Area<'_>, place: &Place, title: &str) -> Result<(), Failure> {
    let bold = (FONT, 14).into_font().style(FontStyle::Bold).color(&INK);
    area.draw_text(&shortened(title, 200), &bold, (place.x.0 as i32, place.y.0 as i32 - 21))
}

/// Axes and grid of one panel; the times stand below the last one only.
fn axes(
    area: &Area<'_>,
    layout: &Layout,
    place: &Place,
    y_name: &'static str,
    write: fn(f64) -> String,
) -> Result<(), Failure> {
    let (left, below) = (layout::LABELS_WIDTH, if place.is_last { layout::TIMES_HEIGHT } else { 0 });
    let (width, height) = ((place.x.1 - place.x.0) as u32, (place.y.1 - place.y.0) as u32);
    let corner = (place.x.0 as i32 - left as i32, place.y.0 as i32);
    let part = area.clone().shrink(corner, (left + width, height + below));
    let times = Axis::span("milliseconds", 0.0..layout.duration_ms(), (width, 90), milliseconds);
    let values = Axis::span(y_name, place.values.clone(), (height, 44), write);
    let mut chart = ChartBuilder::on(&part)
        .x_label_area_size(below)
        .y_label_area_size(left)
        .build_cartesian_2d(times, values)?;
    let mut mesh = chart.configure_mesh();
    mesh.bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(AXIS)
        .label_style(text(12, INK))
        .axis_desc_style(text(13, FADED))
        .y_desc(y_name);
    if place.is_last {
        mesh.x_desc("milliseconds since the first page became dirty");
    }
    mesh.draw()
}

fn page(value: f64) -> String {
    count(value.max(0.0) as u64)
}

fn milliseconds(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// What lies behind the commands: lanes of shards, passes, dirty pages, flushes.
fn background(scene: &Scene<'_>, layout: &Layout, marks: &mut Marks) {
    legend_marks(layout, marks);
    let history = scene.history;
    for (panel, (mapping, _)) in layout.panels.iter().zip(&scene.mappings) {
        if history.shards > 1 {
            lanes(history, *mapping, panel, marks);
        }
        let spans = scene.dirty.iter().step_by(dirty_step(scene));
        let spans = spans
            .filter(|span| span.mapping == *mapping)
            .map(|span| ((layout.x(span.since_ns), layout.x(span.until_ns)), panel.rows(&span.pages)));
        marks.rectangles(Class::Dirty, spans, 1.0);
        let passes = history.passes.iter().filter(|pass| pass.mapping == *mapping);
        let passes = passes.filter_map(|pass| pass_box(history, pass, layout, panel)).collect();
        thinned(passes, RECTANGLES_MAX / 4).iter().for_each(|mark| marks.rectangle(mark, 1.0));
    }
    let of = |commit: &Commit| {
        let until_ns = commit.end.map_or(layout.end_ns, |end| end.at_ns);
        let syncs = if commit.syncs == 1 { "a sync".to_owned() } else { format!("{} syncs", commit.syncs) };
        let failed = if commit.end.is_some_and(|end| end.has_failed) { ", failed" } else { "" };
        let title = format!(
            "flush of namespace {} for {syncs}, {} + {}{failed}",
            commit.namespace,
            layout.time(commit.began_ns),
            duration(commit.began_ns, until_ns)
        );
        let x = (layout.x(commit.began_ns), layout.x(until_ns));
        Mark { class: Class::Flush, x, y: (0.0, 0.0), title }
    };
    let flushes = thinned(history.commits.iter().map(of).collect(), RECTANGLES_MAX / 8);
    for panel in &layout.panels {
        flushes.iter().for_each(|mark| marks.rectangle(&Mark { y: panel.y, ..mark.clone() }, 1.0));
    }
}

/// Of how many dirty spans one is drawn.
fn dirty_step(scene: &Scene<'_>) -> usize {
    scene.dirty.len().div_ceil(DIRTY_MAX).max(1)
}

/// Which shard has which pages, beside the panel.
fn lanes(history: &History, mapping: u16, panel: &Place, marks: &mut Marks) {
    let mut lanes = std::collections::BTreeMap::new();
    for command in history.commands.iter().filter(|command| command.mapping == mapping) {
        lanes.insert(command.pages.start / LANE_PAGES, command.shard);
    }
    if lanes.len() > LANES_MAX {
        return;
    }
    for (lane, shard) in lanes {
        let y = panel.rows(&(lane * LANE_PAGES..(lane + 1) * LANE_PAGES));
        let title = format!("pages from {} on belong to shard {shard}", count(lane * LANE_PAGES));
        marks.lane(&hex(shard_colour(shard)), (panel.x.1 + 4.0, 7.0), (y.0 + 0.5, y.1 - 0.5), &title);
    }
}

fn shard_colour(shard: u32) -> RGBColor {
    SHARD_COLOURS[shard as usize % SHARD_COLOURS.len()]
}

/// A pass from its begin to its end, around the pages that it wrote. A pass that wrote nothing has none.
fn pass_box(history: &History, pass: &Pass, layout: &Layout, panel: &Place) -> Option<Mark> {
    let written = pass.commands.iter().map(|&index| &history.commands[index]);
    let first = written.clone().map(|command| command.pages.start).min()?;
    let end = written.clone().map(|command| command.pages.end).max()?;
    let pages: u64 = written.clone().map(|command| command.pages.end - command.pages.start).sum();
    let issued_ns = written.map(|command| command.issued_ns).max().unwrap_or(pass.began_ns);
    let until_ns = pass.ended.map_or(issued_ns, |end| end.at_ns);
    let ended = match pass.ended {
        None => "not ended",
        Some(end) if end.is_whole => "to the end of its range",
        Some(_) => "ended early",
    };
    let title = format!(
        "{}: {} commands, {pages} pages of {} that were dirty, {ended}, {} + {}",
        name(pass),
        pass.commands.len(),
        pass.dirty,
        layout.time(pass.began_ns),
        duration(pass.began_ns, until_ns)
    );
    let x = (layout.x(pass.began_ns), layout.x(until_ns));
    Some(Mark { class: Class::Pass, x, y: panel.rows(&(first..end)), title })
}

fn name(pass: &Pass) -> String {
    let mode = if pass.mode == Mode::Integrity { "integrity" } else { "background" };
    format!("{mode} pass {} ({}), shard {}", pass.number, pass.reason.words(), pass.shard)
}

/// The write commands of a mapping.
fn commands(history: &History, mapping: u16, layout: &Layout, panel: &Place) -> Vec<Mark> {
    let of = |command: &&Command| command.op == Op::Write && command.mapping == mapping;
    let mark = |command: &Command| {
        let (failed, until_ns) = match command.end {
            None => (", never completed", layout.end_ns),
            Some(end) if end.has_failed => (", failed", end.at_ns),
            Some(end) => ("", end.at_ns),
        };
        let class = match history.mode(command) {
            _ if !failed.is_empty() => Class::Failed,
            Mode::Background => Class::Background,
            Mode::Integrity => Class::Integrity,
        };
        let pages = match command.pages.end - command.pages.start {
            1 => format!("page {}", command.pages.start),
            number => format!("{number} pages from {}", command.pages.start),
        };
        let pass = command.pass.map_or_else(|| "no pass".to_owned(), |pass| name(&history.passes[pass]));
        let (at, time) = (layout.time(command.issued_ns), duration(command.issued_ns, until_ns));
        let title = format!("{pages}, {at} + {time}{failed}; {pass}");
        Mark {
            class,
            x: (layout.x(command.issued_ns), layout.x(until_ns)),
            y: panel.rows(&command.pages),
            title,
        }
    };
    history.commands.iter().filter(of).map(mark).collect()
}

/// For each pass a line through its commands in their order: it only ever rises (WB-01).
fn orders(scene: &Scene<'_>, layout: &Layout, marks: &mut Marks) {
    let history = scene.history;
    let mut left = RECTANGLES_MAX * 2;
    for (panel, (mapping, _)) in layout.panels.iter().zip(&scene.mappings) {
        for pass in history.passes.iter().filter(|pass| pass.mapping == *mapping && pass.commands.len() > 1) {
            left = left.saturating_sub(pass.commands.len());
            if left == 0 {
                return;
            }
            let points = pass.commands.iter().map(|&index| {
                let command = &history.commands[index];
                let rows = panel.rows(&command.pages);
                (layout.x(command.issued_ns), (rows.0 + rows.1) / 2.0)
            });
            marks.line(Class::Order, points);
        }
    }
}

fn doorbells(history: &History, layout: &Layout, marks: &mut Marks) {
    for (index, strip) in layout.strips.iter().enumerate() {
        let is_own = layout.strips.len() == history.shards as usize;
        let bells = history.doorbells.iter().filter(|bell| !is_own || bell.shard as usize == index);
        let bars = bells.map(|bell| {
            let x = layout.x(bell.at_ns);
            let title = format!(
                "{}: {} command{} of shard {} by one doorbell",
                layout.time(bell.at_ns),
                bell.commands,
                if bell.commands == 1 { "" } else { "s" },
                bell.shard
            );
            let y = (strip.row(bell.commands as f64), strip.y.1);
            let class = if bell.writes > 0 { Class::Doorbell } else { Class::OtherDoorbell };
            Mark { class, x: (x, x + 1.0), y, title }
        });
        thinned(bars.collect(), RECTANGLES_MAX / 4).iter().for_each(|mark| marks.rectangle(mark, 1.0));
        if history.shards > 1 && is_own {
            let colour = hex(shard_colour(index as u32));
            marks.lane(&colour, (strip.x.1 + 4.0, 7.0), strip.y, &format!("shard {index}"));
        }
    }
}

fn duration(from_ns: u64, until_ns: u64) -> String {
    format!("{:.3} ms", until_ns.saturating_sub(from_ns) as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::super::history::made_up;
    use super::*;

    fn drawn(shards: u32) -> Drawn {
        let history = History::of(&made_up::run(shards));
        let scene = Scene {
            history: &history,
            dirty: &[DirtySpan { mapping: 0, pages: 0..4, since_ns: 5_000, until_ns: 20_000 }],
            mappings: vec![(0, "a <mapping> & more".to_owned())],
            headline: "Writeback on emu:ram?size=1MiB&lba=512".to_owned(),
            facts: vec!["facts".to_owned()],
            verdicts: vec![
                (Verdict::Passed, "WB-01: ascending".to_owned()),
                (Verdict::Failed, "WB-18: more".to_owned()),
            ],
        };
        draw(&scene).unwrap()
    }

    /// Elements open and close in order, and no text has a bare `<` or `&`.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        for tag in svg.split('<').skip(1) {
            let (tag, text) = tag.split_once('>').expect("a tag ends");
            assert!(text.split('&').skip(1).all(|rest| rest.split_once(';').is_some()), "{text}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "in {tag}");
            } else if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().unwrap());
            }
            assert!(tag.matches('"').count().is_multiple_of(2), "{tag}");
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn a_picture_is_well_formed_and_has_everything_that_happened() {
        for shards in [1, 3, 12] {
            let drawn = drawn(shards);
            assert_well_formed(&drawn.svg);
            let has = |class: &str| drawn.svg.matches(&format!("class=\"{class}\"")).count() as u32;
            // Each class has one mark in the legend as well.
            assert_eq!((has("back"), has("sync"), has("fail")), (3 * shards + 1, 3 * shards, 2));
            assert_eq!((has("pass"), has("order"), has("flush")), (2 * shards + 1, 2 * shards + 1, 2));
            assert_eq!((has("bell"), has("other"), has("dirty")), (2 * shards + 1, 2, 2));
            assert_eq!((drawn.rectangles, drawn.rectangles_of), (6 * shards as usize, 6 * shards as usize));
            for words in [
                "a &lt;mapping&gt; &amp; more",
                "size=1MiB&amp;lba=512",
                "doorbells of",
                "FAILED",
                "milliseconds",
            ] {
                assert!(drawn.svg.contains(words), "{words}");
            }
            assert!(
                drawn.svg.contains(
                    "4 pages from 200, 0.125 ms + 0.050 ms, failed; integrity pass 2 (sync), shard 0"
                ) || shards > 1
            );
            assert_eq!(drawn.svg.contains("belong to shard 1"), shards > 1);
        }
    }

    #[test]
    fn everything_lies_within_the_picture() {
        let drawn = drawn(2);
        for attribute in [" x=\"", " y=\""] {
            for place in drawn.svg.split(attribute).skip(1) {
                let place: f64 = place.split('"').next().unwrap().parse().unwrap();
                assert!((-1.0..=f64::from(layout::WIDTH)).contains(&place), "{attribute}{place}");
            }
        }
        assert!(!drawn.svg.contains("NaN") && !drawn.svg.contains("inf"));
    }
}
