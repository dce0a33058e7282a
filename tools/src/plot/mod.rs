//! What all drawings share: areas and texts, axes, colours, and how a picture becomes SVG.

pub(crate) mod axis;
pub(crate) mod colours;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::error::Error;

/// A part of a picture.
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// What drawing fails with.
pub(crate) type Failure = DrawingAreaErrorKind<std::io::Error>;

pub(crate) const FONT: &str = "sans-serif";

/// A text of one size and colour.
pub(crate) fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

/// A picture of `size` pixels that `draw` fills.
pub(crate) fn picture(
    size: (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> Result<(), Error>,
) -> Result<String, Error> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw(&area)?;
        // Without this the end of the picture is left to a drop that hides errors.
        area.present().map_err(|error| Error::Plot { title: "the picture", reason: error.to_string() })?;
    }
    Ok(svg)
}

/// A picture with rules of style: they come right behind its first tag, which is the picture's own.
pub(crate) fn with_style(svg: &str, rules: &str) -> String {
    svg.replacen('>', &format!("><style>{rules}</style>"), 1)
}

/// A value that fits into its place: the end of a long one goes.
pub(crate) fn shortened(value: &str, chars_max: usize) -> String {
    if value.chars().count() <= chars_max {
        return value.to_owned();
    }
    value.chars().take(chars_max - 1).chain(['\u{2026}']).collect()
}
