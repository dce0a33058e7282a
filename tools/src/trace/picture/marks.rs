//! The marks of the picture as SVG: rectangles with figures to hover over, and lines. They are written here instead of
//! by the plotting library, which knows neither tooltips nor fractions of a pixel.

use std::collections::BTreeMap;
use std::fmt::Write;

/// What a mark is; its style goes by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// A page dirty, and not yet on its way.
    Dirty,
    /// With the device, written in the background.
    Background,
    /// With the device, written for a sync.
    Integrity,
    /// Written, and failed.
    Failed,
    /// Where and how long a pass ran.
    Pass,
    /// The order of a pass's commands.
    Order,
    /// A flush.
    Flush,
    /// A doorbell, for writes among others.
    Doorbell,
    /// A doorbell for reads or flushes alone.
    OtherDoorbell,
}

impl Class {
    pub(super) const ALL: [Self; 9] = [
        Self::Dirty,
        Self::Background,
        Self::Integrity,
        Self::Failed,
        Self::Pass,
        Self::Order,
        Self::Flush,
        Self::Doorbell,
        Self::OtherDoorbell,
    ];

    /// The name of its style.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Dirty => "dirty",
            Self::Background => "back",
            Self::Integrity => "sync",
            Self::Failed => "fail",
            Self::Pass => "pass",
            Self::Order => "order",
            Self::Flush => "flush",
            Self::Doorbell => "bell",
            Self::OtherDoorbell => "other",
        }
    }

    /// Its rules, on light and on dark ground.
    fn rules(self) -> [&'static str; 2] {
        match self {
            Self::Dirty => ["fill:#D9C48F;fill-opacity:.75", "fill:#6E6036;fill-opacity:.8"],
            Self::Background => ["fill:#0072B3", "fill:#58B2F2"],
            Self::Integrity => ["fill:#E0760A", "fill:#FFA24C"],
            Self::Failed => ["fill:#C4003A;stroke:#7A0024", "fill:#FF5C85;stroke:#FFC2D0"],
            Self::Pass => [
                "fill:#2B3138;fill-opacity:.045;stroke:#2B3138;stroke-opacity:.28;stroke-width:.6",
                "fill:#E3E7EC;fill-opacity:.05;stroke:#E3E7EC;stroke-opacity:.3;stroke-width:.6",
            ],
            Self::Order => [
                "fill:none;stroke:#2B3138;stroke-opacity:.55;stroke-width:.8",
                "fill:none;stroke:#E3E7EC;stroke-opacity:.55;stroke-width:.8",
            ],
            Self::Flush => ["fill:#7B4FC9;fill-opacity:.4", "fill:#B79BF0;fill-opacity:.45"],
            Self::Doorbell => ["fill:#2B3138", "fill:#E3E7EC"],
            Self::OtherDoorbell => ["fill:#9AA3AC", "fill:#6B7682"],
        }
    }
}

/// The rules of all classes.
pub(super) fn rules() -> String {
    let of = |ground: usize| {
        let rule = |class: Class| format!(".{}{{{}}}", class.name(), class.rules()[ground]);
        Class::ALL.into_iter().map(rule).collect::<String>()
    };
    format!("{}@media(prefers-color-scheme:dark){{{}}}", of(0), of(1))
}

/// A rectangle in pixels, and what is said of it.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    pub(super) class: Class,
    pub(super) x: (f64, f64),
    pub(super) y: (f64, f64),
    pub(super) title: String,
}

/// Marks, thinned out to at most `limit`: those of a class that begin close to each other become one. Returns as well
/// how many there are then.
pub(super) fn thinned(marks: Vec<Mark>, limit: usize) -> Vec<Mark> {
    if marks.len() <= limit {
        return marks;
    }
    let mut cell = 1.0;
    loop {
        let mut cells: BTreeMap<(Class, i64, i64), (Mark, u64)> = BTreeMap::new();
        for mark in &marks {
            let place = (mark.class, (mark.x.0 / cell) as i64, (mark.y.0 / cell) as i64);
            let merged = cells.entry(place).or_insert_with(|| (mark.clone(), 0));
            merged.1 += 1;
            let into = &mut merged.0;
            into.x = (into.x.0.min(mark.x.0), into.x.1.max(mark.x.1));
            into.y = (into.y.0.min(mark.y.0), into.y.1.max(mark.y.1));
        }
        if cells.len() <= limit {
            let merged = cells.into_values().map(|(mark, count)| match count {
                1 => mark,
                _ => Mark { title: format!("{count} close together, such as: {}", mark.title), ..mark },
            });
            return merged.collect();
        }
        cell *= 2.0;
    }
}

/// SVG that is being written.
#[derive(Debug, Default)]
pub(super) struct Marks {
    pub(super) svg: String,
}

impl Marks {
    /// A rectangle, at least `least` pixels wide and high, which grows around its middle upwards and to the right.
    pub(super) fn rectangle(&mut self, mark: &Mark, least: f64) {
        let width = (mark.x.1 - mark.x.0).max(least);
        let height = (mark.y.1 - mark.y.0).max(least);
        // Thin ones grow to both sides, so that they stay where their pages are.
        let y = (mark.y.0 + mark.y.1 - height) / 2.0;
        self.add(format_args!(
            "<rect class=\"{}\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\">",
            mark.class.name(),
            mark.x.0
        ));
        self.add(format_args!("<title>{}</title></rect>", escaped(&mark.title)));
    }

    /// A line through points.
    pub(super) fn line(&mut self, class: Class, points: impl Iterator<Item = (f64, f64)>) {
        self.add(format_args!("<path class=\"{}\" d=\"", class.name()));
        for (index, (x, y)) in points.enumerate() {
            self.add(format_args!("{}{x:.1} {y:.1}", if index == 0 { 'M' } else { 'L' }));
        }
        self.add(format_args!("\"/>"));
    }

    /// Many rectangles as one path, without anything to hover over.
    pub(super) fn rectangles(
        &mut self,
        class: Class,
        of: impl Iterator<Item = ((f64, f64), (f64, f64))>,
        least: f64,
    ) {
        self.add(format_args!("<path class=\"{}\" d=\"", class.name()));
        for (x, y) in of {
            let (width, height) = ((x.1 - x.0).max(least), (y.1 - y.0).max(least));
            let top = (y.0 + y.1 - height) / 2.0;
            self.add(format_args!("M{:.1} {top:.1}h{width:.1}v{height:.1}h-{width:.1}z", x.0));
        }
        self.add(format_args!("\"/>"));
    }

    /// A rectangle of one fixed colour.
    pub(super) fn lane(&mut self, colour: &str, (x, width): (f64, f64), y: (f64, f64), title: &str) {
        let height = y.1 - y.0;
        self.add(format_args!(
            "<rect fill=\"{colour}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{height:.1}\">\
             <title>{}</title></rect>",
            y.0,
            escaped(title)
        ));
    }

    fn add(&mut self, words: std::fmt::Arguments<'_>) {
        // Writing to a string can't fail.
        self.svg.write_fmt(words).unwrap_or_default();
    }
}

/// Text as SVG has it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(x: f64, class: Class) -> Mark {
        Mark { class, x: (x, x + 1.0), y: (10.0, 12.0), title: format!("at {x}") }
    }

    #[test]
    fn few_marks_stay_as_they_are_and_many_are_merged_with_their_neighbours_of_the_same_class() {
        let marks: Vec<Mark> = (0..1000)
            .map(|number| {
                mark(f64::from(number) / 2.0, [Class::Background, Class::Failed][number as usize % 2])
            })
            .collect();
        assert_eq!(thinned(marks.clone(), 1000).len(), 1000);
        let few = thinned(marks, 100);
        assert!((50..=100).contains(&few.len()), "{}", few.len());
        assert!(few.iter().any(|mark| mark.class == Class::Failed));
        assert!(few[0].title.contains("close together, such as: at 0"));
        let end = few.iter().map(|mark| mark.x.1).fold(0.0, f64::max);
        assert!((end - 500.5).abs() < 1e-9, "nothing is lost at the edge: {end}");
    }

    #[test]
    fn text_cannot_break_out_of_a_title() {
        let mut marks = Marks::default();
        marks.rectangle(&Mark { title: "<b>&".to_owned(), ..mark(1.0, Class::Dirty) }, 2.0);
        assert_eq!(
            marks.svg,
            "<rect class=\"dirty\" x=\"1.0\" y=\"10.0\" width=\"2.0\" height=\"2.0\"><title>&lt;b&gt;&amp;</title></rect>"
        );
    }
}
