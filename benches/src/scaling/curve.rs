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
        // A decade of room: a flat curve is to look flat.
        let heights = lowest / 4.0..highest * 4.0;
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
