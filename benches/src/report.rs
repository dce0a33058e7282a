//! What a question answers, and how it is printed. Nothing else in this crate writes to the standard output.

use std::fmt;

use anyhow::Result;
use serde::Serialize;

use crate::machine::Machine;

/// A cell of a table.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(untagged)]
pub enum Cell {
    /// A whole number.
    Count(u64),
    /// A measured figure.
    Figure(f64),
    /// There is no figure.
    None,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => f.pad(&count.to_string()),
            // Four digits say all that such a figure can.
            Self::Figure(figure) if figure.abs() >= 100.0 => f.pad(&format!("{figure:.0}")),
            Self::Figure(figure) if figure.abs() >= 10.0 => f.pad(&format!("{figure:.1}")),
            Self::Figure(figure) => f.pad(&format!("{figure:.2}")),
            Self::None => f.pad("–"),
        }
    }
}

/// A line of a table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What the figures are of.
    pub name: String,
    /// One cell a column.
    pub cells: Vec<Cell>,
}

impl Row {
    pub fn new(name: impl Into<String>, cells: Vec<Cell>) -> Self {
        Self { name: name.into(), cells }
    }
}

/// Figures that belong together.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// What the table shows.
    pub title: String,
    /// Names of the columns, with units.
    pub columns: Vec<&'static str>,
    /// The lines.
    pub rows: Vec<Row>,
}

/// On which side of its limit a figure should lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// No larger than this.
    AtMost(f64),
    /// No smaller than this.
    AtLeast(f64),
}

/// A target and whether it was reached.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    /// What is measured.
    pub what: String,
    /// The figure's unit.
    pub unit: &'static str,
    /// Where it should lie.
    pub limit: Limit,
    /// The figure; `None` when it couldn't be measured.
    pub measured: Option<f64>,
    /// Whether it was measured and lies where it should.
    pub met: bool,
}

impl Target {
    pub fn new(what: impl Into<String>, unit: &'static str, limit: Limit, measured: Option<f64>) -> Self {
        let met = measured.is_some_and(|figure| match limit {
            Limit::AtMost(most) => figure <= most,
            Limit::AtLeast(least) => figure >= least,
        });
        Self { what: what.into(), unit, limit, measured, met }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match (self.met, self.measured) {
            (true, _) => "met",
            (false, Some(_)) => "MISSED",
            (false, None) => "NOT MEASURED",
        };
        let (side, limit) = match self.limit {
            Limit::AtMost(most) => ("at most", Cell::Figure(most)),
            Limit::AtLeast(least) => ("at least", Cell::Figure(least)),
        };
        let measured = self.measured.map_or(Cell::None, Cell::Figure);
        write!(f, "{verdict:12} {}: {measured} {} ({side} {limit})", self.what, self.unit)
    }
}

/// What a question came to.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// The question's name on the command line.
    pub question: &'static str,
    /// Counted rounds behind each median; 1 where nothing is timed.
    pub rounds: usize,
    /// The figures.
    pub tables: Vec<Table>,
    /// The targets.
    pub targets: Vec<Target>,
    /// What the reader has to know to read the figures right.
    pub notes: Vec<String>,
}

impl Answer {
    pub fn meets_its_targets(&self) -> bool {
        self.targets.iter().all(|target| target.met)
    }
}

/// Everything that one run of `versus` says.
#[derive(Debug, Serialize)]
pub struct Output {
    /// Where it was measured.
    pub machine: Machine,
    /// An answer a question.
    pub answers: Vec<Answer>,
}

#[expect(clippy::print_stdout, reason = "the results are this program's output")]
impl Output {
    /// Prints one JSON object.
    ///
    /// # Errors
    /// When a figure can't be put into JSON.
    pub fn print_json(&self) -> Result<()> {
        println!("{}", serde_json::to_string_pretty(self)?);
        Ok(())
    }

    /// Prints tables for people.
    pub fn print_tables(&self) {
        println!("{}", self.machine);
        for answer in &self.answers {
            println!("\nversus {}{}", answer.question, rounds(answer.rounds));
            for table in &answer.tables {
                print!("\n{}", render(table));
            }
            println!();
            for target in &answer.targets {
                println!("  {target}");
            }
            for note in &answer.notes {
                println!("  note: {note}");
            }
        }
    }
}

fn rounds(rounds: usize) -> String {
    if rounds > 1 { format!(" (medians of {rounds} rounds)") } else { String::new() }
}

/// The table as text: names left, figures right.
fn render(table: &Table) -> String {
    let name_width = table.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
    let name_width = name_width.max(table.title.chars().count()) + 2;
    let widths: Vec<usize> = table.columns.iter().map(|column| column.chars().count().max(8) + 2).collect();
    let mut text = format!("  {:name_width$}", table.title);
    for (column, width) in table.columns.iter().zip(&widths) {
        text += &format!("{column:>width$}");
    }
    for row in &table.rows {
        text += &format!("\n    {:1$}", row.name, name_width - 2);
        for (cell, width) in row.cells.iter().zip(&widths) {
            text += &format!("{cell:>width$}");
        }
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_was_not_measured_is_not_met() {
        assert!(!Target::new("x", "ns", Limit::AtMost(1.0), None).met);
        assert!(Target::new("x", "ns", Limit::AtMost(1.0), Some(1.0)).met);
        assert!(!Target::new("x", "ns", Limit::AtLeast(1.0), Some(0.99)).met);
    }

    #[test]
    fn columns_stand_below_their_names() {
        let table = Table {
            title: "T".into(),
            columns: vec!["ns", "ratio"],
            rows: vec![Row::new("pin", vec![Cell::Figure(12.34), Cell::None])],
        };
        let text = render(&table);
        let [head, line] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text:?}") };
        assert_eq!(head.chars().count(), line.chars().count());
        assert!(line.ends_with('–') && line.contains("12.3"), "{text:?}");
    }
}
