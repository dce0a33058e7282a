//! Curves with both axes logarithmic, as an SVG file.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

/// How a curve is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stroke {
    /// With filled points.
    Solid,
    /// With hollow points.
    Dashed,
}

/// One curve.
pub struct Series {
    /// What the legend says; a picture of a single curve has none.
    pub name: &'static str,
    /// Points, ascending.
    pub points: Vec<(f64, f64)>,
    /// Which of the colours.
    pub color: usize,
    pub stroke: Stroke,
}

impl Series {
    /// A solid curve without a name.
    pub fn plain(points: Vec<(f64, f64)>) -> Self {
        Self { name: "", points, color: 0, stroke: Stroke::Solid }
    }
}

/// Curves and what is written beside them.
pub struct Picture<'a> {
    pub title: &'a str,
    pub across: &'static str,
    pub up: &'static str,
    pub series: Vec<Series>,
}

/// Told apart by the colour-blind, too.
const COLORS: [RGBColor; 5] = [
    RGBColor(31, 98, 168),
    RGBColor(213, 94, 0),
    RGBColor(0, 138, 100),
    RGBColor(150, 70, 140),
    RGBColor(90, 90, 90),
];

impl Picture<'_> {
    /// Writes the picture.
    pub fn draw(&self, file: &Path) -> Result<()> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let span = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, 0f64), |(low, high), value| (low.min(value), high.max(value)))
        };
        let (first, last) = span(&mut points().map(|point| point.0));
        let (lowest, highest) = span(&mut points().map(|point| point.1));
        // Whole decades, and two of them at least: a flat curve is to look flat.
        let bottom = (lowest.log10() - 0.5).floor();
        let heights = 10f64.powf(bottom)..10f64.powf((highest.log10() + 0.2).ceil().max(bottom + 2.0));
        let root = SVGBackend::new(file, (720, 440)).into_drawing_area();
        let drawn = (|| {
            root.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&root)
                .caption(self.title, ("sans-serif", 18))
                .margin(16)
                .x_label_area_size(44)
                .y_label_area_size(96)
                .build_cartesian_2d((first..last * 1.1).log_scale(), heights.log_scale())?;
            chart
                .configure_mesh()
                .x_desc(self.across)
                .y_desc(self.up)
                .x_label_formatter(&|value| grouped(*value))
                .y_label_formatter(&|value| grouped(*value))
                .light_line_style(WHITE)
                .bold_line_style(RGBColor(225, 225, 225))
                .draw()?;
            for Series { name, points, color, stroke } in &self.series {
                let color = COLORS[color % COLORS.len()];
                let (line, filled) = (color.stroke_width(2), *stroke == Stroke::Solid);
                let marks = if filled { color.filled() } else { color.stroke_width(1) };
                let drawn = if filled {
                    chart.draw_series(LineSeries::new(points.iter().copied(), line))?
                } else {
                    chart.draw_series(DashedLineSeries::new(points.iter().copied(), 6, 4, line))?
                };
                if !name.is_empty() {
                    drawn.label(*name).legend(move |(x, y)| Circle::new((x + 8, y), 4, marks));
                }
                chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, marks)))?;
            }
            if self.series.iter().any(|series| !series.name.is_empty()) {
                chart
                    .configure_series_labels()
                    .position(SeriesLabelPosition::LowerRight)
                    .background_style(WHITE)
                    .draw()?;
            }
            root.present()
        })();
        drawn.with_context(|| format!("{} can't be drawn", file.display()))
    }
}

/// A number with its thousands apart.
fn grouped(value: f64) -> String {
    if value < 1.0 {
        return format!("{value}");
    }
    let digits = format!("{value:.0}");
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or("")).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn thousands_stand_apart() {
        assert_eq!(
            [0.1, 1.0, 999.0, 1000.0, 1234567.0].map(grouped),
            ["0.1", "1", "999", "1,000", "1,234,567"]
        );
    }
}
