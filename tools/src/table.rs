//! A result as an aligned table of names and values, in sections, and how its numbers are written.

use std::fmt;

/// Sections of named values, in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Table {
    sections: Vec<Section>,
    closing: Vec<String>,
}

#[derive(Debug)]
struct Section {
    title: String,
    rows: Vec<(String, String)>,
    /// Lines under the rows, as they are.
    lines: Vec<String>,
}

impl Table {
    /// Begins a section.
    pub(crate) fn section(mut self, title: impl Into<String>) -> Self {
        self.sections.push(Section { title: title.into(), rows: Vec::new(), lines: Vec::new() });
        self
    }

    /// Adds a named value to the last section.
    pub(crate) fn row(mut self, name: impl Into<String>, value: impl fmt::Display) -> Self {
        if let Some(section) = self.sections.last_mut() {
            section.rows.push((name.into(), value.to_string()));
        }
        self
    }

    /// Adds a line to the last section, below its values.
    pub(crate) fn line(mut self, line: impl Into<String>) -> Self {
        if let Some(section) = self.sections.last_mut() {
            section.lines.push(line.into());
        }
        self
    }

    /// Adds a line below everything.
    pub(crate) fn closing(mut self, line: impl Into<String>) -> Self {
        self.closing.push(line.into());
        self
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.sections.iter().flat_map(|section| &section.rows).map(|(name, _)| name);
        let width = names.map(|name| name.chars().count()).max().unwrap_or(0);
        for (index, Section { title, rows, lines }) in self.sections.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            writeln!(f, "{title}")?;
            for (name, value) in rows {
                writeln!(f, "  {name:<width$}  {value}")?;
            }
            for line in lines {
                writeln!(f, "  {line}")?;
            }
        }
        if !self.closing.is_empty() {
            writeln!(f)?;
        }
        self.closing.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// A count with its thousands apart: `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `part` of `whole`, between 0 and 1; 0 of nothing.
pub(crate) fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// A ratio in percent: `93.4 %`.
pub(crate) fn percent(ratio: f64) -> String {
    format!("{:.1} %", ratio * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        let cases = [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")];
        for (number, text) in cases {
            assert_eq!(count(number), text);
        }
    }

    #[test]
    fn values_stand_in_one_column_over_all_sections() {
        let table =
            Table::default().section("one").row("a", 1).section("two").row("longer", 2).closing("end");
        assert_eq!(table.to_string(), "one\n  a       1\n\ntwo\n  longer  2\n\nend\n");
    }

    #[test]
    fn the_ratio_of_nothing_is_zero() {
        assert_eq!(ratio(0, 0), 0.0);
        assert_eq!(percent(ratio(1, 4)), "25.0 %");
    }
}
