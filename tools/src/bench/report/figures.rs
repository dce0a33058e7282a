//! The plots: each draws itself into an area of any size.

use plotters::prelude::*;

use super::Findings;
use crate::error::Error;
use crate::latency::Summary;
use crate::plot::axis::{Axis, rate, time};
use crate::plot::colours::{AXIS, BAR, FADED, GRID, INK, P50, P99, P999, RATE};
use crate::plot::{Area, FONT, Failure, text};

type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<Axis, Axis>>;
type Draw = fn(&Findings<'_>, &Area<'_>) -> Result<(), Failure>;
/// A percentile: its name, its colour, and where it is found.
type Percentile = (&'static str, RGBColor, fn(&Summary) -> f64);

/// Height of the line above a plot, which holds its title and legend.
const HEADER_HEIGHT: u32 = 34;
/// Steps of the histogram to a factor of two.
pub(crate) const STEPS_PER_OCTAVE: u32 = 4;

/// The percentiles that are drawn.
const PERCENTILES: [Percentile; 3] =
    [("p50", P50, |s| s.p50_us), ("p99", P99, |s| s.p99_us), ("p99.9", P999, |s| s.p999_us)];

/// How much of a page's width a plot takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Half,
    Full,
}

/// One plot.
pub(super) struct Figure {
    pub(super) title: &'static str,
    /// How much room it takes.
    pub(super) width: Width,
    draw: Draw,
}

/// All plots that `findings` have data for.
pub(super) fn all(findings: &Findings<'_>) -> Vec<Figure> {
    let figure = |title, width, draw| Figure { title, width, draw };
    let over_time = [
        figure("Throughput over time", Width::Half, throughput_over_time as Draw),
        figure("Latency over time", Width::Half, latency_over_time),
    ];
    let over_depth = [
        figure("Throughput over depth", Width::Half, throughput_over_depth as Draw),
        figure("Latency over depth", Width::Half, latency_over_depth),
    ];
    let has_sweep = !findings.bench.sweep.is_empty();
    let spread = figure("Spread of latencies", Width::Full, spread);
    over_time.into_iter().chain(over_depth.into_iter().filter(|_| has_sweep)).chain([spread]).collect()
}

impl Figure {
    /// Draws the plot with its title and legend.
    pub(super) fn draw(&self, findings: &Findings<'_>, area: &Area<'_>) -> Result<(), Error> {
        header(area, self.title, self.legend())
            .and_then(|()| (self.draw)(findings, &area.margin(HEADER_HEIGHT, 0, 0, 0)))
            .map_err(|error| Error::Plot { title: self.title, reason: error.to_string() })
    }

    fn legend(&self) -> &'static [Percentile] {
        if self.title.starts_with("Throughput") { &[] } else { &PERCENTILES }
    }
}

/// Title on the left, legend on the right.
fn header(area: &Area<'_>, title: &str, legend: &[Percentile]) -> Result<(), Failure> {
    let bold = (FONT, 16).into_font().style(FontStyle::Bold).color(&INK);
    area.draw_text(title, &bold, (8, 8))?;
    let mut x = area.dim_in_pixel().0 as i32 - 12;
    for (name, colour, _) in legend.iter().rev() {
        x -= 8 * name.len() as i32;
        area.draw_text(name, &text(13, INK), (x, 10))?;
        x -= 30;
        area.draw(&PathElement::new([(x, 17), (x + 22, 17)], colour.stroke_width(3)))?;
        x -= 14;
    }
    Ok(())
}

/// A chart with axes, their names, and a grid.
fn chart<'a>(area: &Area<'a>, x: Axis, y: Axis) -> Result<Chart<'a>, Failure> {
    let (x_name, y_name) = (x.name, y.name);
    let mut chart = ChartBuilder::on(area)
        .margin_right(24)
        .margin_bottom(6)
        .x_label_area_size(46)
        .y_label_area_size(84)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(AXIS)
        .label_style(text(12, INK))
        .axis_desc_style(text(13, FADED))
        .x_desc(x_name)
        .y_desc(y_name)
        .draw()?;
    Ok(chart)
}

fn seconds(findings: &Findings<'_>) -> Axis {
    Axis::linear_to("seconds", findings.bench.seconds, rate)
}

fn throughput_over_time(findings: &Findings<'_>, area: &Area<'_>) -> Result<(), Failure> {
    let points = findings.windows.iter().map(|window| (window.at_seconds, window.operations_per_second));
    let max = points.clone().map(|(_, rate)| rate).fold(0.0, f64::max);
    let mut chart = chart(area, seconds(findings), Axis::linear("operations a second", max, rate))?;
    line(&mut chart, points, RATE)
}

fn latency_over_time(findings: &Findings<'_>, area: &Area<'_>) -> Result<(), Failure> {
    let summaries = || findings.windows.iter().filter_map(|window| window.latency);
    let values = PERCENTILES.iter().flat_map(|(_, _, of)| summaries().map(|summary| of(&summary)));
    let mut chart = chart(area, seconds(findings), Axis::logarithmic("latency of an access", values, time))?;
    for (_, colour, of) in PERCENTILES {
        // A window in which nothing ended parts the line.
        for run in findings.windows.split(|window| window.latency.is_none()) {
            let points = run.iter().filter_map(|window| Some((window.at_seconds, of(&window.latency?))));
            line(&mut chart, points, colour)?;
        }
    }
    Ok(())
}

/// One place for each depth of the sweep: they are powers of two, so the places are a logarithmic scale.
fn depths(findings: &Findings<'_>) -> Axis {
    let name = if findings.bench.shards.is_some() { "threads" } else { "accesses in flight" };
    Axis::places(name, findings.bench.sweep.len(), |place| format!("{:.0}", place.exp2()))
}

fn throughput_over_depth(findings: &Findings<'_>, area: &Area<'_>) -> Result<(), Failure> {
    let rates = findings.bench.sweep.iter().map(|point| point.operations_per_second);
    let y = Axis::linear("operations a second", rates.clone().fold(0.0, f64::max), rate);
    let mut chart = chart(area, depths(findings), y)?;
    dotted(&mut chart, rates, RATE)
}

fn latency_over_depth(findings: &Findings<'_>, area: &Area<'_>) -> Result<(), Failure> {
    let summaries = findings.bench.sweep.iter().map(|point| point.latency);
    let values = PERCENTILES.iter().flat_map(|(_, _, of)| summaries.clone().map(|summary| of(&summary)));
    let mut chart = chart(area, depths(findings), Axis::logarithmic("latency of an access", values, time))?;
    for (_, colour, of) in PERCENTILES {
        dotted(&mut chart, summaries.clone().map(|summary| of(&summary)), colour)?;
    }
    Ok(())
}

/// Bars over a logarithmic ladder of times, high on a logarithmic scale so that the few slow accesses show; the
/// percentiles stand in them.
fn spread(findings: &Findings<'_>, area: &Area<'_>) -> Result<(), Failure> {
    let steps = &findings.steps;
    let (first, last) = (steps.first().map_or(1.0, |step| step.0), steps.last().map_or(10.0, |step| step.1));
    let times = Axis::logarithmic("latency of an access", [first, last].into_iter(), time);
    let most = steps.iter().map(|step| step.2).max().unwrap_or(1) as f64;
    let counts = Axis::logarithmic("accesses", [1.0, most].into_iter(), rate).over(0.7..most * 1.5);
    let mut chart = chart(area, times, counts)?;
    let bars = steps.iter().filter(|step| step.2 > 0).map(|&(begin, end, number)| {
        let mut bar = Rectangle::new([(begin, 0.7), (end, number as f64)], BAR.filled());
        bar.set_margin(0, 0, 1, 0);
        bar
    });
    chart.draw_series(bars)?;
    for (_, colour, of) in PERCENTILES {
        let at = of(&findings.bench.latency);
        chart.draw_series([PathElement::new([(at, 0.7), (at, most * 1.5)], colour.stroke_width(2))])?;
    }
    Ok(())
}

fn line(
    chart: &mut Chart<'_>,
    points: impl Iterator<Item = (f64, f64)> + Clone,
    colour: RGBColor,
) -> Result<(), Failure> {
    // A line of one point is none.
    if points.clone().count() == 1 {
        chart.draw_series(points.map(|point| Circle::new(point, 3, colour.filled())))?;
        return Ok(());
    }
    chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
    Ok(())
}

/// A line with a dot at each of the sweep's depths.
fn dotted(
    chart: &mut Chart<'_>,
    values: impl Iterator<Item = f64> + Clone,
    colour: RGBColor,
) -> Result<(), Failure> {
    let points = values.enumerate().map(|(place, value)| (place as f64, value));
    chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
    chart.draw_series(points.map(|point| Circle::new(point, 4, colour.filled())))?;
    Ok(())
}
