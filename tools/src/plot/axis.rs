//! Axes: where one begins and ends, how values lie along it, at which it has marks, and how these are written.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

use crate::latency::microseconds;

/// Marks that a linear axis has at most.
const MARKS_MAX: f64 = 6.0;

/// How values lie along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    Linear,
    Logarithmic,
}

/// An axis: what it is called, its range, and its marks in ascending order with the way in which they are written.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) name: &'static str,
    range: Range<f64>,
    marks: Vec<f64>,
    scale: Scale,
    write: fn(f64) -> String,
}

impl Axis {
    /// From 0 to a little more than `max`, with marks at multiples of 1, 2, 2.5 or 5 times a power of ten.
    pub(crate) fn linear(name: &'static str, max: f64, write: fn(f64) -> String) -> Self {
        let max = if max > 0.0 { max } else { 1.0 };
        let step = round_step(max / MARKS_MAX);
        let end = max * 1.06;
        let marks = (0..).map(|index| f64::from(index) * step).take_while(|mark| *mark <= end).collect();
        Self { name, range: 0.0..end, marks, scale: Scale::Linear, write }
    }

    /// From 0 to exactly `max`.
    pub(crate) fn linear_to(name: &'static str, max: f64, write: fn(f64) -> String) -> Self {
        let mut axis = Self::linear(name, max, write);
        axis.range.end = max.max(1e-9);
        axis.marks.retain(|mark| *mark <= max * 1.000_001);
        axis
    }

    /// Exactly over `range`, with marks as of [`linear`](Self::linear), about one in `step_pixels` of `pixels`.
    pub(crate) fn span(
        name: &'static str,
        range: Range<f64>,
        (pixels, step_pixels): (u32, u32),
        write: fn(f64) -> String,
    ) -> Self {
        let count = (pixels / step_pixels.max(1)).max(2);
        let step = round_step(((range.end - range.start) / f64::from(count)).max(1e-9));
        let first = (range.start / step).ceil();
        let marks = (0..).map(|index| (first + f64::from(index)) * step);
        let marks = marks.take_while(|mark| *mark <= range.end + step * 1e-6).collect();
        Self { name, range, marks, scale: Scale::Linear, write }
    }

    /// With a mark, and nothing between them, at each of `0..count`, and half a step of room at both ends.
    pub(crate) fn places(name: &'static str, count: usize, write: fn(f64) -> String) -> Self {
        let marks: Vec<f64> = (0..count).map(|place| place as f64).collect();
        let end = count as f64 - 1.0;
        Self { name, range: -0.35..end + 0.35, marks, scale: Scale::Linear, write }
    }

    /// Around positive values, with marks at powers of ten, and at 2 and 5 times those where there is room.
    pub(crate) fn logarithmic(
        name: &'static str,
        values: impl Iterator<Item = f64>,
        write: fn(f64) -> String,
    ) -> Self {
        let (mut min, mut max) = (f64::INFINITY, 0f64);
        for value in values.filter(|value| *value > 0.0) {
            (min, max) = (min.min(value), max.max(value));
        }
        if min > max {
            (min, max) = (1.0, 10.0);
        }
        // Flat curves lie within a decade, not on an edge.
        let (start, end) = (min / 1.5, (max * 1.5).max(min * 4.0));
        let decades = (start.log10().floor() as i32)..=(end.log10().ceil() as i32);
        let factors: &[f64] = if (end / start).log10() <= 2.2 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let all = decades.flat_map(|decade| factors.iter().map(move |factor| factor * 10f64.powi(decade)));
        let marks = all.filter(|mark| (start..=end).contains(mark)).collect();
        Self { name, range: start..end, marks, scale: Scale::Logarithmic, write }
    }

    /// The same marks over another range.
    pub(crate) fn over(self, range: Range<f64>) -> Self {
        let marks = self.marks.into_iter().filter(|mark| (range.start..=range.end).contains(mark)).collect();
        Self { range, marks, ..self }
    }
}

/// The smallest of 1, 2, 2.5 and 5 times a power of ten that isn't below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 2.5, 5.0].into_iter().find(|factor| factor * power >= step * 0.999_999);
    factor.unwrap_or(10.0) * power
}

impl Ranged for Axis {
    type ValueType = f64;
    type FormatOption = NoDefaultFormatting;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let place = |value: f64| match self.scale {
            Scale::Linear => value,
            Scale::Logarithmic => value.max(f64::MIN_POSITIVE).ln(),
        };
        let (start, end) = (place(self.range.start), place(self.range.end));
        let part = ((place(*value) - start) / (end - start)).clamp(0.0, 1.0);
        first + (part * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.marks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        (self.write)(*value)
    }
}

/// A number of operations, shortly: `1.25 M`, `300 k`, `80`.
pub(crate) fn rate(value: f64) -> String {
    let short = |value: f64| {
        let text = format!("{value:.2}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match value {
        value if value >= 1e6 => format!("{} M", short(value / 1e6)),
        value if value >= 1e3 => format!("{} k", short(value / 1e3)),
        value => short(value),
    }
}

/// A time that is given in microseconds, without digits that say nothing: `500 ns`, `20 µs`, `1.5 ms`.
pub(crate) fn time(us: f64) -> String {
    microseconds(us).replace(".0 ", " ").replace(" us", " \u{b5}s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_marks_are_round_and_few_and_cover_the_range() {
        for max in [0.7, 1.0, 3.0, 999.0, 1001.0, 23_456_789.0] {
            let axis = Axis::linear("", max, rate);
            assert!((4..=8).contains(&axis.marks.len()), "{max}: {axis:?}");
            assert!(axis.range.end >= max && axis.marks[0] == 0.0);
        }
        assert_eq!(Axis::linear("", 1000.0, rate).marks, [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]);
        assert_eq!(Axis::linear_to("", 5.0, rate).marks, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(Axis::linear_to("", 5.0, rate).range, 0.0..5.0);
        assert_eq!(Axis::linear("", 0.0, rate).range.start, 0.0);
    }

    #[test]
    fn an_axis_over_a_span_has_round_marks_in_it_as_many_as_there_is_room_for() {
        let axis = Axis::span("", 1000.0..3000.0, (400, 100), rate);
        assert_eq!(axis.marks, [1000.0, 1500.0, 2000.0, 2500.0, 3000.0]);
        assert_eq!(Axis::span("", 130.0..170.0, (200, 100), rate).marks, [140.0, 160.0]);
        assert!(Axis::span("", 5.0..5.0, (200, 100), rate).marks.len() <= 2);
    }

    #[test]
    fn logarithmic_marks_lie_in_the_range_and_are_never_missing() {
        for values in [vec![0.05, 0.06], vec![10.0], vec![1.0, 900_000.0], vec![], vec![3.0, 0.0, -1.0]] {
            let axis = Axis::logarithmic("", values.iter().copied(), time);
            assert!((1..=9).contains(&axis.marks.len()), "{values:?}: {axis:?}");
            assert!(axis.marks.iter().all(|mark| (axis.range.start..=axis.range.end).contains(mark)));
            assert!(values.iter().filter(|v| **v > 0.0).all(|v| axis.range.contains(v)));
        }
    }

    #[test]
    fn values_lie_along_an_axis_by_its_scale_and_never_outside() {
        let axis = Axis::linear_to("", 4.0, rate);
        assert_eq!([0.0, 1.0, 4.0, 9.0].map(|value| axis.map(&value, (100, 500))), [100, 200, 500, 500]);
        let axis = Axis::logarithmic("", [1.0, 60.0].into_iter(), time).over(1.0..100.0);
        // The first pixel of a vertical axis is the lowest.
        assert_eq!([0.0, 1.0, 10.0, 100.0].map(|value| axis.map(&value, (200, 0))), [200, 200, 100, 0]);
        assert_eq!(axis.marks, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
    }

    #[test]
    fn numbers_are_written_shortly() {
        let rates = [(0.0, "0"), (80.0, "80"), (1000.0, "1 k"), (312_500.0, "312.5 k"), (2.25e6, "2.25 M")];
        for (value, text) in rates {
            assert_eq!(rate(value), text);
        }
        let times = [(0.05, "50 ns"), (1.0, "1 µs"), (12.5, "12.5 µs"), (2000.0, "2 ms"), (5e6, "5 s")];
        for (us, text) in times {
            assert_eq!(time(us), text);
        }
    }
}
