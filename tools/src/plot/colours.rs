//! The colours of a report. Drawings hold those for light ground; a style sheet that names them gives each its
//! counterpart on dark ground, so that one drawing serves both.
//!
//! The series' colours can be told apart with any of the common colour deficiencies, and stand in the legend in the
//! order in which they lie above each other.

use plotters::style::RGBColor;

/// Text.
pub(crate) const INK: RGBColor = RGBColor(0x2B, 0x31, 0x38);
/// Text that explains.
pub(crate) const FADED: RGBColor = RGBColor(0x5C, 0x66, 0x70);
/// Axes.
pub(crate) const AXIS: RGBColor = RGBColor(0x9A, 0xA3, 0xAC);
/// Lines behind the data.
pub(crate) const GRID: RGBColor = RGBColor(0xE1, 0xE5, 0xEA);
/// The ground of a picture that has one.
pub(crate) const GROUND: RGBColor = RGBColor(0xFF, 0xFF, 0xFE);
/// Bars, on which lines of any series can be seen.
pub(crate) const BAR: RGBColor = RGBColor(0xC4, 0xCB, 0xD6);
/// Throughput.
pub(crate) const RATE: RGBColor = RGBColor(0x5B, 0x5F, 0xC7);
/// The median.
pub(crate) const P50: RGBColor = RGBColor(0x00, 0x8F, 0x6B);
/// The 99th percentile.
pub(crate) const P99: RGBColor = RGBColor(0x00, 0x72, 0xB3);
/// The 99.9th percentile.
pub(crate) const P999: RGBColor = RGBColor(0xD1, 0x4F, 0x0C);

/// Each colour with its counterpart on dark ground.
const ON_DARK: [(RGBColor, &str); 10] = [
    (INK, "#E3E7EC"),
    (FADED, "#A3ADB8"),
    (AXIS, "#6B7682"),
    (GRID, "#2E363F"),
    (GROUND, "#14181D"),
    (BAR, "#47525F"),
    (RATE, "#9DA0F5"),
    (P50, "#35C79C"),
    (P99, "#58B2F2"),
    (P999, "#FF8F52"),
];

/// A colour as drawings write it.
pub(crate) fn hex(RGBColor(red, green, blue): RGBColor) -> String {
    format!("#{red:02X}{green:02X}{blue:02X}")
}

/// The rules that turn every colour of a drawing to its counterpart.
pub(crate) fn dark_rules() -> String {
    let rule = |(light, dark): &(RGBColor, &str)| {
        let light = hex(*light);
        format!("svg [fill=\"{light}\"]{{fill:{dark}}}svg [stroke=\"{light}\"]{{stroke:{dark}}}")
    };
    ON_DARK.iter().map(rule).collect()
}
