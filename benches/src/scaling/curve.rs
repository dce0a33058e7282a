//! A curve with both axes logarithmic, as an SVG file.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

/// Points, ascending.
pub struct Curve(pub Vec<(f64, f64)>);

/// A curve and what is written beside it.
pub struct Picture {
    pub title: &'static str,
    pub across: &'static str,
    pub up: &'static str,
    pub curve: Curve,
}

impl Picture {
    /// Writes the picture.
    pub fn draw(&self, file: &Path) -> Result<()> {
        let Curve(points) = &self.curve;
        let (first, last) = (points[0].0, points[points.len() - 1].0);
        let highest = points.iter().map(|point| point.1).fold(0.0, f64::max);
        let lowest = points.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
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
                .y_label_area_size(72)
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
            let blue = RGBColor(31, 98, 168);
            chart.draw_series(LineSeries::new(points.iter().copied(), blue.stroke_width(2)))?;
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, blue.filled())))?;
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
